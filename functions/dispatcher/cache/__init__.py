"""Answers given before, kept apart by tenant and for a bounded time."""
