"""Statistics: estimates, intervals, when to stop, verdicts."""
