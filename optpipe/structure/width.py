"""Narrower blocks: FFN channels and groups of attention heads go, as many in every block.

A channel is an input of the block's last product. FLAP's score for it is Var(x_j) ||W_:,j||^2 (An
et al. 2023, arXiv:2312.11983): what its fluctuation adds to the output, since its mean can be made
up for. The score of a group, a key-value head with the query heads that share it, is the sum over
its inputs of the attention's output projection. 'taylor' is sum_i |W_ij dL/dW_ij| instead
(LLM-Pruner, arXiv:2305.11627), L the loss on the calibration text.

What stays makes up for what goes. With compensation 'bias', FLAP's, the bias grows by W_P E[x_P].
With 'weights', the least-squares answer without a bias, W_K grows by W_P M_PK (M_KK)^-1, where
M = E[x x^T] (as in ZipLM, arXiv:2302.04089).

Shapes: R outputs and C inputs of a layer, K inputs kept, P inputs pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import close_like_source, like_source
from optpipe.calibrate import Calib, Gram
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.device import fastest
from optpipe.family import Block, Decoder, describe
from optpipe.flow import advance, observe, start
from optpipe.linear import Layers, dense
from optpipe.prune.mask import all_but_lowest
from optpipe.stage import Progress, Stage
from optpipe.structure.resize import fewest_groups, narrowed, parameters
from optpipe.structure.taylor import gradient_scores

FLAP, TAYLOR = "flap", "taylor"
SCORES = (FLAP, TAYLOR)
WEIGHTS, BIAS, NONE = "weights", "bias", "none"
COMPENSATIONS = (WEIGHTS, BIAS, NONE)


class Moments(Gram):
    """Mean and second moments of a layer's inputs."""

    def __init__(self, inputs: int) -> None:
        super().__init__(inputs)
        self._sum_C = torch.zeros(inputs, dtype=torch.float64)

    def add(self, x_NC: Tensor) -> None:
        super().add(x_NC)
        self._sum_C = self._sum_C.to(x_NC.device) + x_NC.double().sum(0)

    @property
    def mean_C(self) -> Tensor:
        return self._sum_C / self.count

    @property
    def variance_C(self) -> Tensor:
        return (self.mean_CC.diagonal() - self.mean_C.square()).clamp(min=0)


def flap_score(weight_RC: Tensor, moments: Moments) -> Tensor:
    """Var(x_j) ||W_:,j||^2, float64 (C)."""
    return moments.variance_C * weight_RC.double().square().sum(0)


def kept_inputs(score_C: Tensor, size: int, count: int) -> Tensor:
    """Indices (K) of the ``count`` groups of ``size`` neighbours with the highest sums."""
    groups = score_C.reshape(-1, size)
    mask = all_but_lowest(groups.sum(1), len(groups) - count)
    return mask.repeat_interleave(size).nonzero().flatten()


def compensated(
    layer: nn.Linear, keep_K: Tensor, moments: Moments, how: str, damp: float = 0.0
) -> nn.Linear:
    """The layer on the inputs ``keep_K`` alone, the others made up for; see the top of the file.

    ``damp`` is added to the diagonal of M_KK, in units of its mean.
    """
    weight_RC: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    gone = torch.ones(weight_RC.shape[1], dtype=torch.bool, device=weight_RC.device)
    gone[keep_K] = False
    kept_RK: Tensor = weight_RC[:, keep_K]
    gone_RP = weight_RC[:, gone].double()
    if how == BIAS:
        shift_R = (gone_RP @ moments.mean_C[gone]).to(weight_RC.dtype)
        bias = shift_R if bias is None else bias + shift_R
    if how == WEIGHTS:
        within_KK = moments.mean_CC[keep_K][:, keep_K]
        within_KK.diagonal().add_(max(damp * float(within_KK.diagonal().mean()), TINY))
        across_KP = moments.mean_CC[keep_K][:, gone]
        answer_KP = torch.cholesky_solve(across_KP, torch.linalg.cholesky(within_KK))
        kept_RK = (kept_RK.double() + gone_RP @ answer_KP.T).to(weight_RC.dtype)
    return dense(kept_RK.contiguous(), bias)


TINY = 1e-30
"""Inputs that are all zero have a factor too."""


