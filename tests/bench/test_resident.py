import multiprocessing

import pytest

from optpipe.bench.resident import content_hash, plan_twice, reside
from optpipe.bench.samples import AGAIN


def test_the_baseline_is_resident_twice_where_that_unpairs_no_arm():
    sizes = {"baseline": 4, "a": 3, "b": 2}
    assert plan_twice(sizes, 13, AGAIN) == ([["baseline", AGAIN, "a", "b"]], {})
    assert plan_twice(sizes, 11, AGAIN)[0] == [["baseline", AGAIN, "a"], ["baseline", AGAIN, "b"]]
    assert plan_twice(sizes, 10, AGAIN)[0] == [["baseline", "a", "b"]]
    assert plan_twice(sizes, 3, AGAIN)[0] == [["a"], ["b"]]


def test_the_hash_is_of_every_byte_but_the_manifest(tmp_path):
    (tmp_path / "weights").write_bytes(b"1234")
    before = content_hash(tmp_path)
    (tmp_path / "artifact.json").write_text("{}")
    assert content_hash(tmp_path) == before
    (tmp_path / "weights").write_bytes(b"1235")
    assert content_hash(tmp_path) != before


@pytest.mark.parametrize("fault", ["load", "die_loading"])
def test_an_arm_that_breaks_while_it_is_loaded_leaves_the_others_alone(arm, fault):
    with reside([arm("good"), arm("bad", fault=fault)], lambda *what: None) as residents:
        assert [*residents.workers] == [*residents.loaded] == ["good"]
        assert "arm 'bad', loading" in residents.broken["bad"]
    assert multiprocessing.active_children() == []
