"""The AR example: headsets that share a room see the same world, with nodes gone or a federation each as well."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

from tests.fakes import FakeTier, federated, free_port, served, tier_app
from tests.servers import RedisServer

SCRIPT = Path(__file__).parents[1] / "examples" / "ar" / "collaborate.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("collaborate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["collaborate"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["collaborate"]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def nodes(stack: ExitStack, living: int, dead: int = 0) -> dict[str, str]:
    urls = [stack.enter_context(served(tier_app(FakeTier()))) for _ in range(living)]
    urls += [f"http://127.0.0.1:{free_port()}" for _ in range(dead)]
    return {f"node-{number}": url for number, url in enumerate(urls)}


def test_it_runs_as_printed(example: ModuleType, stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    place = stack.enter_context(served(stack.enter_context(federated(nodes(stack, 3)))))
    assert example.main(["--places", place]) == 0
    printed = capsys.readouterr().out
    assert "ada: play some jazz on spotify" in printed
    assert "the same world for all: True; forgotten at the end: True" in printed


def test_with_most_nodes_gone_turns_are_shared_and_doubtful_facts_are_not(
    example: ModuleType, stack: ExitStack
) -> None:
    place = stack.enter_context(served(stack.enter_context(federated(nodes(stack, 1, dead=2)))))
    ada, bob = (example.Headset(who, place, "room") for who in ("ada", "bob"))
    assert ada.say("play abba")["degraded"]
    assert bob.look().said == [("ada", "play abba")]
    assert bob.world.facts == {}


def test_headsets_with_a_federation_each_share_a_room_through_redis(
    example: ModuleType, stack: ExitStack, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    stack.callback(server.kill)
    tiers = nodes(stack, 2)
    apps = [federated(tiers, redis_url=server.url, common={"node_id": name}) for name in ("one", "two")]
    places = [stack.enter_context(served(stack.enter_context(app))) for app in apps]
    assert example.main(["--places", *places]) == 0
