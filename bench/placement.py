"""`edgecascade bench placement`: how long planning takes for fleets of all sorts, and how far from the bound it ends.

Fleets are drawn at random: every node and link different, links alike, or a few kinds of nodes; the model's layers are
of one size, and memory is so short that many nodes are needed.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scaler.placement.plan import place
from scaler.placement.values import Goal, Layer, Link, Model, Node, Problem

MIB = 2**20
LAYER = Layer(3 * MIB)
KINDS = 4
"""Kinds of nodes in a fleet of a few kinds."""
FLEETS = ("all different", "links alike", f"{KINDS} kinds")


def fleet(kind: str, n_nodes: int, n_layers: int, seed: int) -> Problem:
    """Draw one."""
    rng = random.Random(seed)
    drawn = [_node(rng) for _ in range(KINDS if kind == FLEETS[2] else n_nodes)]
    nodes = [Node(f"node-{i}", *drawn[i % len(drawn)]) for i in range(n_nodes)]
    names = [node.name for node in nodes]
    if kind == FLEETS[0]:
        links = {pair: Link(rng.uniform(0.2, 5), rng.uniform(50, 1000)) for pair in permutations(names, 2)}
    else:
        links = dict.fromkeys(permutations(names, 2), Link(0.4, 940))
    model = Model([LAYER] * n_layers, 10 * LAYER.size_bytes, 10 * LAYER.size_bytes, 0, 0, 2304)
    return Problem(nodes, links, model)


def _node(rng: random.Random) -> tuple[int, float, float, float]:
    slowness = rng.uniform(0.1, 0.6)
    memory = LAYER.size_bytes * rng.uniform(3, 16)
    return int(memory), slowness, slowness / rng.uniform(4, 12), 5 * slowness


def measure(
    n_nodes: int, n_layers: int, seeds: Sequence[int], now: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Plan for every fleet and goal with each seed; the longest time and the largest gap of each."""
    rows = []
    for kind in FLEETS:
        for goal in Goal:
            plans, seconds = [], []
            for seed in seeds:
                problem = fleet(kind, n_nodes, n_layers, seed)
                begun = now()
                plans.append(place(problem, goal))
                seconds.append(now() - begun)
            rows.append(
                {
                    "fleet": kind,
                    "goal": goal.value,
                    "method": plans[-1].method,
                    "stages": max(len(plan.stages) for plan in plans),
                    "seconds_max": max(seconds),
                    "gap_median": sorted(plan.gap for plan in plans)[len(plans) // 2],
                    "gap_max": max(plan.gap for plan in plans),
                }
            )
    return rows


def report(rows: Sequence[dict[str, Any]], n_nodes: int, n_layers: int, *, as_json: bool) -> None:
    """Print the figures for a person or a pipe."""
    if as_json:
        print(json.dumps({"nodes": n_nodes, "layers": n_layers, "rows": rows}))
        return
    table = Table(title=f"{n_nodes} nodes, {n_layers} layers", title_justify="left", box=box.SIMPLE)
    for heading in ("fleet", "goal", "method", "stages", "longest", "gap", "largest gap"):
        table.add_column(heading, justify="left" if heading in {"fleet", "goal", "method"} else "right")
    for row in rows:
        gaps = (f"{100 * row[key]:.2f} %" for key in ("gap_median", "gap_max"))
        words = (row["fleet"], row["goal"], row["method"], str(row["stages"]), f"{row['seconds_max']:.2f} s")
        table.add_row(*words, *gaps)
    Console(width=100).print(table)
