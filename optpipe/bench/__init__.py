"""Measures every artifact of a run against the baseline: speed, memory, quality, one report."""
