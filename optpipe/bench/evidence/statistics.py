"""Paired estimates: the Hodges-Lehmann shift and its exact signed-rank interval (Hollander, Wolfe
and Chicken, Nonparametric Statistical Methods, 3rd ed., sections 3.1 to 3.3).

On log-ratios of pairs measured side by side the interval keeps its level from six pairs on, with
no assumption but symmetry; a bootstrap at such sizes covers 80 % where it promises 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtri, stdtrit

from optpipe.bench.evidence.processes import Processes

Floats = NDArray[np.float64]
Interval = tuple[float, float]
LEVEL = 0.95
POWER = 0.8
EFFICIENCY = 3 / math.pi
"""Of the signed rank against the t test where noise is normal."""
FAR = 2.0
"""Two intervals whose widths differ by more than this factor disagree."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """A location and its interval; ``ci`` is None where the sample is too small for the level."""

    estimate: float
    ci: Interval | None
    pairs: int
    p: float
    """Two-sided, of no shift at all; by the exact signed-rank test, see also `dependence`."""
    check: Interval | None
    """Student's interval of the mean, which assumes more; None for fewer than two pairs."""
    spread: float
    """Standard deviation of the differences; 0 for a single pair."""
    p_margin: float = 1.0
    """Two-sided, of a shift beyond a margin, where one was asked about."""
    rho: float = 0.0
    """Autocorrelation of neighbouring differences, where it was estimated."""
    processes: Processes | None = None
    """What processes of one arm differ by, where the interval and p-values allow for it."""

    disputed: bool = False
    """Whether Student's interval and that of the signed rank disagree twofold in width, or the one
    excludes the middle of the other."""


def hodges_lehmann(differences: Sequence[float] | Floats, level: float = LEVEL) -> Shift:
    """Median of the Walsh averages, and the interval that inverts the signed-rank test."""
    if not len(differences):
        raise ValueError("no pairs to estimate a shift from")
    values = np.asarray(differences, dtype=np.float64)
    averages = _walsh(values)
    rank = _critical(len(values), level)
    estimate, check = float(np.median(averages)), t_interval(values, level)
    ci = None if rank == 0 else (float(averages[rank - 1]), float(averages[-rank]))
    return Shift(
        estimate=estimate,
        ci=ci,
        pairs=len(values),
        p=_two_sided(averages, len(values)),
        check=check,
        disputed=ci is not None and check is not None and _dispute(estimate, ci, check),
        spread=float(values.std(ddof=1)) if len(values) > 1 else 0.0,
    )


def _dispute(estimate: float, ci: Interval, check: Interval) -> bool:
    widths = sorted((ci[1] - ci[0], check[1] - check[0]))
    apart = not (check[0] <= estimate <= check[1])
    return (apart and widths[1] > 0) or widths[1] > FAR * widths[0] > 0


def ratio(numerator: Sequence[float], denominator: Sequence[float], level: float = LEVEL) -> Shift:
    """How many times the one is above the other, pair by pair: exp of the shift of the logs.

    ``spread`` stays that of the logs.
    """
    return exponential(hodges_lehmann(log_ratios(numerator, denominator), level))


def log_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The log of each quotient."""
    logs = np.log(np.asarray(numerator, float)) - np.log(np.asarray(denominator, float))
    return [float(log) for log in logs]


def exponential(shift: Shift) -> Shift:
    """A shift of logs as a ratio; p and spread stay those of the logs."""
    return replace(
        shift, estimate=math.exp(shift.estimate), ci=_exp(shift.ci), check=_exp(shift.check)
    )


def t_interval(values: Sequence[float] | Floats, level: float = LEVEL) -> Interval | None:
    """Student's interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    array = np.asarray(values, dtype=np.float64)
    half = stdtrit(len(array) - 1, (1 + level) / 2) * array.std(ddof=1) / math.sqrt(len(array))
    return float(array.mean() - half), float(array.mean() + half)


def fewest_pairs(level: float = LEVEL) -> int:
    """The smallest sample that has an interval of this level at all: 6 at 95 %."""
    return next(n for n in range(1, 64) if _critical(n, level))


