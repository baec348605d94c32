import multiprocessing

import pytest

from optpipe.bench.resident import plan_twice, reside
from optpipe.bench.timed.samples import AGAIN


def test_the_baseline_is_resident_twice_where_that_unpairs_no_arm():
    sizes = {"baseline": 4, "a": 3, "b": 2}
    assert plan_twice(sizes, 13, AGAIN) == ([["baseline", AGAIN, "a", "b"]], {})
    assert plan_twice(sizes, 11, AGAIN)[0] == [["baseline", AGAIN, "a"], ["baseline", AGAIN, "b"]]
    assert plan_twice(sizes, 10, AGAIN)[0] == [["baseline", "a", "b"]]
    assert plan_twice(sizes, 3, AGAIN)[0] == [["a"], ["b"]]


@pytest.mark.parametrize("fault", ["load", "die_loading"])
def test_an_arm_that_breaks_while_it_is_loaded_leaves_the_others_alone(arm, fault):
    with reside([arm("good"), arm("bad", fault=fault)], lambda *what: None) as residents:
        assert [*residents.workers] == [*residents.loaded] == ["good"]
        assert "arm 'bad', loading" in residents.broken["bad"]
    assert multiprocessing.active_children() == []
