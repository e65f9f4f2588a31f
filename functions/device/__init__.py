"""functions.device."""
