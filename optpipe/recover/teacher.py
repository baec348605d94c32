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

SAME = 1e-2
"""Relative error of an embedding that was rotated and rounded to 16 bits: bfloat16 has 2e-3."""


class Teacher:
    """The untouched model, one block at a time."""

    def __init__(self, checkpoint: Checkpoint, student: Checkpoint, ids_ST: Tensor) -> None:
        self._checkpoint, self._blocks = checkpoint, checkpoint.decoder.blocks
        self.lm = model.skeleton(checkpoint)
        self._flow = start(self.lm, self._blocks, ids_ST).to(fastest())
        self._ends = iter(ends(checkpoint, student))
        self._done = 0

    def advance(self) -> list[Tensor]:
        """Hidden states after what the next block of the student stands for, (1, T, H) a sample."""
        for index in range(self._done, end := next(self._ends)):
            name = self._blocks[index].name
            module = model.fill(self.lm, name, self._checkpoint, torch.float32).to(fastest())
            advance(module, self._flow, index)
            model.drop(self.lm, name)
        self._done = end
        return list(self._flow.hidden)


def ends(teacher: Checkpoint, student: Checkpoint) -> list[int]:
    """For each block of the student: how many blocks of the teacher it and those before stand for.

    A block that was dropped belongs to the one before it.
    """
    places = source_blocks(teacher.config)
    begins = [places.index(block) for block in source_blocks(student.config)]
    return [*begins[1:], len(places)]


def turn(teacher: Checkpoint, student: Checkpoint) -> Tensor | None:
    """The rotation of the teacher's hidden states to the student's, (H, H); None: they are alike.

    Found in the embeddings, which no stage but a rotation changes: the orthogonal Q for which
    E_teacher Q is nearest to E_student (Schoenemann 1966). Raises InputError if that is not near.
    """
    name = f"{teacher.decoder.embed}.weight"
    theirs, ours = teacher.tensor(name), student.tensor(name)
    if torch.equal(theirs, ours):
        return None
    theirs, ours = theirs.double(), ours.double()
    u, spectrum, v = torch.linalg.svd(theirs.T @ ours)
    rotation_HH: Tensor = u @ v
    error = float((theirs @ rotation_HH - ours).norm() / ours.norm())
    if error > SAME or spectrum[-1] < 1e-9 * spectrum[0]:  # fewer directions than hidden states
        raise InputError(
            "the embedding is not that of the untouched model, nor that in another basis that it "
            f"spans (relative error {error:.1e}), so that hidden states cannot be compared"
        )
    return rotation_HH.float()


def turned(hidden: Tensor, rotation_HH: Tensor | None) -> Tensor:
    """Hidden states (.., H) in the basis of the student."""
    return hidden if rotation_HH is None else hidden @ rotation_HH.to(hidden.device)
