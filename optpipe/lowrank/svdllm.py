"""SVD-LLM: truncated SVD in the metric of the inputs (arXiv:2403.07378, algorithm 1).

The error that counts is that of the output, tr((W - W') H (W - W')^T) with H = X^T X / N. With a
whitening S, S S^T = H, it is the Frobenius norm of (W - W') S, which the truncated SVD of W S
minimizes: what is lost is the sum of the discarded squared singular values. S comes from the
eigenvectors of H (as in SVD-LLM v2, arXiv:2503.12340), which needs no damping when H is singular.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from optpipe.allocate import Option, allocate
from optpipe.blockwise import select
from optpipe.calibrate import Calib, Cross, Gram, Observation
from optpipe.checkpoint import Checkpoint
from optpipe.linear import Form, Layers, weight_of
from optpipe.lowrank.factorize import Factorize, truncated
from optpipe.sensitivity import felt
from optpipe.stage import Progress

UNIFORM, ALLOCATOR = "uniform", "allocator"
ALLOCATIONS = (UNIFORM, ALLOCATOR)

FELT_TOKENS = 16_384
"""Of the calibration, that tell how much the loss feels of each layer: their hidden states between
all blocks are in memory at once."""

WORTH = 0.8
"""Share of a layer's parameters up to which two products may take its place. On one core they took
0.7 to 0.9 of its time at 0.8 and 0.8 to 1.2 at 0.9; tests/lowrank/products.py asks a GPU."""

NEGLIGIBLE = 1e-12
"""Directions whose share of the largest eigenvalue is below this carry no input."""


def whitened(weight_RC: Tensor, gram_CC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (R, K) and (K, C) that lose the least output for inputs of this Gram matrix.

    All in float64. Where inputs never go, the factors are zero.
    """
    eigenvalues, vectors = torch.linalg.eigh(gram_CC)
    live = eigenvalues > NEGLIGIBLE * eigenvalues[-1]
    scale = eigenvalues[live].sqrt()
    left, right = truncated(weight_RC @ vectors[:, live] * scale, rank)
    missing = rank - right.shape[0]
    if missing > 0:  # fewer live directions than ranks: nothing is lost, the rest stays empty
        left = torch.nn.functional.pad(left, (0, missing))
        right = torch.nn.functional.pad(right, (0, 0, 0, missing))
    return left, (right / scale) @ vectors[:, live].T


def discarded(weight_RC: Tensor, gram_CC: Tensor, felt_RR: Tensor) -> Tensor:
    """What ``whitened`` loses at rank 0, 1, ... up to all, in the metric G of the outputs.

    With W S = U diag(s) V^T: tr(D H D^T G) = sum s_i^2 u_i^T G u_i over what is discarded.
    """
    values, vectors = torch.linalg.eigh(gram_CC)
    scaled_RC = weight_RC @ vectors * values.clamp(min=0).sqrt()
    left_RK, singular_K, _ = torch.linalg.svd(scaled_RC, full_matrices=False)
    squares_K = singular_K.square() * ((felt_RR @ left_RK) * left_RK).sum(0)
    lost: Tensor = torch.nn.functional.pad(squares_K.flip(0).cumsum(0).flip(0), (0, 1))
    return lost


