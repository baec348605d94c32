"""What the untouched model makes of the calibration text, and how far a student is from that.

Shapes: S samples, T tokens, B samples of a step, N tokens of a piece, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.flow import ending, logits
from optpipe.offload import CPU, Offloaded, tensors
from optpipe.recover.teacher import Teacher, turn, turned

LOGITS = 2**24
"""Of a piece; in float32 64 MiB, of which a divergence and its gradient take several."""


class Lesson:
    """What the teacher says was found block by block, once, and lies in files in ``folder``."""

    def __init__(
        self, original: Checkpoint, student: Checkpoint, ids_ST: Tensor, hidden: float, folder: Path
    ) -> None:
        """``hidden``: the weight of the error of hidden states; if 0, they are not kept."""
        basis = turn(original, student) if hidden else None
        teacher, self._decoder = Teacher(original, student, ids_ST), original.decoder
        self._hidden, self._last = hidden, len(student.decoder.blocks) - 1
        self._states: dict[int, tuple[list[Tensor], Offloaded]] = {}
        """(1, T, H) of every sample where a block of the student ends."""
        for index in range(self._last + 1):
            states = teacher.advance()
            if hidden and index < self._last:
                states = [turned(state, basis) for state in states]
            if hidden or index == self._last:
                states = [state.cpu() for state in states]
                self._states[index] = states, Offloaded(states, folder)
        if not original.head_is_embedding:
            model.drop(teacher.lm, self._decoder.embed)
        self._lm = teacher.lm
        self._ending = Offloaded(tensors(ending(self._lm, self._decoder)), folder)

    def errors(self, index: int, made_BTH: Tensor, chosen: list[int]) -> list[Tensor]:
        """The weighted error of hidden states after a block; none after the last one, for which
        the logits speak, and if none count."""
        if not self._hidden or index == self._last:
            return []
        wanted_BTH = self._wanted(index, chosen)
        error = functional.mse_loss(made_BTH, wanted_BTH) / wanted_BTH.var()
        return [self._hidden / self._last * error]

    def divergences(
        self,
        say: Callable[[Tensor], Tensor],
        pieces: tuple[Tensor, ...],
        chosen: list[int],
        temperature: float = 1.0,
    ) -> Iterator[Tensor]:
        """The divergence a token, in summands, one for each of the ``pieces`` (N, H) of what the
        last block made; ``say`` makes logits (N, V) of one."""
        theirs = split(self._wanted(self._last, chosen), self._decoder.vocab)
        total = sum(len(piece) for piece in pieces)
        with self._ending.on(fastest()):
            for piece, wanted in zip(pieces, theirs, strict=True):
                meant = logits(self._lm, self._decoder, wanted)
                yield divergence(say(piece), meant, temperature) * (len(piece) / total)

    def _wanted(self, index: int, chosen: list[int]) -> Tensor:
        states, file = self._states[index]
        with file.on(CPU):
            return torch.cat([states[sample] for sample in chosen]).to(fastest())


def split(states_BTH: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """Pieces (N, H) of hidden states, few enough for their logits."""
    return torch.split(states_BTH.flatten(0, 1), max(LOGITS // vocab, 1))


def divergence(said: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(p_wanted || p_said), mean over all positions of logits (..., V)."""
    ours, theirs = (
        functional.log_softmax(logits.flatten(0, -2).float() / temperature, -1)
        for logits in (said, wanted)
    )
    kl = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return kl * temperature**2
