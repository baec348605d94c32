"""What a channel is worth to the loss, to first order (LLM-Pruner, arXiv:2305.11627)."""

from __future__ import annotations

from torch import Tensor

from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import weight_of
from optpipe.sensitivity import Layers, backward
from optpipe.stage import Progress


def gradient_scores(
    checkpoint: Checkpoint, observation: Observation, progress: Progress
) -> dict[str, Tensor]:
    """sum_i |W_ij dL/dW_ij| for every input j of the wanted layers, float64 (C).

    L is the sum of the losses of all tokens; one block is in memory at a time.
    """
    scores: dict[str, Tensor] = {}
    blocks = backward(checkpoint, observation.ids_ST, observation.wanted, _ask, progress)
    for layers, _ in blocks:
        scores |= {name: _score(weight_of(layer)).cpu() for name, layer in layers.items()}
    return scores


def _ask(layers: Layers) -> None:
    for layer in layers.values():
        weight_of(layer).requires_grad_(True)


def _score(weight_RC: Tensor) -> Tensor:
    assert weight_RC.grad is not None
    return (weight_RC.detach() * weight_RC.grad).abs().double().sum(0)
