"""Charts with one row an artifact: what every stage did to a number, and speed-ups with intervals.

Each takes the report and gives the ``<svg>``, or "" if there is nothing to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optpipe.bench.pages.figure import (
    ACCENT,
    INK,
    LINE,
    MUTED,
    PAPER,
    WARN,
    draw,
    log_axis,
    shorten,
)
from optpipe.bench.pages.view import (
    DASH,
    METRICS,
    Entry,
    interval,
    is_reference,
    names,
    number,
    parent,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 28.0
"""Height of an artifact in a list, points: its name, then its mark."""
WIDE_ROW = 34.0
"""With two marks."""
HEAD = 34.0
"""Height of an axis with its label, points."""
NAME = 56
"""Characters of a name and a number that fit on a line."""


def waterfall(report: Entry, key: str, title: str, scale: float, unit: str) -> str:
    """What every stage did to one number: a bar up to its value, the change in colour.

    ``key`` is a field of the first cell, 'bytes' or 'kl_mean'.
    """
    chain = [(name, artifact) for name, artifact in zip(names(report), report["artifacts"],
             strict=True) if not is_reference(report, artifact)]  # fmt: skip
    values = {id(artifact): _value(artifact, key) for _, artifact in chain}
    present = [value * scale for value in values.values() if value is not None]
    if not present or not any(present):
        return ""

    def paint(axes: Axes) -> None:
        _list_axes(axes, len(chain), 0, max(present) * 1.02)
        for row, (name, artifact) in enumerate(chain):
            value, before = values[id(artifact)], parent(report, artifact)
            text = DASH if value is None else f"{number(value, scale)} {unit}"
            _list_label(axes, row, name, text)
            if value is None:
                continue
            old = values.get(id(before))
            _bar(axes, row, value * scale, None if old is None else old * scale, before is None)

    alt = "; ".join(
        f"{name}: {number(values[id(artifact)], scale, '{:.4g}')}" for name, artifact in chain
    )
    return draw(len(chain) * ROW + 20, paint, title, f"{alt} ({unit})")


def forest(report: Entry, index: int, title: str) -> str:
    """Speed-up of every artifact over the baseline in one cell, with intervals."""
    rows = [
        (name, artifact["cells"][index]["speedup"])
        for name, artifact in zip(names(report), report["artifacts"], strict=True)
        if artifact is not report["artifacts"][0]
    ]
    ends = [
        end
        for _, speedup in rows
        for key in ("tpot_s", "ttft_s")
        if (ratio := speedup[key]["ratio"]) is not None
        for end in (ratio, *(speedup[key]["ci"] or ()))
    ]
    if not ends:
        return ""

    def paint(axes: Axes) -> None:
        _list_axes(axes, len(rows), 0, 1)
        log_axis(axes.xaxis, min(*ends, 0.8) / 1.08, max(*ends, 1.25) * 1.08, "\u00d7")
        axes.axvline(1, color=INK, linewidth=1)
        axes.set_xlabel("times faster than the baseline (log scale)")
        for row, (name, speedup) in enumerate(rows):
            main = "tpot_s" if speedup["tpot_s"]["ratio"] is not None else "ttft_s"
            _list_label(axes, row, name, _shown(main, speedup[main]))
            axes.axhline(row, color=LINE, linewidth=0.6)
            _whisker(axes, row + 0.54, speedup["tpot_s"], filled=True)
            _whisker(axes, row + 0.76, speedup["ttft_s"], filled=False)

    alt = "; ".join(
        f"{name}: TPOT {interval(s['tpot_s'])}, TTFT {interval(s['ttft_s'])}" for name, s in rows
    )
    return draw(len(rows) * WIDE_ROW + HEAD, paint, title, alt)


def _value(artifact: Entry, key: str) -> float | None:
    """A field of the first cell, of the quality or of the artifact itself."""
    for place in (artifact["cells"][0], artifact["quality"], artifact):
        if key in place:
            value: float | None = place[key]
            return value
    raise KeyError(key)


def _shown(key: str, speedup: Entry) -> str:
    return DASH if speedup["ratio"] is None else f"{METRICS[key]} {interval(speedup)}"


def _list_axes(axes: Axes, rows: int, low: float, high: float) -> None:
    """Rows from the top down; each has its name on a line of its own, however long it is."""
    axes.set_ylim(rows, 0)
    axes.set_xlim(low, high)
    axes.set_yticks([])
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="x", length=0)


def _list_label(axes: Axes, row: int, name: str, text: str) -> None:
    """On the first line of a row: the name at the left, what was found at the right."""
    for x, side, words in ((0, "left", shorten(name, NAME - len(text))), (1, "right", text)):
        axes.annotate(words, (x, row), (0, -4), xycoords=axes.get_yaxis_transform(), ha=side,
                      va="top", textcoords="offset points")  # fmt: skip


def _bar(axes: Axes, row: int, value: float, old: float | None, root: bool) -> None:
    """The value in grey, of a ``root`` in dark, and what changed since the parent in colour."""
    axes.barh(row + 0.7, value, 0.26, color=MUTED if root else LINE)
    if old is not None and old != value:
        colour = ACCENT if value < old else WARN
        axes.barh(row + 0.7, abs(value - old), 0.26, left=min(value, old), color=colour)


def _whisker(axes: Axes, y: float, speedup: Entry, filled: bool) -> None:
    ratio, ci = speedup["ratio"], speedup["ci"]
    if ratio is None:
        return
    low, high = ci or (ratio, ratio)
    colour = ACCENT if low > 1 else WARN if high < 1 else MUTED
    if ci is None:
        colour = MUTED
    axes.plot([low, high], [y, y], color=colour, solid_capstyle="butt")
    axes.plot(ratio, y, "o", color=colour, markerfacecolor=colour if filled else PAPER)
