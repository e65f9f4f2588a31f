"""models.artifact."""
