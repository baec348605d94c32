"""What was made against what was planned, where a plan leaves ranks or bits open."""

from __future__ import annotations

from dataclasses import replace

from optpipe.linear import Form, Layers


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
