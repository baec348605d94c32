"""Fewer blocks: the ones that the model misses least go.

'influence' drops those that change the hidden state least, all at once: block influence is
1 - E[cos(x_in, x_out)] over the tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853). 'greedy'
drops, one after the other, the block without which the loss of what is left grows least (SLEB,
Song et al. 2024, arXiv:2402.09025).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.flow import advance, call, next_token_loss, start
from optpipe.linear import Layers
from optpipe.stage import Progress, Stage
from optpipe.structure.resize import parameters, shortened, source_blocks

GREEDY, INFLUENCE = "greedy", "influence"
SCORES = (GREEDY, INFLUENCE)


@dataclass(frozen=True, kw_only=True)
class Depth(Stage):
    """One block is in memory at a time; 'greedy' keeps the hidden states of as many models as there
    are blocks to choose from, so give it few samples of a large model."""

    rewrites: ClassVar[bool] = True

    share: float = 0.25
    """Share of the blocks to drop, above 0 and below 1; their number is rounded down."""
    score: str = GREEDY
    """'greedy' or 'influence'."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {self.share}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got '{self.score}'")

    def plan(self, layers: Layers) -> Layers:
        order.check("structure", layers)
        return layers

    def resize(self, config: Any) -> Any:
        """Which blocks stay is found out later; they are all of one shape."""
        count = config.num_hidden_layers
        return shortened(config, list(range(count - self.dropped(count))))

    def dropped(self, blocks: int) -> int:
        """How many of them go. Raises ValueError if none does."""
        if (count := int(self.share * blocks + 1e-9)) < 1:
            raise ValueError(f"share={self.share} of {blocks} blocks is less than one; raise it")
        return count

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    @torch.no_grad()
    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.plan(model.layers(checkpoint))
        count = self.dropped(len(checkpoint.decoder.blocks))
        choose = _by_loss if self.score == GREEDY else _by_influence
        kept, facts = choose(checkpoint, self.calib.ids(checkpoint), count, progress)
        config = shortened(checkpoint.config, kept)
        _write(checkpoint, out, kept, config)
        return {
            "kept_blocks": source_blocks(config),
            **facts,
            "parameters": parameters(config),
            "parameters_before": parameters(checkpoint.config),
            **self.calib.facts(),
        }


def _by_influence(
    checkpoint: Checkpoint, ids_ST: Tensor, count: int, progress: Progress
) -> tuple[list[int], Stats]:
    found = influences(checkpoint, ids_ST, progress)
    gone = sorted(range(len(found)), key=found.__getitem__)[:count]
    return [i for i in range(len(found)) if i not in gone], {"block_influence": found}


def _by_loss(
    checkpoint: Checkpoint, ids_ST: Tensor, count: int, progress: Progress
) -> tuple[list[int], Stats]:
    kept, losses = list(range(len(checkpoint.decoder.blocks))), []
    for step in range(count):
        found = losses_without(
            checkpoint,
            kept,
            ids_ST,
            lambda what, n, of: progress(what, n + step * of, count * of),  # noqa: B023
        )
        gone = min(found, key=found.__getitem__)
        losses.append(found[gone])
        kept.remove(gone)
    return kept, {"calib_loss": losses}


@torch.no_grad()
def influences(checkpoint: Checkpoint, ids_ST: Tensor, progress: Progress) -> list[float]:
    """1 - E[cos(x_in, x_out)] of every block, 0 to 2."""
    device, blocks = fastest(), checkpoint.decoder.blocks
    lm = model.skeleton(checkpoint)
    flow = start(lm, blocks, ids_ST).to(device)
    found = []
    for index, block in enumerate(blocks):
        progress(block.name, index, len(blocks))
        module = model.fill(lm, block.name, checkpoint, torch.float32).to(device)
        before = list(flow.hidden)
        advance(module, flow, index)
        model.drop(lm, block.name)
        pairs = zip(before, flow.hidden, strict=True)
        cosines = [
            functional.cosine_similarity(a.double(), b.double(), -1).mean() for a, b in pairs
        ]
        found.append(1 - float(torch.stack(cosines).mean()))
    return found


@torch.no_grad()
def losses_without(
    checkpoint: Checkpoint, kept: list[int], ids_ST: Tensor, progress: Progress
) -> dict[int, float]:
    """For each block of ``kept``: the loss per token, in nats, of the model of all the others.

    One pass over the blocks for all of them: each model skips its block and shares what is before.
    """
    device, blocks = fastest(), checkpoint.decoder.blocks
    lm = model.skeleton(checkpoint)
    flow = start(lm, blocks, ids_ST).to(device)
    without: dict[int, list[Tensor]] = {}
    for done, index in enumerate(kept):
        progress(blocks[index].name, done, len(kept))
        module = model.fill(lm, blocks[index].name, checkpoint, torch.float32).to(device)
        for states in without.values():
            states[:] = [call(module, flow, index, hidden) for hidden in states]
        without[index] = list(flow.hidden)
        advance(module, flow, index)
        model.drop(lm, blocks[index].name)
    return {i: next_token_loss(lm, checkpoint.decoder, h, ids_ST) for i, h in without.items()}


def _write(checkpoint: Checkpoint, out: Path, kept: list[int], config: Any) -> None:
    """Copy what stays; block i of the new model is block ``kept[i]`` of the old one."""
    blocks, writer = checkpoint.decoder.blocks, Writer(out, checkpoint)
    names = model.parameter_shapes(checkpoint)
    for new, old in enumerate(kept):
        before, after = (f"{blocks[index].name}." for index in (old, new))
        own = [name for name in names if name.startswith(before)]
        tensors = {after + n.removeprefix(before): checkpoint.tensor(n) for n in own}
        writer.add(blocks[new].name, tensors)
    elsewhere = tuple(f"{block.name}." for block in blocks)
    rest = [name for name in names if not name.startswith(elsewhere)]
    writer.add("rest", {name: checkpoint.tensor(name) for name in rest})
    writer.seal()
    config.save_pretrained(out)
