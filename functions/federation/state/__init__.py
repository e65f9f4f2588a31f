"""What the nodes of a federation share: an append-only log that all read in one order."""
