"""The compressed model learns what the untouched one says (Hinton et al. 2015, arXiv:1503.02531).

The loss of a token is KL(p_teacher || p_student) over the whole vocabulary, at a temperature if
asked for, plus a share of the squared error of the hidden states after every block (as in Minitron,
arXiv:2407.14679).

'full' trains all weights of the blocks and the last norm, 'lora' a factor of low rank beside every
dense weight instead (arXiv:2106.09685): W + mask * (B A). The mask is inside the product that is
trained, so that what is merged in the end is what was trained; the library peft knows no masks.
Quantized layers have their scales trained in both.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.checkpoint import Checkpoint
from optpipe.recover.lesson import Lesson
from optpipe.recover.student import Student
from optpipe.recover.train import Recover
from optpipe.stage import Progress

log = logging.getLogger(__name__)
FULL, LORA = "full", "lora"
MODES = (FULL, LORA)


@dataclass(frozen=True, kw_only=True)
class Distill(Recover):
    """The whole model is trained at once.

    An eighth of the samples only judges; a stage before that was calibrated on the same text has
    seen them, so that it looks better there than it is. A divergence that rose is therefore warned
    of and reported, but not undone: held-out text may say otherwise.
    """

    rate: float = 0.003
    mode: str = FULL
    """'full' or 'lora'."""
    rank: int = 16
    """Of the adapters of 'lora'."""
    temperature: float = 1.0
    """Of both distributions."""
    hidden: float = 0.0
    """Weight of the hidden states' error, relative to their variance, mean over the blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got '{self.mode}'")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature}")
        if not 0 <= self.hidden < float("inf"):
            raise ValueError(f"hidden must be at least 0 and finite, got {self.hidden}")
        if self.calib.samples < 2:
            raise ValueError("calib.samples must be at least 2, one of them to judge by")

    @torch.no_grad()
    def run_with(
        self, source: Artifact, original: Artifact, out: Path, progress: Progress
    ) -> Stats:
        checkpoint = Checkpoint(source.path)
        layers, ids_ST = self.plan(model.layers(checkpoint)), self.calib.ids(checkpoint)
        lesson = Lesson(Checkpoint(original.path), checkpoint, ids_ST, self.hidden, out)
        student = Student(checkpoint, ids_ST, self.rank if self.mode == LORA else 0, out)
        samples, tokens = ids_ST.shape
        judged = max(samples // 8, 1)
        before = student.judge(lesson, judged)

        def learn(chosen: list[int], rate: float) -> None:
            student.learn(lesson, [judged + i for i in chosen], rate, self.temperature)

        shape = samples - judged, tokens
        trained = self.train(learn, shape, lambda step, steps: progress("step", step, steps))
        student.settle()
        after = student.judge(lesson, judged)
        if after >= before:
            log.warning("distillation raised the divergence from %.4f to %.4f", before, after)
        student.write(out, layers)
        facts = {"divergence_before": before, "divergence": after, "trained_tokens": trained}
        return {**facts, **self.calib.facts()}
