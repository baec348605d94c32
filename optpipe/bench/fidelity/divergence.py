"""How far the predictions of one arm are from the baseline's, in float64 over the whole vocabulary.

KL(p || q) = sum p (log p - log q), never with an absolute value in it: sum p |log p - log q|, which
one vendor's example computes, is 3 to 270 times larger on the same logits. Tokens of a window
depend on each other, so standard errors are clustered by window (Liang and Zeger, Biometrika 73,
1986); shares have the interval of Wilson (JASA 22, 1927).

Shapes: N predicted positions of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]
ROWS = 64
"""Positions turned to float64 at a time: a window of 128 k logits would take gigabytes."""
TOP_K = 20
"""As many log-probabilities as APIs give."""
TOP_5 = 5
LEVEL = 0.95
ROUNDING = 1e-9
"""A KL further below 0 than this is a bug, not rounding."""


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What an arm predicted at N positions, beside what the baseline did; every array is (N)."""

    kl: Floats
    """KL(baseline || arm), nats."""
    kl_topk: Floats
    """The same with all but the baseline's likeliest tokens in one: a lower bound of ``kl``."""
    nll: Floats
    """-log probability of the token that came, nats."""
    reference_nll: Floats
    agrees: NDArray[np.bool_]
    """Whether the likeliest token is the same."""
    top5: Floats
    """Share of the baseline's five likeliest tokens that are among the arm's."""
    margin: Floats
    """Probability of the baseline's likeliest token over its second."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.nll).all() and np.isfinite(self.kl).all())


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over clusters, its standard error and interval: None where one cluster has none."""

    value: float
    error: float | None
    ci: Interval | None


def compare(
    reference_NV: NDArray[Any], logits_NV: NDArray[Any], targets_N: NDArray[np.int64]
) -> Positions:
    """The arm's logits against the baseline's; all NaN unless every logit is finite."""
    parts = [_rows(*part) for part in _chunks(reference_NV, logits_NV, targets_N)]
    return concatenate(parts)


def concatenate(parts: Sequence[Positions]) -> Positions:
    """One after the other."""
    joined = {
        f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(Positions)
    }
    return Positions(**joined)


def clustered(values: Sequence[Floats], level: float = LEVEL) -> Mean:
    """The mean over all values; each array is one cluster, within which they may depend."""
    count, sums = sum(map(len, values)), np.array([v.sum() for v in values])
    value = float(sums.sum() / count)
    if len(values) < 2 or not math.isfinite(value):
        return Mean(value=value, error=None, ci=None)
    from scipy.special import stdtrit  # takes a second to import

    freedom = len(values) - 1
    residuals = sums - value * np.array([len(v) for v in values])
    error = math.sqrt((residuals**2).sum() * len(values) / freedom) / count
    half = float(stdtrit(freedom, (1 + level) / 2)) * error
    return Mean(value=value, error=error, ci=(value - half, value + half))


def wilson(successes: int, trials: int, level: float = LEVEL) -> Interval:
    """Interval of a share; it stays within 0 and 1."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, spread = successes / trials, z * z / trials
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (middle - half) / (1 + spread), (middle + half) / (1 + spread)
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def quantile(values: Floats, q: float) -> float | None:
    """None if the sample is too small for any upper bound at 95 %: 299 values for q = 0.99."""
    return float(np.quantile(values, q)) if q ** len(values) <= 1 - LEVEL else None


def _chunks(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    for start in range(0, len(arrays[0]), ROWS):
        yield tuple(array[start : start + ROWS] for array in arrays)


def _rows(
    reference_NV: NDArray[Any], logits_NV: NDArray[Any], targets_N: NDArray[np.int64]
) -> Positions:
    if not (np.isfinite(reference_NV).all() and np.isfinite(logits_NV).all()):
        return _undefined(len(targets_N))
    rows_N = np.arange(len(targets_N))
    top_NK, others_N = _top(reference_NV), rows_N[:, None]
    log_p, p = _log_softmax(reference_NV)
    log_q, q = _log_softmax(logits_NV)
    kl_N = np.einsum("nv,nv->n", p, log_p - log_q)
    assert kl_N.min() > -ROUNDING, f"a KL of {kl_N.min()} is none"
    first5 = min(TOP_5, logits_NV.shape[1])
    fifth_N = np.partition(logits_NV, -first5, axis=-1)[:, -first5]
    p_NK, log_p_NK, log_q_NK = (x[others_N, top_NK] for x in (p, log_p, log_q))
    return Positions(
        kl=np.maximum(kl_N, 0.0),
        kl_topk=_lumped(p_NK, (p_NK * (log_p_NK - log_q_NK)).sum(-1), q[others_N, top_NK]),
        nll=-log_q[rows_N, targets_N],
        reference_nll=-log_p[rows_N, targets_N],
        agrees=reference_NV.argmax(-1) == logits_NV.argmax(-1),
        top5=(logits_NV[others_N, top_NK[:, :first5]] >= fifth_N[:, None]).mean(-1),
        margin=p_NK[:, 0] - p_NK[:, 1],
    )


def _top(logits_NV: NDArray[Any]) -> NDArray[np.int64]:
    """The likeliest tokens, the likeliest first."""
    k = min(TOP_K, logits_NV.shape[1])
    some_NK = np.argpartition(logits_NV, -k, axis=-1)[:, -k:]
    order_NK = np.argsort(-np.take_along_axis(logits_NV, some_NK, -1), axis=-1, kind="stable")
    return np.take_along_axis(some_NK, order_NK, -1)


def _lumped(p_NK: Floats, top_N: Floats, q_NK: Floats) -> Floats:
    """KL with all other tokens as one; merging outcomes never makes a divergence larger."""
    rest_p, rest_q = (np.maximum(1 - x.sum(-1), np.finfo(float).eps) for x in (p_NK, q_NK))
    kl_N: Floats = top_N + rest_p * np.log(rest_p / rest_q)
    return np.maximum(kl_N, 0.0)


def _log_softmax(logits_NV: NDArray[Any]) -> tuple[Floats, Floats]:
    """Log-probabilities and probabilities."""
    shifted = logits_NV.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    p = np.exp(shifted)
    total = p.sum(-1, keepdims=True)
    shifted -= np.log(total)
    p /= total
    return shifted, p


def _undefined(positions: int) -> Positions:
    nothing = np.full(positions, np.nan)
    agrees = np.zeros(positions, dtype=np.bool_)
    known = {f.name: nothing for f in fields(Positions)} | {"agrees": agrees}
    return Positions(**known)
