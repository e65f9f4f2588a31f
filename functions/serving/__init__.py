"""functions.serving."""
