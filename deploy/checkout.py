"""Where deployers begin: a checkout with its stack.yml, and an environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line holds one before it knows what is wanted of it
    from deploy.local.bundle import Settings
    from deploy.local.plan import Site
    from deploy.stack import Stack


@dataclass(frozen=True)
class Checkout:
    """The folder that holds stack.yml, and the variables that it takes."""

    root: Path
    environment: Mapping[str, str]

    def stack(self, only: tuple[str, ...] = (), site: str = "", variables: Mapping[str, str] | None = None) -> Stack:
        """The functions of stack.yml, or those of one site, or the named ones; raises `StackError`."""
        from deploy.stack import load

        stack = load(self.root / "stack.yml", {**self.environment, **(variables or {})})
        return (stack.site(site) if site else stack).only(only)

    def site(self, secrets: Path | None = None) -> Site:
        """This machine's folders."""
        from deploy.local.bundle import site

        return site(self.root, self.environment, secrets)

    def settings(self, port: int = 0, secrets: Path | None = None) -> Settings:
        """How the bundle is run here, its gateway on `port`; 0: a free one."""
        from deploy.local.bundle import Settings

        return Settings(self.site(secrets), port)
