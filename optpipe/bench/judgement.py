"""Which cells are no measurement, what this run can resolve, and the verdicts that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from optpipe.bench.cells import ITSELF, Entry, Table, interval, nothing
from optpipe.bench.evidence.statistics import Shift
from optpipe.bench.evidence.verdict import ALPHA, INVALID, Evidence, primary, verdicts
from optpipe.bench.scenario import Cell
from optpipe.bench.timed import checks
from optpipe.bench.timed.clock import COMPARED
from optpipe.bench.timed.samples import AGAIN

SECONDARY = "a secondary metric: an interval, no verdict"
EQUAL_LEVEL = 0.01
"""How often two identical workers are found to differ: it voids what may be an honest run."""
NO_PAIR = "the baseline was not resident twice: it does not fit in memory, or was ended"


@dataclass(frozen=True)
class Judgement:
    """What holds of a whole report, from its samples."""

    table: Table

    @cached_property
    def primary(self) -> dict[Cell, tuple[str, ...]]:
        outcome = self.table.outcome
        return primary(outcome.cells, outcome.measured.scenarios)

    @cached_property
    def failures(self) -> dict[tuple[str, Cell], list[str]]:
        """(arm, cell) -> the checks it failed there."""
        outcome, table = self.table.outcome, self.table
        counted = {key: own for key, own in table.turns.items() if table.timed(*key)[0]}
        return checks.failures(counted, outcome.floors, outcome.measured.dead)

    @cached_property
    def unstable(self) -> dict[Cell, str]:
        return checks.unstable(self.table.outcome.measured.samples)

    @cached_property
    def pair(self) -> dict[tuple[Cell, str], Shift]:
        """The two identical workers of the baseline against each other."""
        outcome = self.table.outcome
        found = {
            (cell, metric): self.table.shift(AGAIN, cell, metric)[0]
            for cell in outcome.cells
            for metric in COMPARED
        }
        return {key: shift for key, shift in found.items() if shift is not None}

    @cached_property
    def unequal(self) -> dict[tuple[Cell, str], str]:
        """Primary metrics in which they differ: whatever did that may favour any arm.

        Not their memory, in which processes do: that makes its intervals wider.
        """
        bench = self.table.outcome.bench
        tested = [(c, m) for c, m in self.pair if m in self.primary[c] and m != "peak_bytes"]
        family = [Evidence(shift=self.pair[key]) for key in tested]
        found = verdicts(family, len(bench.looks), bench.delta)
        return {
            key: "aa_pair_differs: two identical workers of the baseline differ, "
            f"ratio {self.pair[key].estimate:.3f}, p {verdict.p_holm:.2g}"
            for key, verdict in zip(tested, found, strict=True)
            if verdict.verdict in ("FASTER", "SLOWER") and (verdict.p_holm or 0) <= EQUAL_LEVEL
        }

    @cached_property
    def instrument(self) -> str | None:
        """What is wrong with the clock and the harness themselves."""
        told = self.table.outcome.instrument
        if told is None or told["passed"]:
            return None
        errors = ", ".join(f"{k} {v:.1%}" for k, v in told.items() if k.endswith("_error"))
        return f"instrument: known delays are not measured as planned: {errors}"

    @property
    def resolution(self) -> list[Entry]:
        """One entry a cell: what two identical arms differ by."""
        level = self.table.outcome.bench.level
        found = []
        for cell in self.table.outcome.cells:
            entry = {}
            for metric in COMPARED:
                shift = self.pair.get((cell, metric))
                if shift is None:
                    why = self.table.shift(AGAIN, cell, metric)[1] or NO_PAIR
                    why = NO_PAIR if why == "no block was run" else why
                    entry[metric] = {**nothing(why), "half_width": None}
                    entry[metric]["reasons"]["half_width"] = why
                else:
                    entry[metric] = _resolved(interval(shift, level))
            found.append({**cell._asdict(), **entry})
        return found

    @property
    def invalid_reasons(self) -> list[str]:
        """Every check that failed, and where."""
        found = [f"{arm}, {cell}: {why}" for (arm, cell), of in self.failures.items() for why in of]
        found += [f"{cell}: {why}" for cell, why in self.unstable.items()]
        found += [f"{cell}, {metric}: {why}" for (cell, metric), why in self.unequal.items()]
        outcome = self.table.outcome
        found += [*outcome.changed.values(), *outcome.unlike.values()]
        return found + ([self.instrument] if self.instrument else [])

    def add_verdicts(self, artifacts: Sequence[Entry]) -> None:
        """Complete ``cells[].speedup`` of every artifact."""
        outcome = self.table.outcome
        family, places = [], []
        for artifact in artifacts:
            for cell, entry in zip(outcome.cells, artifact["cells"], strict=True):
                for metric, speedup in entry["speedup"].items():
                    if artifact["role"] == "baseline":
                        _without_verdict(speedup, ITSELF)
                    elif metric not in self.primary[cell]:
                        timed = metric != "bytes" and speedup["ratio"] is not None
                        void = self._void(artifact["name"], cell) if timed else None
                        _without_verdict(speedup, SECONDARY, void)
                    else:
                        family.append(self._evidence(artifact["name"], cell, metric))
                        places.append(speedup)
        found = verdicts(family, len(outcome.bench.looks), outcome.bench.delta)
        for speedup, verdict in zip(places, found, strict=True):
            speedup |= {
                "verdict": verdict.verdict,
                "reason": verdict.reason,
                "p_holm": verdict.p_holm,
                "blocks_needed": verdict.blocks_needed,
                "mde": verdict.mde,
            }
            nulls = (key for key in ("p_holm", "blocks_needed", "mde") if speedup[key] is None)
            speedup["reasons"] |= dict.fromkeys(
                nulls, f"{verdict.verdict or 'no verdict'}: {verdict.reason}"
            )
            speedup["reasons"] |= {} if verdict.verdict else {"verdict": verdict.reason}

    def _evidence(self, name: str, cell: Cell, metric: str) -> Evidence:
        own, why = self.table.timed(name, cell)
        if own is None:
            return Evidence(shift=None, why=why)
        shift, why = self.table.shift(name, cell, metric)
        return Evidence(
            shift=shift,
            why=why,
            invalid=self._invalid(name, cell, metric),
            apart=name in self.table.outcome.anchored,
        )

    def _invalid(self, name: str, cell: Cell, metric: str) -> str | None:
        """The first reason why this is no measurement."""
        return self._void(name, cell) or self.unequal.get((cell, metric))

    def _void(self, name: str, cell: Cell) -> str | None:
        """The first reason why nothing that was timed here is one."""
        outcome, baseline = self.table.outcome, self.table.outcome.baseline
        reasons = [*self.failures.get((name, cell), [])]
        reasons += [f"the baseline: {why}" for why in self.failures.get((baseline, cell), [])]
        others = (outcome.changed, outcome.unlike)
        found = (*reasons, *(of.get(arm) for arm in (name, baseline) for of in others),
                 self.unstable.get(cell), self.instrument)  # fmt: skip
        return next((why for why in found if why), None)


def _without_verdict(speedup: Entry, why: str, void: str | None = None) -> None:
    """But INVALID where that is why it is not even a measurement."""
    speedup |= {"verdict": INVALID if void else None, "reason": void or why}
    speedup["reasons"] |= {} if void else {"verdict": why}


def _resolved(entry: Entry) -> Entry:
    """With the half width of the interval, and whether it leaves out 1."""
    ci = entry["ci"]
    reasons = {**entry["reasons"]}
    if ci is None:
        reasons["half_width"] = reasons["ci"]
    elif not ci[0] <= 1 <= ci[1]:
        reasons["differs"] = f"its interval excludes 1, which chance does in {ALPHA:.0%} of cells"
    return {**entry, "half_width": (ci[1] - ci[0]) / 2 if ci else None, "reasons": reasons}
