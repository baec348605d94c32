"""The compressed model learns what the untouched one says (Hinton et al. 2015, arXiv:1503.02531).

The loss of a token is KL(p_teacher || p_student) over the whole vocabulary, at a temperature if
asked for, plus a share of the squared error of the hidden states after every block (as in Minitron,
arXiv:2407.14679). Both whole models are in memory.

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
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import close_like_source, like_source
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.recover.teacher import ends, turn, turned
from optpipe.recover.train import Recover
from optpipe.recover.tune import Tuning
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
        student, teacher = Checkpoint(source.path), Checkpoint(original.path)
        layers, decoder = self.plan(model.layers(student)), student.decoder
        basis = turn(teacher, student) if self.hidden else None
        models = _ready(teacher), (lm := _ready(student))
        lesson = Lesson(*models, ends(teacher, student), basis, self)
        tuning = Tuning(lm, student, self.rank if self.mode == LORA else 0)
        for block in decoder.blocks:
            tuning.add_block(block)
        for name, _ in lm.get_submodule(decoder.final_norm).named_parameters(decoder.final_norm):
            tuning.add_tensor(name)
        ids_ST = self.calib.ids(student).to(fastest())
        judged = max(len(ids_ST) // 8, 1)
        before = lesson.divergence(ids_ST[:judged])

        def loss(chosen: list[int]) -> Tensor:
            return lesson.loss(ids_ST[judged:][chosen])

        shape = (len(ids_ST) - judged, ids_ST.shape[1])
        trained = self.train(tuning, loss, shape, lambda step, steps: progress("step", step, steps))
        after = lesson.divergence(ids_ST[:judged])
        if after >= before:
            log.warning("distillation raised the divergence from %.4f to %.4f", before, after)
        writer = Writer(out, student)
        torch.nn.Module.to(lm, "cpu")
        for block in decoder.blocks:
            writer.add(block.name, like_source(lm, block, student, layers))
        close_like_source(lm, student, writer, layers)
        facts = {"divergence_before": before, "divergence": after, "trained_tokens": trained}
        return {**facts, **self.calib.facts()}


@dataclass(frozen=True)
class Lesson:
    """What the student should say, and how far it is from that."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    ends: list[int]
    """For each block of the student: after how many blocks of the teacher its place is."""
    basis: Tensor | None
    """The rotation from the teacher's hidden states to the student's."""
    settings: Distill

    def loss(self, ids_BT: Tensor) -> Tensor:
        deep = self.settings.hidden > 0
        with torch.no_grad():
            wanted = self.teacher(ids_BT, use_cache=False, output_hidden_states=deep)
        said = self.student(ids_BT, use_cache=False, output_hidden_states=deep)
        loss = divergence(said.logits, wanted.logits, self.settings.temperature)
        if not deep:
            return loss
        # the last state of transformers is normed, and the logits speak for it
        places = enumerate(self.ends[:-1], 1)
        targets = ((i, turned(wanted.hidden_states[end], self.basis)) for i, end in places)
        errors = [_relative(said.hidden_states[i], target) for i, target in targets]
        return loss + self.settings.hidden * torch.stack(errors).mean()

    def divergence(self, ids_ST: Tensor) -> float:
        """KL(teacher || student) per token, nats, at temperature 1."""
        found = []
        for ids_T in ids_ST:
            said, wanted = (lm(ids_T[None], use_cache=False) for lm in (self.student, self.teacher))
            found.append(divergence(said.logits, wanted.logits).double())
        return float(torch.stack(found).mean())


def divergence(said: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 KL(p_wanted || p_said), mean over all positions of logits (..., V)."""
    ours, theirs = (
        functional.log_softmax(logits.flatten(0, -2).float() / temperature, -1)
        for logits in (said, wanted)
    )
    kl = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return kl * temperature**2


def _relative(ours: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(ours, target) / target.var()


def _ready(checkpoint: Checkpoint) -> PreTrainedModel:
    lm = model.load(checkpoint)
    torch.nn.Module.to(lm, fastest())
    return lm
