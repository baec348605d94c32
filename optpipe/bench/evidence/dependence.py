"""The shift of paired differences whose blocks may depend on each other.

The signed-rank test is exact for independent blocks; where neighbours resemble each other with an
autocorrelation of 0.75 it finds a difference in one of four pairs of equal arms. So it is not asked
alone: a second interval is that of the mean of an AR(1) series, averaged over what the
autocorrelation may be (Zellner and Tiao 1964, JASA 59). What is published is the hull of both, and
of what processes differ by; of p-values see `paired`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtr, stdtrit

from optpipe.bench.evidence import statistics
from optpipe.bench.evidence.processes import ONE_PROCESS, SAME, Processes
from optpipe.bench.evidence.statistics import LEVEL, Floats, Interval, Shift, hodges_lehmann

TRIM = 0.2
"""Values at each end that are winsorized: bursts of two blocks in twelve do not move the mean."""
RHOS = np.linspace(0, 0.95, 11)
"""Autocorrelations, equally likely beforehand."""
DEPENDENT = 0.5
"""Autocorrelation from which on a report mentions it."""
UNKNOWN = 1.7
"""Over the root of the number of independent values: the autocorrelation they are found to have."""
FEWEST = 5
STEPS = 30
"""Of a bisection, which leaves 1e-9 of what it began with."""
ROUNDS = 8


@dataclass(frozen=True)
class Posterior:
    """Where the middle of a series is: Student's t around one mean for each of RHOS."""

    weights: Floats
    means: Floats
    errors: Floats
    df: int

    @property
    def rho(self) -> float:
        """The autocorrelation, on average."""
        return float(self.weights @ RHOS)

    def below(self, centers: Sequence[float] | Floats) -> Floats:
        """Probability that the middle is below each of the centers."""
        apart = np.asarray(centers, dtype=np.float64)[:, None] - self.means
        if not self.errors.any():
            return (np.sign(apart[:, 0]) + 1) / 2
        found: Floats = stdtr(self.df, apart / self.errors) @ self.weights
        return found

    def p(self, *centers: float) -> Floats:
        """Two-sided, that the middle is each of the centers."""
        below = self.below(centers)
        return 2 * np.minimum(below, 1 - below)

    @property
    def likely(self) -> Posterior:
        """With the autocorrelation that it has on average as the only one."""
        mean, error = (np.interp(self.rho, RHOS, of) for of in (self.means, self.errors))
        return replace(self, means=np.full_like(RHOS, mean), errors=np.full_like(RHOS, error))

    def interval(self, level: float) -> Interval:
        shares = np.array([(1 - level) / 2, (1 + level) / 2])
        each = self.means + self.errors * stdtrit(self.df, shares)[:, None]
        # a quantile of a mixture lies among those of its parts
        low, high = each.min(1), each.max(1)
        for _ in range(STEPS if (high > low).any() else 0):
            half = (low + high) / 2
            under = self.below(half) < shares
            low, high = np.where(under, half, low), np.where(under, high, half)
        return float(low[0]), float(high[1])


def posterior(values: Sequence[float] | Floats) -> Posterior:
    """Of the middle of a series, winsorized. Raises ValueError for fewer than FEWEST values.

    x_t - mu = rho (x_(t-1) - mu) + e_t. For a given rho, generalized least squares gives mu and its
    error; the weight of a rho is the likelihood with mu and the variance of e integrated out.
    """
    array, n = np.asarray(values, dtype=np.float64), len(values)
    if n < FEWEST:
        raise ValueError(f"{n} values; {FEWEST} are needed")
    cut = int(TRIM * n)
    ranked, kept = np.sort(array), n - 2 * cut
    x = np.clip(array, ranked[cut], ranked[n - 1 - cut])
    if np.ptp(x) < SAME:
        still = np.zeros_like(RHOS)
        return Posterior(np.full_like(RHOS, 1 / len(RHOS)), still + x[0], still, kept - 1)
    first = 1 - RHOS**2  # the first value has the variance of the series, the others that of e
    precision = first + (n - 1) * (1 - RHOS) ** 2
    steps = x[1:] - RHOS[:, None] * x[:-1]
    means = (first * x[0] + (1 - RHOS) * steps.sum(1)) / precision
    residuals = steps - ((1 - RHOS) * means)[:, None]
    squares = first * (x[0] - means) ** 2 + (residuals**2).sum(1)
    logs = (np.log(first) - np.log(precision) - (n - 1) * np.log(squares)) / 2
    weights = np.exp(logs - logs.max())
    # n / kept: what winsorizing took from the spread (Yuen 1974, Biometrika 61)
    errors = np.sqrt(squares / (n - 1) / precision) * n / kept
    return Posterior(weights / weights.sum(), means, errors, kept - 1)


