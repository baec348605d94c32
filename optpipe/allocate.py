"""One budget for all layers: which option each takes so that the sum of their losses is least.

The multiple-choice knapsack problem (Sinha and Zoltners 1979). An option of a layer is what it
costs and what it loses: a sparsity, a rank, a number of bits. Steps along the lower convex hulls of
all layers, the best loss per cost first, give the optimum of the relaxed problem and a solution at
most one step from it; dynamic programming over the options that this bound does not rule out makes
it exact (Pisinger 1995).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST_STATES = 20_000
"""Partial solutions that are followed at a time. Beyond it the least promising go, so that the
result may miss the optimum, though it is never worse than that of the hulls."""


@dataclass(frozen=True)
class Option:
    """One thing that can be done to a layer."""

    cost: float
    """What the budget pays, such as bits or parameters."""
    loss: float
    """What is lost by it; losses of layers add up."""


Curves = Mapping[str, Sequence[Option]]
"""The options of every layer, in any order."""


def allocate(curves: Curves, budget: float) -> dict[str, int]:
    """The option of every layer, by its place in the list, that costs at most ``budget`` in all.

    Raises ValueError if even the cheapest options cost more, or if a layer has none.
    """
    for name, options in curves.items():
        if not options:
            raise ValueError(f"layer '{name}' has no option")
        if not all(math.isfinite(o.cost) and math.isfinite(o.loss) for o in options):
            raise ValueError(f"layer '{name}' has an option whose cost or loss is not finite")
    cheapest = math.fsum(min(o.cost for o in options) for options in curves.values())
    if cheapest > budget:
        raise ValueError(
            f"a budget of {budget:g} is below {cheapest:g}, the least that is possible"
        )
    hulls = {name: _hull(options) for name, options in curves.items()}
    greedy, price = _greedy(curves, hulls, budget)
    return _exact(curves, budget, greedy, price)


def total(curves: Curves, chosen: Mapping[str, int]) -> Option:
    """What the chosen options cost and lose together."""
    taken = [curves[name][index] for name, index in chosen.items()]
    return Option(math.fsum(o.cost for o in taken), math.fsum(o.loss for o in taken))


def _hull(options: Sequence[Option]) -> list[int]:
    """Options on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].loss)):
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options, *hull[-2:]) <= _slope(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(options: Sequence[Option], i: int, j: int) -> float:
    """Loss saved per cost from option i to the dearer option j."""
    one, other = options[i], options[j]
    return (one.loss - other.loss) / (other.cost - one.cost)


def _greedy(
    curves: Curves, hulls: Mapping[str, list[int]], budget: float
) -> tuple[dict[str, int], float]:
    """The hull steps that fit, steepest first, and the slope of the first that does not."""
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - total(curves, chosen).cost
    steps = [
        (_slope(curves[name], *pair), place, name, pair)
        for place, (name, hull) in enumerate(hulls.items())
        for pair in pairwise(hull)
    ]
    price, stuck = 0.0, set()
    for slope, _, name, (i, j) in sorted(steps, key=lambda s: (-s[0], s[1], s[3])):
        step = curves[name][j].cost - curves[name][i].cost
        if name in stuck:
            continue
        if step > left:  # later steps of this layer would cost more still
            stuck.add(name)
            price = price or slope
            continue
        chosen[name], left = j, left - step
    return chosen, price


def _exact(curves: Curves, budget: float, start: dict[str, int], price: float) -> dict[str, int]:
    """Partial solutions, layer by layer, that may still beat ``start``.

    With the budget at a ``price``, an option exceeds the best of its layer by some loss + price *
    cost; a partial solution that has exceeded by more than ``start`` does in all is dropped.
    """
    names = list(curves)
    costs = [np.array([o.cost for o in curves[n]]) for n in names]
    losses = [np.array([o.loss for o in curves[n]]) for n in names]
    priced = [loss + price * cost for loss, cost in zip(losses, costs, strict=True)]
    floor = float(sum(p.min() for p in priced)) - price * budget
    best = total(curves, start)
    spare = best.loss - floor
    after = np.cumsum([c.min() for c in reversed(costs)])[::-1]  # least cost from each layer on
    state = _States(np.zeros(1), np.zeros(1), np.zeros(1))
    trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for i in range(len(names)):
        rest = float(after[i + 1]) if i + 1 < len(names) else 0.0
        state, parent, option = state.extended(
            costs[i], losses[i], priced[i] - priced[i].min(), budget - rest, spare
        )
        trail.append((parent, option))
    if not len(state.loss) or state.loss[-1] >= best.loss:
        return start
    chosen, at = {}, len(state.loss) - 1  # states are in order of falling loss
    for name, (parent, option) in zip(reversed(names), reversed(trail), strict=True):
        chosen[name], at = int(option[at]), int(parent[at])
    return {name: chosen[name] for name in names}


@dataclass(frozen=True)
class _States:
    """Partial solutions, none of which is both cheaper and better than another."""

    cost: NDArray[np.float64]
    loss: NDArray[np.float64]
    excess: NDArray[np.float64]
    """Loss beyond what the relaxed problem must lose for the same layers."""

    def extended(
        self,
        costs: NDArray[np.float64],
        losses: NDArray[np.float64],
        excess: NDArray[np.float64],
        most: float,
        spare: float,
    ) -> tuple[_States, NDArray[np.intp], NDArray[np.intp]]:
        """Every option of one more layer added to every state, with where each came from."""
        cost, loss, over = (
            np.add.outer(a, b).ravel()
            for a, b in ((self.cost, costs), (self.loss, losses), (self.excess, excess))
        )

        keep = np.flatnonzero((cost <= most) & (over <= spare * (1 + 1e-9)))
        keep = keep[np.lexsort((loss[keep], cost[keep]))]
        before = np.minimum.accumulate(np.concatenate(([np.inf], loss[keep])))[:-1]
        keep = keep[loss[keep] < before]
        if len(keep) > MOST_STATES:
            keep = np.sort(keep[np.argpartition(over[keep], MOST_STATES)[:MOST_STATES]])
            keep = keep[np.lexsort((loss[keep], cost[keep]))]
        parent, option = np.divmod(keep, len(costs))
        return _States(cost[keep], loss[keep], over[keep]), parent, option
