"""Structured pruning: smaller dense models that every runtime takes as they are."""
