"""`edgecascade rules …`: what the dispatcher says without a model, tried beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Check what the dispatcher says without a model.", no_args_is_help=True)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="A rule file, or a file of canned messages.")],
    messages: Annotated[bool, typer.Option("--messages", help="It is one of canned messages.")] = False,
) -> None:
    """Check a file as the dispatcher does at its start: one sentence and status 1 if anything is wrong with it.

    Examples: edgecascade rules check examples/drone/rules.toml
              edgecascade rules check functions/dispatcher/canned.toml --messages
    """
    from functions.dispatcher.canned import read_messages
    from functions.dispatcher.rules import read_rules

    if messages:
        found = read_messages(file)
        languages = ", ".join(found.by_language)
        typer.echo(f"{file}: {languages}; {found.default_language} where the caller names none of them")
        return
    rules = read_rules(file).rules
    typer.echo(f"{file}: {len(rules)} rules, {sum(len(rule.patterns) for rule in rules)} patterns, none ambiguous")


@app.command("try")
def try_out(
    file: Annotated[Path, typer.Argument(help="A rule file.")],
    text: Annotated[str, typer.Argument(help="What somebody says.")],
) -> None:
    """Say what the rules understand, as JSON; status 1 if that is nothing.

    Example: edgecascade rules try examples/drone/rules.toml "take off to 20 metres, then land"
    """
    from functions.dispatcher.rules import read_rules

    plan = read_rules(file).plan(text)
    if plan is None:
        typer.echo("edgecascade: the rules understand nothing of it, or not all of it", err=True)
        raise SystemExit(1)
    typer.echo(json.dumps(plan.frame, ensure_ascii=False))
