"""A model that is trained as a whole with one of its blocks in memory at a time.

Forward, only what each block is fed is kept; backward, a block is run once more (gradient
checkpointing, arXiv:1604.06174), and its gradients are used and forgotten before those of the block
before it are computed (arXiv:2306.09782). Weights and moments of Adam lie in files: 12 bytes for
each trained weight. On a GPU they travel in every step.

Shapes: B samples of a step, T tokens, N tokens of a piece, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.blockwise import close_like_source, like_source
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.family import Block
from optpipe.flow import advance, call, ending, logits, start
from optpipe.linear import Layers
from optpipe.offload import CPU, Offloaded, tensors
from optpipe.recover.lesson import Lesson, split
from optpipe.recover.tune import Tuning


class Part:
    """A block, or what makes logits behind the last one."""

    def __init__(self, module: nn.Module, tuning: Tuning, folder: Path) -> None:
        self.module, self.tuning = module, tuning
        moments = tuning.start()
        self.weights, self._moments = (Offloaded(t, folder) for t in (tensors(module), moments))

    def step(self, rate: float) -> None:
        with self._moments.on(fastest(), changed=True):
            self.tuning.step(rate)


class Student:
    """All weights of the blocks and the last norm; with a ``rank``, adapters instead."""

    def __init__(self, checkpoint: Checkpoint, ids_ST: Tensor, rank: int, folder: Path) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._lm = model.skeleton(checkpoint)
        decoder = checkpoint.decoder
        self._flow = start(self._lm, decoder.blocks, ids_ST).to(fastest())
        self._parts = [self._part(block, rank) for block in decoder.blocks]
        tuning, norm = Tuning(self._lm, checkpoint), self._lm.get_submodule(decoder.final_norm)
        for name, _ in norm.named_parameters(prefix=decoder.final_norm):
            tuning.add_tensor(name)
        self._ending = Part(ending(self._lm, decoder), tuning, folder)
        self._say = partial(logits, self._lm, decoder)

    def _part(self, block: Block, rank: int) -> Part:
        module = model.fill(self._lm, block.name, self._checkpoint, torch.float32)
        tuning = Tuning(self._lm, self._checkpoint, rank)
        tuning.add_block(block)
        return Part(module, tuning, self._folder)

    def learn(self, lesson: Lesson, chosen: list[int], rate: float, temperature: float) -> None:
        """A step of Adam, everywhere, on some of the samples."""
        states, device = [torch.cat([self._flow.hidden[sample] for sample in chosen])], fastest()
        for index, part in enumerate(self._parts):
            with part.weights.on(device):
                states.append(call(part.module, self._flow, index, states[-1]))
        slope_BTH = self._learn_ending(lesson, states.pop(), chosen, rate, temperature)
        for index, part in reversed([*enumerate(self._parts)]):
            with part.weights.on(device, changed=True):
                fed_BTH = states.pop().requires_grad_()
                with torch.enable_grad():
                    made_BTH = call(part.module, self._flow, index, fed_BTH)
                    errors = lesson.errors(index, made_BTH, chosen)
                torch.autograd.backward([made_BTH, *errors], [slope_BTH, *[None] * len(errors)])
                assert fed_BTH.grad is not None
                slope_BTH = fed_BTH.grad
                part.step(rate)

    def _learn_ending(
        self, lesson: Lesson, last_BTH: Tensor, chosen: list[int], rate: float, temperature: float
    ) -> Tensor:
        """A step of the last norm; the gradient of the divergence behind the last block."""
        pieces = split(last_BTH, self._checkpoint.decoder.vocab)
        for piece in pieces:
            piece.requires_grad_()
        with self._ending.weights.on(fastest(), changed=True):
            with torch.enable_grad():
                for summand in lesson.divergences(self._say, pieces, chosen, temperature):
                    summand.backward()
            self._ending.step(rate)
        slopes = [piece.grad for piece in pieces if piece.grad is not None]
        return torch.cat(slopes).view_as(last_BTH)

    def judge(self, lesson: Lesson, samples: int) -> float:
        """KL(teacher || student) a token of the first samples, nats, at temperature 1."""
        flow, device = replace(self._flow, hidden=self._flow.hidden[:samples]), fastest()
        for index, part in enumerate(self._parts):
            with part.weights.on(device):
                advance(part.module, flow, index)
        pieces = split(torch.cat(flow.hidden), self._checkpoint.decoder.vocab)
        with self._ending.weights.on(device):
            found = lesson.divergences(self._say, pieces, [*range(samples)])
            return sum(float(summand.double()) for summand in found)

    def settle(self) -> None:
        """Merge adapters and round to what is stored; the end of training."""
        for part in (*self._parts, self._ending):
            with part.weights.on(CPU, changed=True):
                part.tuning.settle()

    def write(self, out: Path, layers: Layers) -> None:
        writer = Writer(out, self._checkpoint)
        for block, part in zip(self._checkpoint.decoder.blocks, self._parts, strict=True):
            with part.weights.on(CPU):
                writer.add(block.name, like_source(self._lm, block, self._checkpoint, layers))
        close_like_source(self._lm, self._checkpoint, writer, layers)