def refitted(weight_RC: Tensor, right_KC: Tensor, statistic: Cross) -> Tensor:
    """The left factor (R, K) with which the compressed inputs come nearest to the outputs before.

    min |W x0 - left right x|^2 over the samples, with x0 the inputs in the model as it was and x
    those in the model compressed so far.
    """
    inner_KK = right_KC @ statistic.mean_CC @ right_KC.T
    target_RK = weight_RC @ statistic.cross_CC @ right_KC.T
    left_RK: Tensor = target_RK @ torch.linalg.pinv(inner_KK, hermitian=True)
    return left_RK


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Factorize):
    """Truncation-aware data whitening, with the paper's update of the left factor (section 3.3)."""

    allocation: str = ALLOCATOR
    """'allocator': ``keep`` is the share of all layers together, spent where it lowers the loss of
    the model most, so that small and sensitive ones, such as the keys and values of grouped
    queries, may stay whole; 'uniform': every layer keeps that share. Perplexity of the bundled
    model at 0.8: o_proj and up_proj +6.8 % instead of +12.7 %, all layers +39 % instead of +90 %,
    where every v_proj stays whole."""
    refit: bool = False
    """Solve for the left factor once more, so that it makes up for what earlier blocks lost. Of no
    use to the bundled model: perplexity +13.7 % with and without where o_proj and up_proj keep
    80 %, +154 % instead of +90 % where all layers do."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation must be one of {ALLOCATIONS}, got '{self.allocation}'")

    def most(self, name: str, form: Form) -> int:
        if self.allocation == UNIFORM:
            return super().most(name, form)
        return self._worth(form)

    def _worth(self, form: Form) -> int:
        largest = int(WORTH * form.rows * form.cols / (form.rows + form.cols))
        return largest - largest % self.rank_multiple

    def plan(self, layers: Layers) -> Layers:
        planned = super().plan(layers)
        if self.allocation != UNIFORM:
            forms = [layers[name] for name in select(layers, self.targets)]
            least = sum(self.costs(form)[0] for form in forms)
            if least > self.keep * (whole := sum(form.rows * form.cols for form in forms)):
                raise ValueError(
                    f"keep={self.keep} is below {least / whole:.3g}, the share of their parameters "
                    f"that the layers keep at rank {self.rank_multiple}, or whole where they are "
                    "too small for it; lower rank_multiple or raise keep"
                )
        return planned

    @property
    def bound(self) -> int | None:
        return None if self.allocation == UNIFORM else self.rank_multiple

    def ranks(
        self, checkpoint: Checkpoint, layers: Layers, chosen: frozenset[str], progress: Progress
    ) -> dict[str, int]:
        if self.allocation == UNIFORM:
            return super().ranks(checkpoint, layers, chosen, progress)
        curves: dict[str, list[Option]] = {}
        ids_ST = self.calib.ids(checkpoint)[: max(FELT_TOKENS // self.calib.tokens, 1)]
        for name, layer, fed, gradients in felt(checkpoint, ids_ST, chosen, progress):
            weight_RC = weight_of(layer).double()
            lost = discarded(weight_RC, fed.mean_CC, gradients.mean_CC) / 2
            curves[name] = self.options(layers[name], lost)
        budget = self.keep * sum(layers[name].rows * layers[name].cols for name in chosen)
        taken = allocate(curves, budget)
        ranks = {name: (1 + place) * self.rank_multiple for name, place in taken.items()}
        whole = {name for name, options in curves.items() if taken[name] == len(options) - 1}
        return {name: ranks[name] for name in layers if name in chosen - whole}

    def costs(self, form: Form) -> list[int]:
        """Parameters at every rank that is allowed, and of the whole layer."""
        ranks = range(self.rank_multiple, self._worth(form) + 1, self.rank_multiple)
        return [*(rank * (form.rows + form.cols) for rank in ranks), form.rows * form.cols]

    def options(self, form: Form, lost: Tensor) -> list[Option]:
        """What each of them loses; ``lost[k]`` is the loss of rank k."""
        *factored, whole = self.costs(form)
        ranks = (cost // (form.rows + form.cols) for cost in factored)
        losses = [float(lost[min(rank, len(lost) - 1)]) for rank in ranks]
        return [*map(Option, factored, losses), Option(whole, 0.0)]

    def factors(self, weight_RC: Tensor, rank: int, statistic: Gram) -> tuple[Tensor, Tensor]:
        left_RK, right_KC = whitened(weight_RC, statistic.mean_CC, rank)
        if self.refit:
            assert isinstance(statistic, Cross)
            left_RK = refitted(weight_RC, right_KC, statistic)
        return left_RK, right_KC

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def observation(self, checkpoint: Checkpoint, wanted: frozenset[str]) -> Observation:
        return self.calib.observe(checkpoint, wanted, Cross if self.refit else Gram)
