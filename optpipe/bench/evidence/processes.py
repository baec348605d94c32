"""What two processes of one arm differ by, in all of their blocks alike.

Where memory came to lie is drawn once a process: blocks repeat it, and no number of them shows it
(Kalibera and Jones 2013, ISMM, doi:10.1145/2464157.2464160). So every arm is run by several, one
set of processes of all arms after the other: a randomized complete block design with sets as its
blocks. What the effects of arm and set leave of the levels is the error of one process, pooled over
all arms (Scheffe 1959, The Analysis of Variance, section 4.1); or what the two arms of a ratio show
alone, where that is more. It presumes that processes of all arms differ about alike: one arm of
eight whose two processes differ three times as much as those of others has a p below 5 % in 14 % of
simulated sessions (pooled alone in 21 %), and one below 0.2 %, which a family of 24 verdicts asks
for, in 2 %. More sets help.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

SAME = 1e-12
"""Differences of logs below it are rounding."""
ONE_PROCESS = "one process of each arm does not tell what processes of one arm differ by"
Level = tuple[str, Hashable, float, int]
"""Arm, set, the log of what its process in that set usually took, and in how many blocks."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How far the processes that two arms happened to get can move their log-ratio."""

    sets: int
    """In which both arms had a process."""
    sd: float
    """Of the level of a process; what its blocks left open is in it."""
    df: int
    """Degrees of freedom of ``sd``; 0: nothing is known of it."""
    effective: float | None = None
    """As many sets of equally many blocks weigh as much; None: they have equally many."""

    @property
    def error(self) -> float:
        """Standard error of the log-ratio."""
        return self.sd * math.sqrt(2 / (self.effective or self.sets))

    def p(self, distance: float) -> float:
        """Two-sided, that the log-ratio is so far from its estimate."""
        if self.df == 0:
            return 1.0
        if self.error == 0:
            return float(distance == 0)
        return 2 * float(stdtr(self.df, -abs(distance) / self.error))

    def half_width(self, level: float) -> float:
        """Of the interval; infinite where nothing is known."""
        return float(stdtrit(self.df, (1 + level) / 2)) * self.error if self.df else math.inf

    def smallest_effect(self, alpha: float, power: float) -> float:
        """The log-ratio that is found so often at two-sided ``alpha``."""
        if self.df == 0:
            return math.inf
        return float(stdtrit(self.df, 1 - alpha / 2) + stdtrit(self.df, power)) * self.error

    def needed(self, effect: float, alpha: float, power: float) -> int:
        """Sets with which such a log-ratio is found so often."""
        z = float(ndtri(1 - alpha / 2))
        return math.ceil(2 * ((z + float(ndtri(power))) * self.sd / effect) ** 2 + z**2 / 4)


def between(levels: Sequence[Level], one: str, other: str, same: Mapping[str, str]) -> Processes:
    """Of the ratio of two arms; ``same``: arms that are another one under a second name."""
    sd, df = spread([(same.get(arm, arm), of, level, n) for arm, of, level, n in levels])
    before, after = ({of: (level, n) for arm, of, level, n in levels if arm == name}
                     for name in (one, other))  # fmt: skip
    shared = [of for of in before if of in after]
    if not shared or not df:
        return Processes(sets=len(shared), sd=sd, df=0)
    counts = [min(before[of][1], after[of][1]) for of in shared]
    apart = [after[of][0] - before[of][0] for of in shared]
    if len(shared) > 1:
        sd = max(sd, float(np.std(apart, ddof=1)) / math.sqrt(2))
    effective = sum(counts) ** 2 / sum(n * n for n in counts)
    return Processes(sets=len(shared), effective=effective, sd=sd, df=df)


def spread(levels: Sequence[Level]) -> tuple[float, int]:
    """Standard deviation of a process and its degrees of freedom; 0 of them where none is left."""
    arms = [*dict.fromkeys(arm for arm, *_ in levels)]
    sets = [*dict.fromkeys(of for _, of, *_ in levels)]
    design = np.zeros((len(levels), len(arms) + len(sets)))
    for row, (arm, of, *_) in enumerate(levels):
        design[row, [arms.index(arm), len(arms) + sets.index(of)]] = 1
    values = np.array([value for _, _, value, _ in levels])
    found, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    left = values - design @ found
    df = len(levels) - int(rank)
    sd = math.sqrt(float(left @ left) / df) if df else 0.0
    return (sd if sd > SAME else 0.0), df
