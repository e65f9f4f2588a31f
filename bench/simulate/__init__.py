"""Fleets, queues and autoscalers as discrete events; the capacity and routing code is the real one."""
