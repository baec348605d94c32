"""Each block is trained to give what the untouched block gives (arXiv:2510.14444; in BRECQ,
arXiv:2102.05426, for quantization).

The student is fed what the blocks before it, already recovered, give; the target is what the
untouched model has at that place, so that a block also makes up for the errors before it. Where
blocks were dropped, the one before them learns what they did. Adam on the mean squared error, one
block of either model in memory. A block whose error on the calibration text did not become smaller,
weights rounded to what is stored, stays as it was.

Shapes: S samples, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import close_like_source, like_source
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.flow import Flow, advance, call, start
from optpipe.recover.teacher import Teacher, turn, turned
from optpipe.recover.train import Recover
from optpipe.recover.tune import Tuning
from optpipe.stage import Progress


@dataclass(frozen=True, kw_only=True)
class Blockwise(Recover):
    """Every block is trained on the whole budget of tokens."""

    @torch.no_grad()
    def run_with(
        self, source: Artifact, original: Artifact, out: Path, progress: Progress
    ) -> Stats:
        student, device = Checkpoint(source.path), fastest()
        layers, blocks = self.plan(model.layers(student)), student.decoder.blocks
        ids_ST = self.calib.ids(student)
        untouched = Checkpoint(original.path)
        teacher, basis = Teacher(untouched, student, ids_ST), turn(untouched, student)
        writer, lm = Writer(out, student), model.skeleton(student)
        flow = start(lm, blocks, ids_ST).to(device)
        errors = []
        for index, block in enumerate(blocks):
            module = model.fill(lm, block.name, student, torch.float32).to(device)
            tuning = Tuning(lm, student)
            tuning.add_block(block)
            targets = [turned(hidden, basis) for hidden in teacher.advance()]
            task = Task(module, flow, index, targets)

            def report(step: int, steps: int, name: str = block.name, done: int = index) -> None:
                progress(name, done * steps + step, len(blocks) * steps)

            errors.append(self._reconstruct(task, tuning, report))
            advance(module, flow, index)
            module.to("cpu")
            writer.add(block.name, like_source(lm, block, student, layers))
            model.drop(lm, block.name)
        close_like_source(lm, student, writer, layers)
        before, after = zip(*errors, strict=True)
        budget = {"trained_tokens": self.steps(ids_ST.shape[1]) * self.batch * ids_ST.shape[1]}
        errors_of = {"block_error_before": list(before), "block_error": list(after)}
        return {**errors_of, **budget, **self.calib.facts()}

    def _reconstruct(
        self, task: Task, tuning: Tuning, report: Callable[[int, int], None]
    ) -> tuple[float, float]:
        """Train one block; its error before and after."""
        state, before = tuning.state(), task.error()
        tuning.start()

        def learn(chosen: list[int], rate: float) -> None:
            with torch.enable_grad():
                task.loss(chosen).backward()
            tuning.step(rate)

        self.train(learn, (len(task.targets), task.targets[0].shape[1]), report)
        tuning.settle()
        if (after := task.error()) < before:
            return before, after
        tuning.restore(state)
        return before, before


@dataclass(frozen=True)
class Task:
    """What a block is fed, and what it should make of it."""

    module: nn.Module
    flow: Flow
    index: int
    targets: list[Tensor]
    """(1, T, H) of every sample."""

    def loss(self, chosen: list[int]) -> Tensor:
        """Mean squared error over some samples."""
        fed = torch.cat([self.flow.hidden[sample] for sample in chosen])
        wanted = torch.cat([self.targets[sample] for sample in chosen])
        return functional.mse_loss(call(self.module, self.flow, self.index, fed), wanted)

    def error(self) -> float:
        """Squared error over all samples, relative to what the targets differ from their mean."""
        wrong = sum(float(self.loss([sample]).double()) for sample in range(len(self.targets)))
        spread = sum(float(target.double().var(correction=0)) for target in self.targets)
        return wrong / spread
