"""The untouched model beside a compressed one that may have fewer blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.flow import advance, start
from optpipe.structure.resize import source_blocks


class Teacher:
    """The untouched model, one block at a time."""

    def __init__(self, checkpoint: Checkpoint, student: Checkpoint, ids_ST: Tensor) -> None:
        check_same_basis(checkpoint, student)
        self._checkpoint, self._blocks = checkpoint, checkpoint.decoder.blocks
        self._lm = model.skeleton(checkpoint)
        self._flow = start(self._lm, self._blocks, ids_ST).to(fastest())
        self._ends = iter(ends(checkpoint, student))
        self._done = 0

    def targets(self) -> list[Tensor]:
        """Hidden states after the next block of the student, or after the blocks it stands for."""
        for index in range(self._done, end := next(self._ends)):
            name = self._blocks[index].name
            module = model.fill(self._lm, name, self._checkpoint, torch.float32).to(fastest())
            advance(module, self._flow, index)
            model.drop(self._lm, name)
        self._done = end
        return list(self._flow.hidden)


def ends(teacher: Checkpoint, student: Checkpoint) -> list[int]:
    """For each block of the student: how many blocks of the teacher it and those before stand for.

    A block that was dropped belongs to the one before it.
    """
    places = source_blocks(teacher.config)
    begins = [places.index(block) for block in source_blocks(student.config)]
    return [*begins[1:], len(places)]


def check_same_basis(teacher: Checkpoint, student: Checkpoint) -> None:
    """Raise InputError if hidden states of the two cannot be compared, as after a rotation."""
    name = f"{teacher.decoder.embed}.weight"
    if not torch.equal(teacher.tensor(name), student.tensor(name)):
        raise InputError(
            "the embedding is not that of the untouched model any more, so that hidden states have "
            "another basis; recover before transform=rotate"
        )
