"""What was made is what was planned, or within what the plan left open."""

from dataclasses import replace

import pytest

from optpipe.bounds import departure, divisor
from optpipe.linear import Form


def factors(rank, bound=None, **fields):
    right = Form(rows=rank, cols=96, bound=bound, **fields)
    return {"a.right": right, "a.left": Form(rows=64, cols=rank, bound=bound, **fields)}


B = Form(rows=8, cols=8)
MIXED = {"bits": 8, "choices": (3, 4, 8)}


@pytest.mark.parametrize(
    ("made", "planned", "name"),
    [
        ({"b": B}, {"b": B}, None),
        ({"b": B}, {"b": Form(rows=8, cols=9)}, "b"),
        ({"b": B}, {}, "b"),
        ({}, {"b": B}, "b"),
        (factors(16), factors(32), "a.right"),
        (factors(16), factors(32, bound=16), None),
        (factors(24), factors(32, bound=16), "a.right"),
        (factors(48), factors(32, bound=16), "a.right"),
        ({"a": Form(rows=64, cols=96)}, factors(32, bound=16), None),
        ({"a": Form(rows=64, cols=96)}, factors(32), "a"),
        ({"a": Form(rows=64, cols=64)}, factors(32, bound=16), "a"),
        (factors(16, bits=3), factors(32, bound=16, **MIXED), None),
        (factors(16, bits=2), factors(32, bound=16, **MIXED), "a.right"),
        (factors(16, bits=3), factors(32, **MIXED), "a.right"),  # mixed leaves ranks alone
        (factors(32, bits=3), factors(32, **MIXED), None),
        (factors(32), factors(32, **MIXED), "a.right"),
        ({"a": Form(rows=64, cols=96, bits=8)}, factors(32, **MIXED), "a"),
        ({"a": Form(rows=64, cols=96, bits=8)}, factors(32, bound=16, **MIXED), None),
        ({"b": replace(B, bits=3)}, {"b": replace(B, **MIXED)}, None),
        ({"b": replace(B, bits=2)}, {"b": replace(B, **MIXED)}, "b"),
        ({"b": replace(B, bits=3)}, {"b": replace(B, bits=4)}, "b"),
        ({**factors(16), "a.left": Form(rows=64, cols=32)}, factors(32, bound=16), "a.right"),
        (factors(16, bits=8), factors(32, bound=16, bits=4), "a.right"),
        (factors(16), factors(32, bound=16, bits=4), "a.right"),
        (factors(16, bits=4), factors(32, bound=16), "a.right"),
    ],
)
def test_what_was_made_is_what_was_planned_or_within_its_bounds(made, planned, name):
    assert departure(made, planned) == name


def test_a_rank_that_is_still_open_promises_its_multiple_only():
    planned = factors(96, bound=16)
    assert divisor("a.left", planned["a.left"]) == 16
    assert divisor("a.right", planned["a.right"]) == 96
    assert divisor("b", B) == 8
