"""functions.federation."""
