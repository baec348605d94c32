"""Charts with two measured axes: speed against quality, scaling with the batch, roofline, drift.

Each takes the report and gives the ``<svg>``, or "" if there is nothing to draw. Artifacts carry
their number in the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from optpipe.bench.pages.figure import (
    ACCENT,
    INK,
    MUTED,
    PAPER,
    WARN,
    draw,
    joined,
    log_axis,
    number_points,
)
from optpipe.bench.pages.view import Entry, names, slower_from

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[str, float, float]
Achieved = tuple[str, str, float, float]
MOST_BLOCKS = 100
BASELINE = "baseline"
"""As raw timings name it, also where the report of a sweep calls it otherwise."""
"""Points of one line of a time series: more blocks are drawn as medians of neighbours."""


def pareto(report: Entry, index: int, title: str) -> str:
    """Speed against what it cost: nothing is both faster and closer than a filled point."""
    points = [*_tradeoffs(report, index)]
    if len(points) < 2:
        return ""
    least = min((kl for _, kl, _ in points if kl > 0), default=1e-3)
    zero, most = least / 6, max(kl for _, kl, _ in points) or 1e-2
    gains = [gain for _, _, gain in points]
    best = {name for name, kl, gain in points if not _beaten(kl, gain, points)}

    def paint(axes: Axes) -> None:
        log_axis(axes.xaxis, zero / 1.6, most * 2)
        log_axis(axes.yaxis, min(*gains, 0.9) / 1.15, max(*gains, 1.1) * 1.25, "\u00d7")
        shown = [tick for tick in axes.get_xticks() if tick >= least / 1.5]
        axes.set_xticks([zero, *shown], ["0", *(f"{tick:g}" for tick in shown)])
        axes.axhline(1, color=INK, linewidth=1)
        front = sorted((max(kl, zero), gain) for name, kl, gain in points if name in best)
        axes.plot(*zip(*front, strict=True), color=ACCENT, linewidth=1, alpha=0.6)
        for name, kl, gain in points:
            look: dict[str, Any] = (
                {"color": ACCENT} if name in best else {"color": MUTED, "markerfacecolor": PAPER}
            )
            axes.plot(max(kl, zero), gain, "o", markersize=6, **look)
        marks = [(max(kl, zero), gain, name.split()[0]) for name, kl, gain in points]
        number_points(axes, marks)
        axes.set_xlabel("mean KL divergence from the baseline, nats (less is closer)")
        axes.set_ylabel("TPOT, times faster")

    alt = "; ".join(
        f"{name}: KL {kl:.2g}, {gain:.2f} times{'' if name in best else ', dominated'}"
        for name, kl, gain in points
    )
    return draw(250, paint, title, alt)


def scaling(report: Entry, scenario: str, title: str) -> str:
    """Output tokens a second over the batch size, one line an artifact."""
    lines = []
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        cells = [cell for cell in artifact["cells"] if cell["scenario"] == scenario]
        longest = max(cell["prompt_tokens"] for cell in cells)
        line = [
            (cell["batch"], cell["tokens_per_s"])
            for cell in sorted(cells, key=lambda cell: cell["batch"])
            if cell["tokens_per_s"] is not None and cell["prompt_tokens"] == longest
        ]
        if len(line) > 1:
            lines.append((name, artifact, line))
    if not lines:
        return ""
    rates = [rate for _, _, line in lines for _, rate in line]
    batches = sorted({batch for _, _, line in lines for batch, _ in line})

    def paint(axes: Axes) -> None:
        log_axis(axes.xaxis, batches[0] / 1.15, batches[-1] * 1.35)
        log_axis(axes.yaxis, min(rates) / 1.2, max(rates) * 1.2)
        axes.set_xticks(batches, [str(batch) for batch in batches])
        for _, artifact, line in lines:
            base = artifact is report["artifacts"][0]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, zorder=3 if base else 2,
                      color=INK if base else ACCENT, linewidth=2 if base else 1.2)  # fmt: skip
            where = slower_from(artifact, scenario)
            for batch, rate in line:
                if batch == where:
                    axes.plot(batch, rate, "D", markersize=8, markerfacecolor="none", color=WARN)
        number_points(axes, [(*line[-1], name.split()[0]) for name, _, line in lines])
        axes.set_xlabel("batch size, rows")
        axes.set_ylabel("output tokens per second")

    alt = "; ".join(
        f"{name}: " + ", ".join(f"{rate:.3g} at batch {batch}" for batch, rate in line)
        for name, _, line in lines
    )
    return draw(260, paint, title, alt)


def roofline(report: Entry, index: int, title: str) -> str:
    """What every phase achieves against what this machine was measured to be able to do."""
    ceilings = report["run"].get("ceilings") or {}
    roofs = {
        dtype if len(ceilings) == 1 else f"{dtype}, {device}": (c["bytes_per_s"], c["flops_per_s"])
        for device, of in ceilings.items()
        for dtype, c in of.items()
        if c["bytes_per_s"] and c["flops_per_s"]
    }
    points = _achieved(report, index, roofs)
    if not points:
        return ""
    low = min(min(x for _, _, x, _ in points), 1) / 2
    ridge = max(flops / rate for rate, flops in roofs.values())
    high = max(max(x for _, _, x, _ in points), ridge) * 3
    top = max(flops for _, flops in roofs.values()) / 1e9

    def paint(axes: Axes) -> None:
        log_axis(axes.xaxis, low, high)
        log_axis(axes.yaxis, min(y for *_, y in points) / 2e9, top * 2)
        for rate, flops in roofs.values():
            knee = flops / rate
            axes.plot([low, knee, high], [rate * low / 1e9, flops / 1e9, flops / 1e9], color=MUTED)
        tops = [(high, flops / 1e9, dtype) for dtype, (_, flops) in roofs.items()]
        for x, y, text in joined(axes, tops):
            axes.annotate(text, (x, y), (-2, 3), textcoords="offset points", ha="right",
                          color=MUTED, fontsize=8)  # fmt: skip
        for _, phase, x, y in points:
            look: dict[str, Any] = {"color": ACCENT} if phase == "decode" else {"color": ACCENT,
                    "markerfacecolor": PAPER}  # fmt: skip
            axes.plot(x, y / 1e9, "o" if phase == "decode" else "s", **look)
        number_points(axes, [(x, y / 1e9, name.split()[0]) for name, _, x, y in points])
        axes.set_xlabel("arithmetic intensity, FLOP per byte")
        axes.set_ylabel("achieved, GFLOP per second")

    alt = "; ".join(f"{n}, {p}: {x:.3g} FLOP per byte, {y / 1e9:.3g} GFLOP/s"
                    for n, p, x, y in points)  # fmt: skip
    return draw(260, paint, title, alt)


def _tradeoffs(report: Entry, index: int) -> Iterator[Point]:
    """Name, KL and speed-up per output token of every artifact that has both."""
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        gain = artifact["cells"][index]["speedup"]["tpot_s"]["ratio"]
        kl = artifact["quality"]["kl_mean"]
        if gain is not None and kl is not None:
            yield name, kl, gain


def _beaten(kl: float, gain: float, points: Sequence[Point]) -> bool:
    """Whether some other point is at least as good in both and better in one."""
    return any(k <= kl and g >= gain and (k, g) != (kl, gain) for _, k, g in points)


def _achieved(report: Entry, index: int, roofs: Mapping[str, object]) -> list[Achieved]:
    """Name, phase, FLOP per byte and FLOP per second of every phase that has them."""
    found = []
    for name, artifact in zip(names(report), report["artifacts"], strict=True):
        phases = (artifact["cells"][index].get("bottleneck") or {}).get("phase") or {}
        for phase, facts in phases.items():
            rate = _flops_per_s(artifact["cells"][index], phase, facts) if facts else None
            if rate and facts.get("intensity"):
                found.append((name, phase, facts["intensity"], rate))
    return found if roofs else []


def _flops_per_s(cell: Entry, phase: str, facts: Entry) -> float | None:
    taken = cell["prefill_s"] if phase == "prefill" else cell["tpot_s"]
    return facts["flops"] / taken if facts.get("flops") and taken else None


def timeline(report: Entry, index: int, series: Sequence[Entry], title: str) -> str:
    """Every iteration of a cell in the order of its blocks, over the median of its arm."""
    cell = report["artifacts"][0]["cells"][index]
    point = tuple(cell[key] for key in ("scenario", "batch", "prompt_tokens", "new_tokens"))
    lines: dict[tuple[str, int], list[Entry]] = {}
    for sample in series:
        if sample["cell"] == point:
            lines.setdefault((sample["arm"], sample["session"]), []).append(sample)
    if not lines:
        return ""
    every = [s for samples in lines.values() for s in samples]
    places = {at: x for x, at in enumerate(sorted({_place(s) for s in every}))}
    begins: dict[tuple[int, int], int] = {}  # of each set of processes
    for at, x in places.items():
        begins.setdefault(at[:2], x)

    def paint(axes: Axes) -> None:
        for (arm, _), samples in lines.items():
            kept = [s["e2e_s"] for s in samples if s["reason"] is None]
            middle = median(kept or [s["e2e_s"] for s in samples])
            _line(axes, [{**s, "x": places[_place(s)]} for s in samples], middle, arm == BASELINE)
        for before, after in pairwise(begins):
            killed = after[1] > before[1]
            axes.axvline(begins[after] - 0.5, color=WARN if killed else MUTED, linewidth=0.8)
        low, high = axes.get_ylim()
        log_axis(axes.yaxis, max(min(low, 0.9), 0.05), max(high, 1.1), "\u00d7")
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        axes.set_xlabel("block, warm-up included, in the order they ran")
        axes.set_ylabel("end to end, over its median")

    odd = sum(s["reason"] not in (None, "warmup") for s in every)
    alt = f"{len(every)} iterations of {len(lines)} arms, {odd} of them marked: not counted"
    return draw(210, paint, title, alt)


def _place(sample: Entry) -> tuple[int, int, bool, int]:
    """In the order of time: the warm-up counts down from -1, before the blocks of its processes."""
    block = sample["block"]
    return sample["residence"], sample["part"], block >= 0, abs(block)


def _line(axes: Axes, samples: Sequence[Entry], middle: float, base: bool) -> None:
    """One arm: its line over the blocks, and a mark on what counts in no result."""
    look: dict[str, Any] = {"color": ACCENT, "linewidth": 0.8, "alpha": 0.55}
    if base:
        look = {"color": INK, "linewidth": 1.6, "zorder": 3}
    blocks: dict[int, list[float]] = {}
    for sample in samples:  # an arm may run several times within a block
        blocks.setdefault(sample["x"], []).append(sample["e2e_s"] / middle)
    points = [(block, median(values)) for block, values in sorted(blocks.items())]
    step = -(-len(points) // MOST_BLOCKS)
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    axes.plot(*zip(*((median(column) for column in zip(*group, strict=True)) for group in groups),
                   strict=True), **look)  # fmt: skip
    for reason, mark, colour in (("warmup", "o", MUTED), ("other", "x", WARN)):
        marked = [s for s in samples if s["reason"] and (s["reason"] == "warmup") == (mark == "o")]
        axes.plot([s["x"] for s in marked], [s["e2e_s"] / middle for s in marked], mark,
                  color=colour, markersize=4, markerfacecolor=PAPER, label=reason)  # fmt: skip
