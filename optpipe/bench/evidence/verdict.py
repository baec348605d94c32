"""FASTER, SLOWER, EQUIVALENT, INCONCLUSIVE or INVALID, with the error of all verdicts of a report
together below 5 % (Holm 1979, Shaffer 1986). All other ratios have an interval and no verdict.

Every member of the family is asked two questions, whether it differs from the baseline and whether
it differs by less than delta; both p-values, doubled for two looks, go through one step-down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optpipe.bench.evidence.dependence import (
    DEPENDENT,
    blocks_needed,
    no_interval,
    smallest_effect,
)
from optpipe.bench.evidence.statistics import LEVEL, POWER, Shift, fewest_pairs, stepdown
from optpipe.bench.scenario import Cell, Scenario

FASTER, SLOWER, EQUIVALENT = "FASTER", "SLOWER", "EQUIVALENT"
INCONCLUSIVE, INVALID = "INCONCLUSIVE", "INVALID"
ALPHA = 1 - LEVEL


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of one primary ratio; above 1 is better."""

    shift: Shift | None
    """Over paired blocks, at the level of one look, with delta as its margin; None: no pairs."""
    why: str = ""
    """Why there are no pairs."""
    invalid: str | None = None
    """Which consistency check failed, if one did."""
    apart: bool = False
    """Whether the arms were never resident together, which weakens whatever is found."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    verdict: str | None
    """None: there is nothing to judge."""
    reason: str
    p_holm: float | None = None
    """Of what the verdict says, with all verdicts of the report together."""
    blocks_needed: int | None = None
    """Of an inconclusive one: blocks that find a difference of delta in 80 % of runs."""
    mde: float | None = None
    """The smallest relative difference that these blocks find in 80 % of runs."""


def primary(
    cells: Sequence[Cell], scenarios: Mapping[str, Scenario]
) -> dict[Cell, tuple[str, ...]]:
    """The metrics of each cell that get a verdict, decided before anything is measured.

    Those that its scenario names, at its largest batch and longest prompt; and the peak of memory
    of the cell that holds most tokens.
    """
    found: dict[Cell, list[str]] = {cell: [] for cell in cells}
    for name, scenario in scenarios.items():
        own = [cell for cell in cells if cell.scenario == name]
        if own:
            found[max(own, key=lambda c: (c.batch, c.prompt_tokens))] += scenario.primary
    if cells:
        largest = found[max(cells, key=lambda c: c.batch * c.tokens)]
        largest += [metric for metric in ("peak_bytes",) if metric not in largest]
    return {cell: tuple(metrics) for cell, metrics in found.items()}


def verdicts(family: Sequence[Evidence], looks: int, delta: float) -> list[Verdict]:
    """One for each member of the family, in its order.

    ``looks``: how often a cell may have been looked at before it ended.
    """
    counted = [e.shift if e.invalid is None else None for e in family]
    raw = [(s.p, s.p_margin) for s in counted if s is not None]
    adjusted = iter(stepdown([(min(1.0, looks * p), min(1.0, looks * q)) for p, q in raw]))
    both = [None if shift is None else next(adjusted) for shift in counted]
    alpha = ALPHA / looks / max(len(raw), 1)  # of the first step, the hardest
    return [_decide(evidence, p, alpha, delta) for evidence, p in zip(family, both, strict=True)]


def _decide(
    evidence: Evidence, both: tuple[float, float] | None, alpha: float, delta: float
) -> Verdict:
    shift = evidence.shift
    if evidence.invalid is not None:
        return Verdict(verdict=INVALID, reason=evidence.invalid)
    if shift is None or both is None:
        return Verdict(verdict=None, reason=evidence.why)
    verdict, reason = _direction(shift, both, delta)
    if evidence.apart and verdict != INCONCLUSIVE:
        reason = f"not timed side by side, where it would be {verdict}: {reason}"
        verdict = INCONCLUSIVE
    needed, why = _needed(shift, delta, alpha) if verdict == INCONCLUSIVE else (None, "")
    return Verdict(
        verdict=verdict,
        reason=reason + why,
        p_holm=both[1] if verdict == EQUIVALENT else both[0],
        blocks_needed=needed,
        mde=smallest_effect(shift, alpha),
    )


def _needed(shift: Shift, delta: float, alpha: float) -> tuple[int, str]:
    """Blocks that would decide, and what else is to be said of them."""
    needed = max(blocks_needed(shift, delta, alpha), fewest_pairs(1 - alpha))
    drawn = shift.processes
    if drawn is None or drawn.df == 0:
        return needed, ""
    sets = drawn.needed(delta, alpha, POWER)
    if (in_sets := sets * math.ceil(shift.pairs / drawn.sets)) <= needed:
        return needed, ""
    return in_sets, f"; processes of one arm differ by {drawn.sd:.1%}: {sets} of each are needed"


def _direction(shift: Shift, both: tuple[float, float], delta: float) -> tuple[str, str]:
    """The verdict and its reason; ``both``: adjusted p of no difference, of one beyond delta."""
    different, beyond = both
    if shift.ci is None:
        return INCONCLUSIVE, no_interval(shift)
    low, high = shift.ci
    within = 1 / (1 + delta) < low and high < 1 + delta
    if beyond <= ALPHA and within:
        return EQUIVALENT, f"the whole interval lies within {delta:.0%} of 1, p is {beyond:.2g}"
    if different <= ALPHA and not low <= 1 <= high:  # of equal values p may be just below
        return (FASTER if low > 1 else SLOWER), f"the interval excludes 1, p is {different:.2g}"
    if low > 1 or high < 1:
        why = f"with all verdicts of this report together, p is {different:.2g}"
    elif within:
        why = f"with all verdicts of this report together, p of a difference is {beyond:.2g}"
    else:
        why = "the interval holds 1 and more than a negligible difference"
    alike = f"; neighbouring blocks are alike (autocorrelation {shift.rho:.2f})"
    return INCONCLUSIVE, why + (alike if shift.rho > DEPENDENT else "")
