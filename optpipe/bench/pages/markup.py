"""The few HTML elements a report is made of. All text is escaped here, whatever it holds."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Safe(str):
    """Markup that is complete: it is not escaped again."""

    def __add__(self, other: str) -> Safe:
        return Safe(str(self) + text(other))


def text(content: str) -> Safe:
    return content if isinstance(content, Safe) else Safe(html.escape(content))


def join(parts: Iterable[str], between: str = "") -> Safe:
    return Safe(between.join(text(part) for part in parts))


def tag(name: str, content: str, **attributes: str) -> Safe:
    """<name attribute="...">content</name>; a trailing _ in an attribute's name is dropped."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    return Safe(f"<{name}{given}>{text(content)}</{name}>")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], name: str, kind: str = "") -> Safe:
    """A table that scrolls sideways on its own; the first column names the row.

    Columns of words are set to the left. ``kind``: a class of report.css, such as 'cards' for rows
    that become cards on a phone.
    """
    lines = [*rows]
    sides = [
        "words" if any(line[column][:1].isalpha() or isinstance(line[column], Safe)
                       for line in lines) else "numbers"
        for column in range(len(header))
    ]  # fmt: skip
    head = join(tag("th", title, scope="col", class_=side)
                for title, side in zip(header, sides, strict=True))  # fmt: skip
    body = [
        tag("th", line[0], scope="row")
        + join(tag("td", cell, data_label=title, class_=side)
               for title, cell, side in zip(header[1:], line[1:], sides[1:], strict=True))
        for line in lines
    ]  # fmt: skip
    filled = tag("tbody", join(tag("tr", Safe(line)) for line in body))
    whole = tag("table", tag("thead", tag("tr", head)) + filled, class_=kind)
    return tag("div", whole, class_="scroll", role="region", tabindex="0", aria_label=name)


def figure(title: str, svg: str, read: str = "") -> Safe:
    """A chart under its title, with a sentence on how to read it."""
    caption = join([tag("strong", title), *([" ", read] if read else [])])
    return tag("figure", join([tag("figcaption", caption), Safe(svg)]))


def section(title: str, *parts: str) -> Safe:
    return tag("section", join([tag("h2", title), *parts]))


def details(summary: str, content: str) -> Safe:
    """Content that is folded away at first."""
    return tag("details", join([tag("summary", summary), content]))


def bullets(lines: Iterable[str]) -> Safe:
    return tag("ul", join(tag("li", line) for line in lines))


def note(line: str) -> Safe:
    return tag("p", line, class_="note")
