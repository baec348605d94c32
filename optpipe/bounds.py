"""What was made against what was planned, where a plan leaves ranks, bits or forms open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from optpipe.linear import Form, Layers


@dataclass(frozen=True, kw_only=True)
class Open(Form):
    """Only in a plan: the stage settles on one of several forms as it runs.

    Its own fields are those of the largest that is quantized.
    """

    options: tuple[Form, ...]

    def stored_bits(self, float_bits: int = 16, density: float = 1.0) -> float:
        """Of the largest of its forms."""
        return max(form.stored_bits(float_bits, density) for form in self.options)


def settled(layers: Layers) -> list[Layers]:
    """What a plan with open forms or bits may become: all first choices, all second ones, ...

    and one in which neighbours took different ones; of open forms, the parts of a block, since
    those that settle on forms keep layers alike that are multiplied as one. Nothing if nothing is
    open.
    """
    options = {name: choices for name, form in layers.items() if (choices := _options(form))}
    found = [
        layers | {name: forms[index % len(forms)] for name, forms in options.items()}
        for index in range(max(map(len, options.values()), default=0))
    ]
    alike = {name: name if layers[name].choices else name.rpartition(".")[0] for name in options}
    turns = {part: turn for turn, part in enumerate(dict.fromkeys(alike.values()))}
    if len(turns) > 1:  # the last ones first: an open form begins with what is not quantized
        mixed = {n: forms[-1 - turns[alike[n]] % len(forms)] for n, forms in options.items()}
        found.append(layers | mixed)
    return found


def _options(form: Form) -> Sequence[Form]:
    """What an open form may settle on."""
    if isinstance(form, Open):
        return form.options
    return [replace(form, bits=bits, choices=None) for bits in form.choices or ()]


def divisor(name: str, form: Form) -> int:
    """What surely divides the inputs of a planned layer, whatever its rank turns out to be."""
    return form.bound if form.bound and name.endswith(".left") else form.cols


def ends(name: str, form: Form) -> list[Form]:
    """A planned layer at the largest and, if its rank is open, at the smallest rank there may be.

    One that stays whole, though planned as factors, has no more scales for its weights than these.
    """
    if form.bound and name.endswith(".right"):
        return [form, replace(form, rows=form.bound)]
    if form.bound and name.endswith(".left"):
        return [form, replace(form, cols=form.bound)]
    return [form]


def departure(made: Layers, planned: Layers) -> str | None:
    """The first layer that is not as planned; None if all are, within the bounds of the plan."""
    left = dict(planned)
    for name, form in made.items():
        if name.endswith(".right") and not _fits(form, made.get(name[: -len("right")] + "left")):
            return name
        if name in left and _within(name, form, left.pop(name)):
            continue
        right, other = left.pop(f"{name}.right", None), left.pop(f"{name}.left", None)
        if not (right and other and right.bound and other.bound):
            return name
        if not _within(name, form, replace(right, rows=other.rows)):
            return name
    return next(iter(left), None)


def _within(name: str, form: Form, plan: Form) -> bool:
    if isinstance(plan, Open):
        return form in plan.options
    settled = replace(plan, bound=None, choices=None)
    if plan.bound and name.endswith(".right"):
        settled = replace(settled, rows=_settled(form.rows, plan.rows, plan.bound))
    elif plan.bound and name.endswith(".left"):
        settled = replace(settled, cols=_settled(form.cols, plan.cols, plan.bound))
    if plan.choices and form.bits in plan.choices:
        settled = replace(settled, bits=form.bits)
    return form == settled


def _fits(right: Form, left: Form | None) -> bool:
    return left is not None and left.cols == right.rows


def _settled(rank: int, most: int, multiple: int) -> int:
    return rank if 0 < rank <= most and rank % multiple == 0 else most