def stepdown(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Adjusted p-values of a family, in the order given: error of the whole family.

    Every member has two hypotheses of which one at most is true, such as no difference and a large
    one. Holm's step-down, with as many that may still be true as there are members of which not
    both are rejected (Shaffer 1986, JASA 81, procedure S2).
    """
    adjusted = [[1.0, 1.0] for _ in pairs]
    rejected, running, possible = [0] * len(pairs), 0.0, len(pairs)
    ranked = sorted((p, index, which) for index, both in enumerate(pairs)
                    for which, p in enumerate(both))  # fmt: skip
    for p, index, which in ranked:
        running = max(running, min(1.0, possible * p))
        adjusted[index][which] = running
        rejected[index] += 1
        possible -= rejected[index] == 2
    return [(one, two) for one, two in adjusted]


def blocks_needed(spread: float, effect: float, alpha: float) -> int:
    """Pairs with which a shift of ``effect`` is found in 80 % of runs at two-sided ``alpha``.

    The normal formula, plus Guenther's z^2 / 2 for small samples, over the efficiency of the signed
    rank where noise is normal; for heavier tails it asks for a little more than is needed.
    """
    z = float(ndtri(1 - alpha / 2))
    return math.ceil((float(z + ndtri(POWER)) * spread / effect) ** 2 / EFFICIENCY + z**2 / 2)


def smallest_effect(spread: float, pairs: float, alpha: float) -> float | None:
    """The shift that this many pairs find in 80 % of runs; None where they can find none."""
    z = float(ndtri(1 - alpha / 2))
    counted = (pairs - z**2 / 2) * EFFICIENCY
    return float(z + ndtri(POWER)) * spread / math.sqrt(counted) if counted > 0 else None


def median(values: Sequence[float]) -> float:
    """Of few values, many times over: sorting them takes a tenth of what NumPy's takes."""
    ranked, middle = sorted(values), len(values) // 2
    return float(ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2)


def percentile(values: Sequence[float] | Floats, q: float) -> float:
    """The q-th percentile, linear between order statistics (type 7 of Hyndman and Fan)."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), q / 100, method="linear"))


def percentile_interval(
    values: Sequence[float] | Floats, q: float, level: float = LEVEL
) -> Interval | None:
    """Order statistics that bound the q-th percentile, each with confidence ``level``.

    None where the sample is too small for a bound on either side: see `fewest_samples`.
    """
    ranked, n, share = np.sort(np.asarray(values, dtype=np.float64)), len(values), q / 100
    if n == 0:
        return None
    # the k-th smallest lies above the percentile unless at least k values lie below it
    below = bdtr(np.arange(n), n, share)  # P(at most k of n lie below), k = 0 .. n - 1
    upper = int(np.searchsorted(below, level - 1e-12)) + 1
    lower = int(np.searchsorted(below, 1 - level + 1e-12, side="right"))
    if upper > n or lower < 1:
        return None
    return float(ranked[lower - 1]), float(ranked[upper - 1])


@lru_cache(maxsize=64)
def fewest_samples(q: float, level: float = LEVEL, violations: int = 0) -> int:
    """Samples that prove a q-th percentile if at most ``violations`` of them exceed the limit.

    The binomial rule of MLPerf (Reddi et al. 2020, arXiv:1911.02549): 459 for p99 at 99 %.
    """
    n = violations + 1
    while bdtr(violations, n, 1 - q / 100) > 1 - level:
        n += 1
    return n


def signed_rank_p(values: Floats, center: float) -> float:
    """Two-sided, that the values lie symmetrically around the center."""
    return _two_sided(_walsh(values - center), len(values))


@lru_cache(maxsize=256)
def signed_rank_cdf(n: int) -> Floats:
    """P(W+ <= w) for w = 0 .. n(n+1)/2 when every sign of n distinct ranks is a fair coin."""
    pmf = np.zeros(n * (n + 1) // 2 + 1)
    pmf[0] = 1.0
    for rank in range(1, n + 1):
        pmf[rank:] = (pmf[rank:] + pmf[:-rank]) / 2
        pmf[:rank] /= 2
    return np.cumsum(pmf)


def _two_sided(averages: Floats, n: int) -> float:
    """W+ is the number of Walsh averages above 0; those that are 0 count one half (ties)."""
    above = float((averages > 0).sum() + 0.5 * (averages == 0).sum())
    cdf, least = signed_rank_cdf(n), min(above, len(averages) - above)  # W+ is symmetric
    return min(1.0, 2 * float(cdf[math.ceil(least)]))


def _walsh(values: Floats) -> Floats:
    """Averages of all pairs, each value with itself included, sorted."""
    rows, cols = _all_pairs(len(values))
    return np.sort((values[rows] + values[cols]) / 2)


@lru_cache(maxsize=16)
def _all_pairs(n: int) -> tuple[NDArray[np.intp], ...]:
    return np.triu_indices(n)


@lru_cache(maxsize=256)
def _critical(n: int, level: float) -> int:
    """The largest k with P(W+ <= k - 1) <= (1 - level) / 2: the interval drops k - 1 a side."""
    # the tolerance keeps a tail of exactly 1/40, say, from being lost to rounding
    return int(np.sum(signed_rank_cdf(n) <= (1 - level) / 2 + 1e-12))


def _exp(interval: Interval | None) -> Interval | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
