"""Where compression computes: a GPU if there is one, the CPU otherwise."""

from __future__ import annotations

import torch


def fastest() -> torch.device:
    """The device for the block at work; all else of a model stays in the memory of the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
