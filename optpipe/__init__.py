"""optpipe: optimize an LLM stage by stage, then measure every artifact against the baseline."""

__version__ = "0.1.0"
