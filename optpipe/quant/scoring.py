"""What modelopt's auto_quantize runs: a whole model, one decoder block after another.

It takes a model and functions that send text through it, and never asks how they do that. Ours keep
only what blocks are fed, and run each block once more on the way back, as gradient checkpointing
(arXiv:1604.06174) does. On a CPU the weights of a block are in memory only while it runs; on a GPU
all weights are: modelopt's quantizers compute where they were calibrated, and the weights are
calibrated outside of these functions.

Shapes: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.flow import Flow, call, logits, start
from optpipe.offload import CPU, Offloaded, tensors


class Scored:
    """A model for modelopt to put quantizers into. On a CPU its blocks lie in ``folder``."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self._decoder, self._device = checkpoint.decoder, fastest()
        self.lm = model.skeleton(checkpoint)
        self._files: list[Offloaded] = []
        for block in self._decoder.blocks:
            module = model.fill(self.lm, block.name, checkpoint, torch.float32).to(self._device)
            if self._device == CPU:
                self._files.append(Offloaded(tensors(module), folder))
        nn.Module.to(self.lm, self._device)

    def logits(self, _: nn.Module, ids_1T: Tensor) -> Tensor:
        """(1, T, V)."""
        with torch.inference_mode(False), torch.no_grad():
            return logits(self.lm, self._decoder, self._forward(ids_1T)[1][-1])

    def score(self, _: nn.Module, ids_1T: Tensor) -> None:
        """The loss of predicting each token, and back; no weight gets a gradient."""
        # modelopt asks for that of the embedding, and for transformers' own checkpointing
        self.lm.eval().requires_grad_(False)
        with torch.no_grad():
            flow, fed = self._forward(ids_1T)
        slope_1TH = self._slope(fed.pop(), ids_1T)
        for index, block in reversed([*enumerate(self._decoder.blocks)]):
            module, fed_1TH = self.lm.get_submodule(block.name), fed.pop().requires_grad_()
            with self._turn(index):
                call(module, flow, index, fed_1TH).backward(slope_1TH)
            assert fed_1TH.grad is not None
            slope_1TH = fed_1TH.grad
            for layer in module.modules():  # its changes by format, that modelopt would keep
                layer.__dict__.pop("output_diff_dict", None)

    def _slope(self, last_1TH: Tensor, ids_1T: Tensor) -> Tensor:
        last_1TH.requires_grad_()
        said_TV = logits(self.lm, self._decoder, last_1TH)[0, :-1]
        functional.cross_entropy(said_TV, ids_1T[0, 1:]).backward()
        assert last_1TH.grad is not None
        return last_1TH.grad

    def _forward(self, ids_1T: Tensor) -> tuple[Flow, list[Tensor]]:
        """What each block is fed, and behind the last what it makes."""
        flow = start(self.lm, self._decoder.blocks, ids_1T)
        fed = flow.hidden
        for index, block in enumerate(self._decoder.blocks):
            with self._turn(index):
                fed.append(call(self.lm.get_submodule(block.name), flow, index, fed[-1]))
        return flow, fed

    def _turn(self, index: int) -> AbstractContextManager[None]:
        return self._files[index].on(CPU) if self._files else nullcontext()


def check_fits(checkpoint: Checkpoint) -> None:
    """Raise InputError if there is a GPU whose free memory is less than the weights in float32."""
    if fastest() == CPU:
        return
    free = torch.cuda.mem_get_info()[0]
    shapes = model.parameter_shapes(checkpoint).values()
    needed = 4 * sum(torch.Size(shape).numel() for shape in shapes)
    if needed > free:
        raise InputError(
            f"auto_quantize needs {needed / 1e9:.1f} GB of GPU memory for all weights in float32, "
            f"and {free / 1e9:.1f} GB are free; set CUDA_VISIBLE_DEVICES= to search on the CPU, "
            "where it needs one block"
        )
