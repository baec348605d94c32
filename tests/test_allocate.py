"""One budget for all layers, against trying everything."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpipe import allocate as module
from optpipe.allocate import Option, allocate, total

options = st.lists(
    st.builds(Option, st.integers(0, 30).map(float), st.integers(0, 50).map(float)),
    min_size=1,
    max_size=4,
)
curves = st.lists(options, min_size=1, max_size=5).map(
    lambda rows: {f"layer{i}": row for i, row in enumerate(rows)}
)


def tried(curves, budget):
    """The least loss of all combinations within the budget."""
    sums = (total(curves, dict(zip(curves, chosen, strict=True))) for chosen in
            product(*(range(len(o)) for o in curves.values())))  # fmt: skip
    return min((found.loss for found in sums if found.cost <= budget), default=None)


@settings(deadline=None, max_examples=300)
@given(curves, st.integers(0, 100))
def test_it_is_the_best_of_all_combinations(curves, budget):
    best = tried(curves, budget)
    if best is None:
        with pytest.raises(ValueError, match=f"a budget of {budget} is below"):
            allocate(curves, budget)
        return
    found = total(curves, allocate(curves, budget))
    assert found.cost <= budget and found.loss == best


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_it_is_never_worse_than_the_same_option_for_all(seed, share):
    """Curves as sparsities or ranks give them: the same levels everywhere, falling losses."""
    import numpy as np

    rng = np.random.default_rng(seed)
    many = {}
    for layer in range(40):
        losses = np.sort(rng.exponential(size=12))[::-1] * rng.lognormal(sigma=2)
        size = rng.integers(1, 9) * 100
        many[f"{layer}"] = [Option(float(size * k), float(x)) for k, x in enumerate(losses, 1)]
    level = int(share * 12)
    uniform = total(many, dict.fromkeys(many, level))
    found = total(many, allocate(many, uniform.cost))
    assert found.cost <= uniform.cost and found.loss <= uniform.loss


def test_it_leaves_less_of_the_budget_than_one_step():
    many = {f"{i}": [Option(float(k), 2.0**-k * (i + 1)) for k in range(9)] for i in range(30)}
    assert total(many, allocate(many, 100.5)).cost == 100


def test_the_optimum_that_steps_along_the_hulls_miss():
    pair = {"a": [Option(0, 10), Option(6, 0)], "b": [Option(0, 9), Option(5, 0)],
            "c": [Option(0, 9), Option(5, 0)]}  # fmt: skip
    assert allocate(pair, 10) == {"a": 0, "b": 1, "c": 1}
    assert allocate(pair, 10.99) == {"a": 0, "b": 1, "c": 1}
    assert allocate(pair, 11)["a"] == 1


def test_with_hardly_any_states_it_is_still_no_worse_than_the_hulls(monkeypatch):
    import numpy as np

    rng = np.random.default_rng(0)
    many = {f"{i}": [Option(float(c), float(x)) for c, x in rng.uniform(1, 9, (6, 2))]
            for i in range(20)}  # fmt: skip
    hulls = {name: module._hull(o) for name, o in many.items()}
    greedy, _ = module._greedy(many, hulls, 80)
    best = total(many, allocate(many, 80)).loss
    monkeypatch.setattr(module, "MOST_STATES", 2)
    few = total(many, allocate(many, 80))
    assert few.cost <= 80 and best <= few.loss <= total(many, greedy).loss


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({"a": []}, "layer 'a' has no option"),
        ({"a": [Option(1, float("nan"))]}, "layer 'a' .* not finite"),
        ({"a": [Option(3, 1)], "b": [Option(4, 0)]}, "a budget of 5 is below 7"),
    ],
)
def test_what_cannot_be_allocated_is_refused(curves, message):
    with pytest.raises(ValueError, match=message):
        allocate(curves, 5)
