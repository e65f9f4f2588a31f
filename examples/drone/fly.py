"""A command in words to a flight plan: by a model while the battery lasts, by rules when it does not.

The plan is made by the bundle's models, held to the rules' own JSON schema. With the battery under its floor no model
is asked; if it falls while an answer is under way, the answer is broken off and the rules plan. They also step in
where there is no bundle, and where a model's plan breaks their limits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from functions.dispatcher.rules import RuleBook, read_rules
from functions.serving.settings import ConfigError

RULES = Path(__file__).with_name("rules.toml")
FLOOR_PERCENT = 15.0
_DEADLINE_MS = 5000
_SYSTEM = "You plan flights of a drone. Answer with the steps of the flight plan as JSON."


class BatteryLowError(Exception):
    """The battery fell under its floor while an answer was under way."""


def make_plan(
    command: str,
    book: RuleBook,
    battery_percent: Callable[[], float],
    client: httpx.Client,
    floor: float = FLOOR_PERCENT,
) -> tuple[dict[str, Any] | None, str]:
    """The plan as a frame, None if nobody understands the command; and who made it, and why.

    An unreadable battery counts as empty.
    """
    if _is_low(battery_percent(), floor):
        return _by_rules(book, command), "rules: the battery is low"
    try:
        text, source = _by_model(command, book, battery_percent, client, floor)
        plan = json.loads(text)
    except BatteryLowError:
        return _by_rules(book, command), "rules: the battery fell, the model's answer was broken off"
    except httpx.HTTPError as error:
        return _by_rules(book, command), f"rules: no bundle answers ({type(error).__name__})"
    except ValueError:
        return _by_rules(book, command), "rules: the model gave no plan"
    if not book.allows(plan):
        return _by_rules(book, command), "rules: the model's plan breaks their limits"
    return plan, source


def _is_low(percent: float, floor: float) -> bool:
    return math.isnan(percent) or percent < floor


def _by_rules(book: RuleBook, command: str) -> dict[str, Any] | None:
    plan = book.plan(command)
    return plan.frame if plan else None


def _by_model(
    command: str, book: RuleBook, battery_percent: Callable[[], float], client: httpx.Client, floor: float
) -> tuple[str, str]:
    """Stream the answer, looking at the battery before each token; leaving the stream frees the tier."""
    form = {"type": "json_schema", "json_schema": {"name": "plan", "schema": book.schema}}
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": command}]
    body = {"model": "auto", "messages": messages, "response_format": form, "stream": True, "deadline_ms": _DEADLINE_MS}
    headers = {"Accept": "text/event-stream", "X-Battery-Level": f"{battery_percent():g}"}
    text, source = "", ""
    with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if _is_low(battery_percent(), floor):
                raise BatteryLowError
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for choice in chunk.get("choices", []):
                text += choice["delta"].get("content") or ""
            source = chunk.get("edgecascade", {}).get("source", source)
    return text, source


def read_percent(path: Path) -> float:
    """A battery's level from a file such as /sys/class/power_supply/BAT0/capacity; 0 if it cannot be read."""
    try:
        value = float(path.read_text("utf-8"))
    except (OSError, ValueError):
        return 0.0
    return value if math.isfinite(value) else 0.0


def main(arguments: list[str] | None = None) -> int:
    """Plan one command; the steps go to stdout, a line each, who made them to stderr."""
    parser = argparse.ArgumentParser(description="A command in words to a flight plan.")
    parser.add_argument("command")
    parser.add_argument("--battery", type=float, default=100.0, help="percent")
    parser.add_argument("--battery-file", type=Path, help="read the level from here, again before each token")
    parser.add_argument("--floor", type=float, default=FLOOR_PERCENT, help="percent, under which no model is asked")
    parser.add_argument("--rules", type=Path, default=RULES)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the bundle's gateway")
    given = parser.parse_args(arguments)
    try:
        book = read_rules(given.rules)
    except ConfigError as error:
        print(f"fly: {error}", file=sys.stderr)
        return 1

    def battery() -> float:
        return read_percent(given.battery_file) if given.battery_file else given.battery

    with httpx.Client(base_url=given.url, timeout=30, trust_env=False) as client:
        plan, source = make_plan(given.command, book, battery, client, given.floor)
    if plan is None:
        print(f"fly: nobody understands the command ({source})", file=sys.stderr)
        return 1
    for number, step in enumerate(plan["slots"]["steps"], 1):
        print(number, step["intent"], json.dumps(step["slots"], ensure_ascii=False))
    print(f"({source})", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
