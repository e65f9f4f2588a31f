"""Which node runs which layers: an exact or a bounded search, and when it pays to plan again. Pure but for `apply`."""
