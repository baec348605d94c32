"""Energy of arms of known power on a virtual clock, by counters that advance in steps."""

import numpy as np
import pytest
import reports
from test_preflight import Driver

from optpipe.bench import energy, nvml
from optpipe.bench.pages import html, schema, tables
from optpipe.bench.policy import BenchConfig
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.blocks import Session
from optpipe.bench.timed.samples import AGAIN, Measured
from optpipe.bench.worker import Loaded
from optpipe.errors import InputError, StageError

CELL, SERVED = Cell("single", 2, 8, 3), Cell("server", 1, 8, 3)
IDLE_W, ITERATION_S = 90.0, 0.25


class World:
    """A clock that stands unless someone waits, and a device that takes power as told."""

    def __init__(self, step_s=0.05):
        self.now_ns, self.watts, self.taken, self.step_s, self.name = 0, IDLE_W, 7.0, step_s, "mock"
        self.shown, self.shown_ns = 7.0, 0

    def clock(self):
        return self.now_ns

    def wait(self, seconds):
        """What was taken appears at every multiple of the step of the counter."""
        end_ns, step_ns = self.now_ns + round(seconds * 1e9), round(self.step_s * 1e9)
        while self.now_ns < end_ns:
            next_ns = min(end_ns, (self.now_ns // step_ns + 1) * step_ns)
            self.taken += self.watts * (next_ns - self.now_ns) / 1e9
            self.now_ns = next_ns
            if next_ns % step_ns == 0:
                self.shown = self.taken

    def joules(self):
        return self.shown


class Arm:
    """A worker whose work takes a known power."""

    def __init__(self, world, watts):
        self.world, self.watts, self.killed = world, watts, False

    def submit(self, work, doing):
        self.begin_ns, self.work, self.world.watts = self.world.now_ns, work, self.watts

    def answered(self, timeout_s):
        self.world.wait(timeout_s)
        return self.world.now_ns - self.begin_ns >= self.work.seconds * 1e9

    def result(self, doing, timeout_s):
        self.world.watts = IDLE_W
        if not self.watts:
            raise StageError("it burned")
        taken_ns = self.world.now_ns - self.begin_ns
        iterations = int(taken_ns / 1e9 / ITERATION_S)
        return energy.Worked(
            begin_ns=self.begin_ns, end_ns=self.world.now_ns, iterations=iterations
        )

    def kill(self):
        self.killed = True


@pytest.fixture
def counted(monkeypatch):
    """counted(world, watts of each arm) -> what was found of CELL and SERVED."""

    def call(world, find=None, seconds=20.0, **watts):
        monkeypatch.setattr(energy.time, "sleep", world.wait)
        told = Loaded(load_s=1, capacity=64, vocab=11, weight_bytes=9, dtype="f", device="cpu")
        session = Session(
            number=0, workers={name: Arm(world, w) for name, w in watts.items()},
            loaded=dict.fromkeys(watts, told), budget_s=1.0, clock=world.clock,
        )  # fmt: skip
        found, config = Measured(rates={SERVED: 1.0}), BenchConfig(energy_s=seconds)
        energy.measure_energy(
            session, [CELL, SERVED], config, found, lambda *_: None, find or (lambda _: world)
        )
        return found

    return call


@pytest.mark.parametrize("step_s", [0.001, 0.02, 0.1])
def test_known_powers_are_found_whatever_the_step_of_the_counter(counted, step_s):
    found = counted(World(step_s), baseline=400.0, other=250.0, **{AGAIN: 400.0})
    assert {name for name, _ in found.energy} == {"baseline", "other"}
    for name, watts in (("baseline", 400.0), ("other", 250.0)):
        told = found.energy[name, CELL]
        wanted = {
            "power_w": watts, "idle_w": IDLE_W,
            "j_per_request": watts * ITERATION_S / 2, "j_per_token": watts * ITERATION_S / 6,
            "j_per_request_above_idle": (watts - IDLE_W) * ITERATION_S / 2,
            "j_per_token_above_idle": (watts - IDLE_W) * ITERATION_S / 6,
        }  # fmt: skip
        assert {key: told[key] for key in wanted} == pytest.approx(wanted, rel=2e-3)
        assert told["window_s"] == pytest.approx(20, abs=0.02) and told["reasons"] == {}
        assert found.energy[name, SERVED] == energy.SERVED


def test_a_counter_that_is_too_slow_says_nothing(counted):
    found = counted(World(step_s=0.25), baseline=400.0)
    assert "79 updates of the counter in 20.0 s; 100 in 10 s" in found.energy["baseline", CELL]


def test_work_that_takes_no_more_than_rest_has_no_energy_above_it(counted):
    told = counted(World(), baseline=IDLE_W - 1).energy["baseline", CELL]
    assert told["j_per_token"] > 0 and told["j_per_token_above_idle"] is None
    assert "not above those when idle" in told["reasons"]["j_per_token_above_idle"]


def test_no_counter_and_a_dead_arm_are_reasons(counted):
    def none(gpu):
        raise OSError("no such thing")

    found = counted(World(), find=none, baseline=400.0)
    assert found.energy["baseline", CELL] == "no counter of energy: no such thing"
    found = counted(World(), baseline=0.0)
    assert "while its energy was counted: it burned" in found.energy["baseline", CELL]
    assert found.dead["baseline"] == found.energy["baseline", CELL]


@pytest.mark.parametrize(("seconds", "updates"), [(9.9, 200), (11.0, 98)])
def test_short_windows_and_few_updates_are_refused(seconds, updates):
    steps = [(int(n * seconds / updates * 1e9), float(n)) for n in range(updates + 2)]
    assert "fewest" in energy.power(steps, 0, int(seconds * 1e9))


def test_work_repeats_whole_iterations(local):
    backend = local("baseline").backend
    ids_BS = np.zeros((1, 4), np.int64)
    worked = energy.Work(ids_BS=ids_BS, new_tokens=2, seconds=0.01)(backend)
    assert worked.iterations >= 1 and worked.end_ns - worked.begin_ns >= 1e7


def test_rapl_adds_the_packages_and_goes_on_where_they_wrap(tmp_path):
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"),
                       ("intel-rapl:2", "dram")):  # fmt: skip
        (tmp_path / zone).mkdir()
        for file, text in (("name", name), ("max_energy_range_uj", "1000000"),
                           ("energy_uj", "900000")):  # fmt: skip
            (tmp_path / zone / file).write_text(f"{text}\n")
    counter = energy.Rapl(tmp_path)
    before = counter.joules()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("950000")
    assert counter.joules() - before == pytest.approx(0.2 + 0.05)
    with pytest.raises(OSError, match="no CPU package"):
        energy.Rapl(tmp_path / "nowhere")


def test_nvml_counts_millijoules_of_the_gpu_with_that_uuid():
    class Stand(Driver):
        def _answer(self, name, given):
            if name == "nvmlDeviceGetHandleByUUID":
                assert given[0].value == b"GPU-7"
            elif name == "nvmlDeviceGetTotalEnergyConsumption":
                given[1]._obj.value = 2**40
            elif given:
                return super()._answer(name, given)
            return nvml.OK

    board = nvml.Board("GPU-7", Stand())
    assert (board.joules(), board.watts(), board.slowed()) == (2**40 / 1e3, 123.456, "")
    hot = Stand()
    hot.bits = 0x40 | 0x4
    assert nvml.Board("GPU-7", hot).slowed() == "thermal, hardware", "a power cap is normal"
    with pytest.raises(OSError, match="counts no energy of this GPU"):
        nvml.Board("GPU-7", Stand(nvmlDeviceGetTotalEnergyConsumption=3)).joules()
    with pytest.raises(OSError, match="no GPU 'GPU-7'"):
        nvml.Board("GPU-7", Stand(nvmlDeviceGetHandleByUUID=6))


def test_reports_show_what_was_counted_and_why_the_rest_was_not(counted):
    found = reports.report(cells=1)
    told = counted(World(), baseline=400.0).energy["baseline", CELL]
    first, second = (artifact["cells"][0] for artifact in found["artifacts"][:2])
    first["energy"], second["energy"] = dict(told), None
    second["reasons"] = {**second["reasons"], "energy": energy.OFF}
    schema.check(found)
    text, page = tables.markdown(found), html.page(found, [])
    row = next(line for line in text.splitlines() if line.startswith("| 1 baseline | 16.7"))
    assert row == "| 1 baseline | 16.7 | 12.9 | 50.0 | 38.8 | 400 | 90.0 | mock |"
    assert energy.OFF in text and energy.OFF in page and "J/request" in page
    assert "## Energy" not in tables.markdown(reports.report())


def test_cells_without_energy_say_why():
    off, on = BenchConfig(), BenchConfig(energy_s=12)
    assert energy.entry(Measured(), "a", CELL, off, "") == (None, {"energy": energy.OFF})
    assert energy.entry(Measured(), "a", CELL, on, "") == (None, {"energy": energy.APART})
    assert energy.entry(Measured(), "a", CELL, on, "why") == (None, {"energy": "why"})
    with pytest.raises(InputError, match=r"bench.energy_s=5: at least 12.0 is needed"):
        BenchConfig(energy_s=5)
