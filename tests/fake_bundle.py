"""Stand-ins for a started bundle: the real dispatcher between fake tiers, here or as real processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.bundle import Running, Variant
from bench.queries import Query
from deploy.local.bundle import Bundle, Settings, site
from deploy.local.plan import IN_CLUSTER_GATEWAY
from deploy.local.rolling import Rolling
from deploy.stack import Function, Stack
from functions.dispatcher.policy_file import PolicySource
from tests.fakes import FakeTier, card, dispatcher_app, free_port, served, tier_app

ROOT = Path(__file__).parents[1]
SURE = Query("assistant", "hello there", "greeting")
UNSURE = Query("assistant", "hello maybe", "greeting")  # the fake device is not sure of it, so the edge is asked
WRONG = Query("assistant", "what will it rain", "weather")
QUERIES = [SURE, UNSURE, WRONG]


@contextmanager
def start_here(variants: Mapping[str, Variant]) -> Iterator[Running]:
    """Every function as a server in this process, which has no process group to stop; dispatchers come last."""
    with ExitStack() as opened:
        urls: dict[str, str] = {}
        for name, variant in sorted(variants.items(), key=lambda item: item[1].of == "dispatcher"):
            if variant.of == "dispatcher":
                nobody = f"http://127.0.0.1:{free_port()}"
                peers = [variant.environment.get(f"{t.upper()}_URL") or urls.get(t, nobody) for t in ("device", "edge")]
                app = dispatcher_app(*peers, policy=PolicySource.read(variant.environment))
            else:
                app = tier_app(FakeTier(card(variant.of)), max_inflight=64)
            urls[name] = opened.enter_context(served(app))
        yield Running(urls, {})


def _function(name: str, app: str, **environment: str) -> Function:
    serve = "gunicorn --bind x --worker-class gthread --workers 1 --threads 48 --no-control-socket"
    return Function(name, "image", "handler", f"{serve} {app}", environment)


def _stack() -> Stack:
    peer = f"http://{IN_CLUSTER_GATEWAY}:8080/function"
    tier = {"MODEL_PATH": "nowhere", "FAKE_TOKEN_S": "0.005", "MAX_INFLIGHT": "4", "QUEUE_LIMIT": "8"}
    dispatcher = {"DEVICE_URL": f"{peer}/device", "EDGE_URL": f"{peer}/edge", "MAX_INFLIGHT": "16", "QUEUE_LIMIT": "8"}
    federation = {"FEDERATION_NODES": f"device={peer}/device", "EDGE_URL": f"{peer}/edge"}
    functions = [
        _function("federation", "functions.federation.app:create_app()", **federation),
        _function("dispatcher", "functions.dispatcher.app:create_app()", **dispatcher),
        *(_function(n, "tests.fakes:create_app_for_gunicorn()", TIER_NAME=n, **tier) for n in ("device", "edge")),
    ]
    return Stack({function.name: function for function in functions}, ())


@contextmanager
def start_whole() -> Iterator[Rolling]:
    """All functions as processes that can be replaced."""
    with Rolling(_stack(), Settings(site(ROOT, {}), port=0, stop_timeout_s=10.0), lambda _name, _line: None) as bundle:
        yield bundle


@contextmanager
def start_site(name: str, variables: Mapping[str, str]) -> Iterator[str]:
    """One site as processes behind a gateway of its own."""
    names = {"device": ("dispatcher", "device"), "edge": ("edge",)}[name]
    stack = _stack()
    changes = {"dispatcher": variables} if name == "device" else {}
    stack = stack.varied({n: (n, changes.get(n, {})) for n in names})
    with Bundle(stack, Settings(site(ROOT, {}), port=0, stop_timeout_s=5.0), lambda _name, _line: None) as bundle:
        yield bundle.url


@contextmanager
def start_processes(variants: Mapping[str, Variant]) -> Iterator[Running]:
    """Every function as a process of its own."""
    stack = _stack().varied({name: (v.of, v.environment) for name, v in variants.items()})
    settings = Settings(site(ROOT, {}), port=0, stop_timeout_s=5.0)
    with Bundle(stack, settings, lambda _name, _line: None) as bundle:
        urls = {name: f"http://127.0.0.1:{port}" for name, port in bundle.ports.items()}
        yield Running(urls, {p.name: p.pid for p in bundle.processes})
