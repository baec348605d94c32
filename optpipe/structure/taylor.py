"""What a channel is worth to the loss, to first order (LLM-Pruner, arXiv:2305.11627)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.calibrate import Observation
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.linear import weight_of
from optpipe.stage import Progress


def gradient_scores(
    checkpoint: Checkpoint, observation: Observation, progress: Progress
) -> dict[str, Tensor]:
    """sum_i |W_ij dL/dW_ij| for every input j of the wanted layers, float64 (C).

    L is the sum of the losses of all samples. The whole model is in memory.
    """
    device = fastest()
    lm = model.load(checkpoint)
    nn.Module.to(lm, device)
    weights = {name: weight_of(lm.get_submodule(name)) for name in sorted(observation.wanted)}
    for weight_RC in weights.values():
        weight_RC.requires_grad_(True)
    with torch.enable_grad():
        for sample, ids_T in enumerate(observation.ids_ST.to(device)):
            progress("gradients", sample, len(observation.ids_ST))
            lm(ids_T[None], labels=ids_T[None]).loss.backward()
    return {name: _score(weight_RC).cpu() for name, weight_RC in weights.items()}


def _score(weight_RC: Tensor) -> Tensor:
    assert weight_RC.grad is not None
    return (weight_RC.detach() * weight_RC.grad).abs().double().sum(0)
