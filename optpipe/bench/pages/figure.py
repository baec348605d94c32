"""One chart as an SVG element: the font of the page, and colours that follow its light or dark
theme, since every colour drawn here is a stand-in for a variable of report.css.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, LINE, ACCENT, WARN, PAPER = (f"#01010{n}" for n in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", WARN: "warn",
             PAPER: "paper"}  # fmt: skip
WIDTH = 360
"""Points; a phone shows about as many pixels, so that text keeps its size."""
TEXT = 9.5
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": TEXT, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": LINE, "axes.linewidth": 0.8, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": LINE, "grid.linewidth": 0.6, "xtick.color": LINE, "ytick.color": LINE,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5, "axes.labelsize": 8.5, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "lines.markersize": 5, "lines.linewidth": 1.5,
}  # fmt: skip


def draw(height: float, paint: Callable[[Axes], None], title: str, alt: str) -> str:
    """A chart of ``WIDTH`` by ``height`` points as ``<svg>``, with its title and text for those
    who cannot see it. ``paint`` draws into axes that fill it."""
    import matplotlib  # takes a second, and only a report needs it
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's font has it
        close = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout=close)
        paint(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _embed(stream.getvalue(), name, title, alt)


def log_axis(axis: Any, low: float, high: float, unit: str = "") -> None:
    """A log axis from ``low`` to ``high`` with a few round ticks, written out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("log")
    axis.set_view_interval(low, high, ignore=True)
    axis.set_major_locator(FixedLocator(ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers between two limits for a log axis, at most ``most``."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9),
        (1, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ):
        found = [float(f"{s}e{d}") for d in decades for s in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def shorten(text: str, most: int) -> str:
    """A long name with its middle left out."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}\u2026{text[len(text) - (most - 1 - head) :]}"


def number_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write a mark beside every point (x, y, mark)."""
    for x, y, text in joined(axes, points):
        axes.annotate(text, (x, y), (5, 3), textcoords="offset points", fontsize=8.5)


def joined(
    axes: Axes, points: Sequence[tuple[float, float, str]]
) -> Iterator[tuple[float, float, str]]:
    """The marks of points, those that would be written over each other as one, beside them all."""
    place, back = axes.transData.transform, axes.transData.inverted().transform
    spots: list[tuple[Any, list[str]]] = []
    for x, y, mark in sorted(points):
        spot = place((x, y))
        for index, (at, marks) in enumerate(spots):
            width = TEXT * (0.5 + 0.5 * len(", ".join(marks)))
            if abs(at[1] - spot[1]) < TEXT and spot[0] - at[0] < width:
                spots[index] = (np.maximum(at, spot), [*marks, mark])
                break
        else:
            spots.append((spot, [mark]))
    for at, marks in spots:
        text = ", ".join(sorted(dict.fromkeys(marks), key=lambda mark: (len(mark), mark)))
        x, y = back(at)
        yield x, y, text


def _embed(svg: str, name: str, title: str, alt: str) -> str:
    """Only what a page needs: no metadata, no style sheet, no identifier that could clash."""
    root = ET.fromstring(re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", svg,
                                flags=re.DOTALL))  # fmt: skip
    used = {*re.findall(r'(?:url\(|href=")#([^")]+)', svg)}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        given = {key.rpartition("}")[2]: _recolour(value, name) for key, value in element.items()}
        if element.get("id") in used:
            given["id"] = f"{name}-{element.get('id')}"
        else:
            given.pop("id", None)
        element.attrib.clear()
        element.attrib.update(given)
        for style in element.findall("style") + element.findall("{*}style"):
            element.remove(style)
    for index, (tag, text) in enumerate({"title": title, "desc": alt}.items()):
        about = ET.Element(tag, {"id": f"{name}-{tag}"})
        about.text = text
        root.insert(index, about)
    box = root.get("viewBox", "")
    root.attrib.clear()
    labels = f"{name}-title {name}-desc"
    root.attrib.update({"viewBox": box, "role": "img", "aria-labelledby": labels})
    return ET.tostring(root, encoding="unicode")


def _recolour(value: str, name: str) -> str:
    for colour, variable in VARIABLES.items():
        value = value.replace(colour, f"var(--{variable})")
    value = re.sub(r"font: ([\d.]+)px [^;]*", r"font-size: \1px", value)
    return re.sub(r"(url\(|^)#(?=\w{6,})", rf"\1#{name}-", value)
