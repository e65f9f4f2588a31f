"""models.runtime."""
