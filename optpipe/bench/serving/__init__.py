"""Requests that arrive by themselves: open-loop load, queues, traces."""
