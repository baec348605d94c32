from types import SimpleNamespace

import pytest

from optpipe.bench.timed.contention import Ticks, Watch, meter_of, ticks


def watched(cpu_s=2.0, history=5):
    watch = Watch(meter=lambda: None, cores=4)
    for _ in range(history):
        assert watch.disturbed("arm", 1.0, cpu_s, Ticks(busy_s=0, stolen_s=0),
                               Ticks(busy_s=cpu_s + 0.2, stolen_s=0.04)) is None  # fmt: skip
    return watch


def test_an_arm_that_gets_less_of_the_cpu_than_usual_was_disturbed():
    assert watched().disturbed("arm", 1.0, 1.4, None, None) is None
    assert "1.30 cores where 2.00" in watched().disturbed("arm", 1.0, 1.3, None, None)


def test_an_arm_that_needs_fewer_cores_from_now_on_is_not_disturbed_for_long():
    watch = watched(history=9)
    said = [watch.disturbed("arm", 1.0, 1.0, None, None) for _ in range(8)]
    assert all(said[:3]) and not any(said[4:])


def test_nothing_is_unusual_before_there_is_a_history():
    assert watched(history=2).disturbed("arm", 1.0, 0.1, None, None) is None


def test_an_arm_that_waits_is_not_judged_by_cpu_time():
    assert watched(cpu_s=0.1).disturbed("arm", 1.0, 0.01, None, None) is None


@pytest.mark.parametrize(
    ("busy_s", "stolen_s", "said"),
    [(3.1, 0.04, None), (3.3, 0.04, "other processes"), (2.2, 0.4, None), (2.2, 0.5, "hypervisor")],
)
def test_a_burst_of_others_above_what_is_usual(busy_s, stolen_s, said):
    before, after = Ticks(busy_s=0, stolen_s=0), Ticks(busy_s=busy_s, stolen_s=stolen_s)
    found = watched().disturbed("arm", 1.0, 2.0, before, after)
    assert found is None if said is None else said in found


def test_a_gpu_that_is_slowed_now_and_then_taints_the_turn_and_one_that_always_is_does_not():
    def turns(slowed):
        watch, still = Watch(meter=lambda: None, cores=4), Ticks(busy_s=0, stolen_s=0)
        after = [Ticks(busy_s=0, stolen_s=0, slowed=why) for why in slowed]
        return [watch.disturbed("arm", 1.0, 0.1, still, one) for one in after]

    hot = "thermal, hardware"
    assert turns([""] * 5 + [hot, ""]) == [None] * 5 + [f"the GPU was slowed: {hot}", None]
    assert not any(turns([hot] * 9)), "it falls on all arms alike"
    assert not any(turns([hot, hot, hot])), "nothing is unusual yet"


def test_the_meter_of_gpus_tells_what_slows_each():
    said = {"GPU-1": "", "GPU-2": "power brake"}
    read = meter_of(said, lambda uuid: SimpleNamespace(slowed=lambda: said[uuid]))
    assert read() is None or read().slowed == "power brake"
    said["GPU-2"] = ""
    assert read() is None or read().slowed == ""


def test_this_machine_tells_its_ticks():
    found = ticks()
    assert found is None or (found.busy_s > 0 and found.stolen_s >= 0)
