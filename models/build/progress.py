"""Progress of long work, as callers see it."""

from collections.abc import Callable

Report = Callable[[int, int, str], None]
"""`report(done, total, text)`, called often."""
