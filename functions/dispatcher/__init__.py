"""functions.dispatcher."""
