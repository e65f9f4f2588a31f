"""functions.edge."""
