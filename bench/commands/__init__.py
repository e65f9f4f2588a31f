"""`edgecascade bench …`, and what asks a running service: each command opens what it needs, and nothing else."""

from __future__ import annotations

import typer

from bench.commands.engine import drafts, engine, grammar, profile_node, seal
from bench.commands.faults import autoscale, chaos, faults, rolling, sites
from bench.commands.nodes import leaks, links, placed, placement, ranked, rebalance, rpc, survival
from bench.commands.service import ask, cascade, demo, evaluate, load, overhead
from bench.commands.shared import Rooms

__all__ = ["Rooms", "app", "ask", "demo", "evaluate", "profile_node"]

app = typer.Typer(help="Measure a running service, the engine, or what a tier costs.", no_args_is_help=True)
for command in (
    *(faults, grammar, drafts, load, cascade, overhead, chaos, autoscale, sites, rolling),
    *(links, rpc, ranked, survival, leaks, placement, placed, rebalance, seal, engine),
):
    app.command()(command)