def paired(
    differences: Sequence[float],
    level: float = LEVEL,
    margin: float = 0.0,
    processes: Processes | None = None,
) -> Shift:
    """The Hodges-Lehmann shift with an interval and p-values that hold for dependent blocks too.

    ``p_margin`` is that of a shift of ``margin`` or more, either way; the interval lies within the
    margin exactly where it is at most 1 - level. With ``processes`` both hold for whatever
    processes the arms may get, not only for those that were timed; None: these alone are meant.
    The interval reaches as far as that of the signed rank, of the series and of the processes. In
    the p-values the processes take the place of the signed rank, which of n blocks cannot be below
    2^(1 - n); and in both that of autocorrelations that are unlikely, which move levels of
    processes, too.
    """
    ranked = replace(hodges_lehmann(differences, level), processes=processes)
    if len(differences) < FEWEST:
        return ranked
    values, series = np.asarray(differences, dtype=np.float64), posterior(differences)
    dependent = series if processes is None else series.likely
    centers = (0.0, margin, -margin)
    lower, upper = dependent.below([-margin, margin])
    within = abs(ranked.estimate) < margin and lower < 1 / 2 < upper
    ends = [dependent.interval(level), ranked.ci or (-math.inf, math.inf)]
    if processes is None:
        others = [statistics.signed_rank_p(values, center) for center in centers]
    else:
        half = processes.half_width(level)
        ends.append((ranked.estimate - half, ranked.estimate + half))
        others = [processes.p(ranked.estimate - center) for center in centers]
    p = [max(float(one), other) for one, other in zip(dependent.p(*centers), others, strict=True)]
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return replace(
        ranked,
        ci=(low, high) if math.isfinite(high - low) else None,
        p=p[0],
        p_margin=max(p[1:]) if within else 1.0,
        rho=dependent.rho,
    )


def inflation(rho: float, n: int) -> float:
    """Variance of the mean of n values of an AR(1) series, over that of independent ones."""
    return 1 + 2 * rho / (1 - rho) * (1 - (1 - rho**n) / (n * (1 - rho)))


def blocks_needed(shift: Shift, effect: float, alpha: float) -> int:
    """Pairs with which a shift of ``effect`` is found in 80 % of runs at two-sided ``alpha``."""
    independent = statistics.blocks_needed(shift.spread, effect, alpha)
    found = independent
    for _ in range(ROUNDS):  # what is lost to an unknown autocorrelation depends on the number
        found = math.ceil(independent * inflation(_expected(shift, found), found))
    return found


def smallest_effect(shift: Shift, alpha: float) -> float | None:
    """The shift that as many pairs find in 80 % of runs; None where they can find none."""
    worth = shift.pairs / inflation(_expected(shift, shift.pairs), shift.pairs)
    found = statistics.smallest_effect(shift.spread, worth, alpha)
    if found is None or shift.processes is None:
        return found
    found = max(found, shift.processes.smallest_effect(alpha, statistics.POWER))
    return found if math.isfinite(found) else None


def no_interval(shift: Shift, level: float = LEVEL) -> str:
    """Why there is none."""
    if shift.pairs < (least := statistics.fewest_pairs(level)):
        few = f"{shift.pairs} paired blocks are too few for an interval"
        return f"{few}; {least} are the fewest with one at {100 * level:.4g} %"
    return ONE_PROCESS


def _expected(shift: Shift, pairs: int) -> float:
    """The autocorrelation that so many pairs will be found to have."""
    excess = max(shift.rho**2 - UNKNOWN**2 / shift.pairs, 0.0)
    return min(math.sqrt(excess + UNKNOWN**2 / pairs), float(RHOS[-1]))
