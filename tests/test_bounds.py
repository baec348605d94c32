"""What was made is what was planned, or within what the plan left open."""

from dataclasses import replace

import pytest

from optpipe.bounds import departure, divisor, settled
from optpipe.calibrate import Calib
from optpipe.errors import InputError
from optpipe.export.vllm import Vllm
from optpipe.linear import Form
from optpipe.pipeline import check
from optpipe.quant.mixed import Mixed
from optpipe.source import HuggingFace


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


def test_an_open_plan_may_become_each_choice_for_all_and_a_mixture():
    forms = Form(rows=8, cols=8, bits=8, choices=(4, 8)), Form(rows=8, cols=8)
    plan = {"a": forms[0], "b": forms[0], "c": forms[1]}
    found = [tuple(form.bits for form in made.values()) for made in settled(plan)]
    assert found == [(4, 4, None), (8, 8, None), (8, 4, None)]
    assert all(departure(made, plan) is None for made in settled(plan))
    assert settled({"c": forms[1]}) == []


@pytest.mark.parametrize(
    ("bits", "targets", "reason"),
    [
        ([3, 8], "*.down_proj", "kernels for 4 and 8 bits, not for 3"),
        ([4, 8], "*", "as one layer, but they are stored in different forms"),
        ([4, 8], "*.down_proj", None),
    ],
)
def test_what_a_plan_may_settle_on_is_refused_before_it_does(bits, targets, reason, tiny, tmp_path):
    calib = Calib(source="random", samples=1, tokens=8)
    quant = Mixed(bits=bits, average_bits=9, group_size=32, targets=[targets], calib=calib)
    stages, source = {"quant": quant, "export": Vllm()}, HuggingFace(path=str(tiny()))
    if reason is None:
        assert check(stages, source, tmp_path)
        return
    with pytest.raises(InputError, match=f"stage 'export': .*{reason}"):
        check(stages, source, tmp_path)


def test_a_rank_that_is_still_open_promises_its_multiple_only():
    planned = factors(96, bound=16)
    assert divisor("a.left", planned["a.left"]) == 16
    assert divisor("a.right", planned["a.right"]) == 96
    assert divisor("b", B) == 8
