"""What these commands share: options, and what they are handed of rooms that `bench` must not import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bench.bundle import Autoscaled, Service, Start, StartPlaced, StartSite, StartWhole
from bench.queries import Query

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for a pipe.")]
Skill = Annotated[str, typer.Option(help="assistant, home, banking or chat.")]
Tier = Annotated[Path, typer.Argument(help="A tier's folder, as `edgecascade build` writes it.")]
BenchData = Annotated[
    Path | None, typer.Option(help="JSON lines, or the published sets' folder, of which the test halves; else our own.")
]
Skills = Annotated[list[str] | None, typer.Option(help="This skill; may be given again. All by default.")]
SKILLS = ("assistant", "home", "banking")


@dataclass(frozen=True)
class Rooms:
    """What the benches need of other rooms; the command line puts it into the context's `obj`, by this class.

    `smollm2` is the model's file, fetched if need be; `home` where things are built; `data` where the published sets
    may lie, and `published` reads a split of them for some skills; `service` finds or runs a bundle to ask; `start`
    runs a bundle; `autoscaled` runs a bundle that scales; `site` runs one site, `whole` all of stack.yml; `placed` runs
    the edge tier under the rebalancer.
    """

    smollm2: Callable[[Callable[[float, float, str], None]], Path]
    home: Callable[[], Path]
    data: Path
    published: Callable[..., Sequence[Query]]
    service: Service
    start: Start
    autoscaled: Autoscaled
    site: StartSite
    whole: StartWhole
    placed: StartPlaced


def labelled(rooms: Rooms, data: Path | None, skills: Sequence[str], limit: int) -> list[Query]:
    """Labelled queries of some skills, shuffled together by a fixed seed; raises `BenchError`."""
    from bench.queries import OWN_QUERIES, read, sample

    if data is not None and data.is_dir():
        found = list(rooms.published(data, "test", *skills))
    else:
        named = read(data or OWN_QUERIES, skills[0] if len(skills) == 1 else None)
        found = [query for query in named if query.skill in skills]
    return sample(found, limit or len(found))