@dataclass(frozen=True)
class Cut:
    """What goes from each block, in whole numbers."""

    decoder: Decoder
    channels: int
    """FFN channels that stay."""
    groups: int
    """Key-value heads that stay."""

    @property
    def group_inputs(self) -> int:
        """Inputs of the attention's output projection that one group makes."""
        return self.decoder.heads // self.decoder.kv_heads * self.decoder.head_dim

    def sizes(self, block: Block) -> dict[str, tuple[int, int]]:
        """For each layer that loses inputs: size of a group, groups that stay."""
        found = {}
        if self.groups != self.decoder.kv_heads:
            found[block.attn_out] = (self.group_inputs, self.groups)
        if self.channels != self.decoder.intermediate:
            found[block.mlp_out] = (1, self.channels)
        return found

    def rows(self, block: Block, out: str, keep_K: Tensor) -> dict[str, Tensor]:
        """The outputs that stay of the layers which make the inputs ``keep_K`` of ``out``."""
        if out == block.mlp_out:
            fused = self.decoder.gated and len(block.mlp_in) == 1
            rows = torch.cat([keep_K, keep_K + self.decoder.intermediate]) if fused else keep_K
            return dict.fromkeys(block.mlp_in, rows)
        heads, kv_heads, size = self.decoder.heads, self.decoder.kv_heads, self.decoder.head_dim
        groups = (keep_K[:: self.group_inputs] // self.group_inputs)[:, None]
        keys = (groups * size + torch.arange(size, device=groups.device)).flatten()
        if len(block.qkv) == 1:
            values = keys + (heads + kv_heads) * size
            return {block.qkv[0]: torch.cat([keep_K, keys + heads * size, values])}
        return dict(zip(block.qkv, (keep_K, keys, keys), strict=True))


@dataclass(frozen=True, kw_only=True)
class Width(Stage):
    """Every block keeps as many channels and heads: a Hugging Face config has one size for all."""

    rewrites: ClassVar[bool] = True

    mlp: float = 0.2
    """Share of the FFN channels that may go, 0 to 1."""
    heads: float = 0.2
    """Share of the key-value heads that may go, each with its query heads, 0 to 1; rounded down.
    Llama and Gemma keep so many that the hidden size is a multiple of the query heads: of 8
    key-value heads, with 32 query heads in 4096, 4 go, or none at 0.2."""
    multiple: int = 128
    """The channels that stay are rounded up to a multiple of this: later grids want whole groups,
    matrix units whole tiles."""
    score: str = FLAP
    """'flap', or 'taylor', for which the hidden states between all blocks are in memory at once."""
    compensation: str = WEIGHTS
    """'weights', 'bias' (where the family has one) or 'none'."""
    damp: float = 0.01
    """Added to the diagonal of M, in units of its mean; steadies small calibration sets."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        for name in ("mlp", "heads"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {share}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {self.multiple}")
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {SCORES}, got '{self.score}'")
        if self.compensation not in COMPENSATIONS:
            raise ValueError(
                f"compensation must be one of {COMPENSATIONS}, got '{self.compensation}'"
            )
        if not 0 < self.damp < float("inf"):
            raise ValueError(f"damp must be above 0 and finite, got {self.damp}")

    def plan(self, layers: Layers) -> Layers:
        order.check("structure", layers)
        return layers

    def resize(self, config: Any) -> Any:
        cut = self.cut(describe(config))
        return narrowed(config, cut.channels, cut.groups, self.compensation == BIAS)

    def cut(self, decoder: Decoder) -> Cut:
        """Raises ValueError if nothing would go."""
        channels = _kept(decoder.intermediate, self.mlp, self.multiple)
        groups = fewest_groups(decoder, _kept(decoder.kv_heads, self.heads, 1))
        if (channels, groups) == (decoder.intermediate, decoder.kv_heads):
            raise ValueError(
                f"mlp={self.mlp} of {decoder.intermediate} channels, rounded to a multiple of "
                f"{self.multiple}, and heads={self.heads} of {decoder.kv_heads} leave everything "
                "as it is; raise one of them or lower multiple"
            )
        return Cut(decoder, channels, groups)

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    @torch.no_grad()
    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint, device = Checkpoint(source.path), fastest()
        self.plan(model.layers(checkpoint))
        blocks, cut = checkpoint.decoder.blocks, self.cut(checkpoint.decoder)
        config = self.resize(checkpoint.config)
        layers = model.layers(checkpoint.planned(config))
        wanted = frozenset(name for block in blocks for name in cut.sizes(block))
        observation = self.calib.observe(checkpoint, wanted, Moments)
        given = gradient_scores(checkpoint, observation, progress) if self.score == TAYLOR else {}
        writer, lm = Writer(out, checkpoint), model.skeleton(checkpoint)
        smaller = model.empty(config).eval()
        flow = start(lm, blocks, observation.ids_ST).to(device)
        for index, block in enumerate(blocks):
            progress(block.name, index, len(blocks))
            model.fill(lm, block.name, checkpoint, torch.float32).to(device)
            for name, moments in observe(lm, block, index, flow, observation).items():
                assert isinstance(moments, Moments)
                self._narrow(lm, cut, block, (name, moments, given.get(name)))
            module = model.transplant(lm, smaller, block.name)  # some count heads by the config
            advance(module, flow, index)
            module.to("cpu")
            writer.add(block.name, like_source(lm, block, checkpoint, layers))
            model.drop(lm, block.name)
            model.drop(smaller, block.name)
        close_like_source(lm, checkpoint, writer, layers)
        config.save_pretrained(out)
        return _sizes(checkpoint.config, config) | observation.facts

    def _narrow(
        self, lm: PreTrainedModel, cut: Cut, block: Block, out: tuple[str, Moments, Tensor | None]
    ) -> None:
        """Cut the inputs of one layer, and the layers that make them."""
        name, moments, score_C = out
        layer, (size, count) = lm.get_submodule(name), cut.sizes(block)[name]
        assert isinstance(layer, nn.Linear)
        score_C = flap_score(layer.weight, moments) if score_C is None else score_C
        keep_K = kept_inputs(score_C, size, count).to(layer.weight.device)
        lm.set_submodule(name, compensated(layer, keep_K, moments, self.compensation, self.damp))
        self._cut_rows(lm, cut.rows(block, name, keep_K))

    def _cut_rows(self, lm: PreTrainedModel, rows: dict[str, Tensor]) -> None:
        for name, keep in rows.items():
            layer = lm.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            bias = layer.bias
            if self.compensation == BIAS and bias is None:  # the config knows them all or none
                bias = torch.zeros(len(layer.weight), device=keep.device)
            lm.set_submodule(
                name, dense(layer.weight[keep].contiguous(), None if bias is None else bias[keep])
            )


def _kept(total: int, share: float, multiple: int) -> int:
    """What stays of ``total``: at least 1 - share, a multiple unless that is more than all."""
    least = max(total - int(share * total + 1e-9), 1)
    return min(-(-least // multiple) * multiple, total)


def _sizes(before: Any, after: Any) -> Stats:
    """What a report says of two configs."""
    decoder = describe(after)
    return {
        "intermediate": decoder.intermediate,
        "kv_heads": decoder.kv_heads,
        "parameters": parameters(after),
        "parameters_before": parameters(before),
    }
