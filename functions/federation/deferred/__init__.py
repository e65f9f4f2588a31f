"""Store and forward: questions that wait for the edge."""
