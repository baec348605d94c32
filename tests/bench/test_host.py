"""The host's share of a step, from events of the device whose times are planted."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_bottleneck import CEILINGS, CELLS, COSTS, report  # noqa: F401  (a fixture)

from optpipe.bench.bottlenecks import bottleneck, host, profile
from optpipe.bench.scenario import Cell
from optpipe.bench.timed.samples import Sample

CELL = Cell("single", 2, 100, 3)
MS = 1_000_000


def sample(device_ms=(30, 4, 4), **fields):
    """Sent at 0, begun at 1 ms, tokens at 51, 61 and 71 ms; the device worked 38 ms of it."""
    known = {
        "arm": "a", "cell": CELL, "session": 0, "block": 0, "position": 0, "reason": None,
        "submit_ns": 0, "start_ns": MS, "token_ns": (51 * MS, 61 * MS, 71 * MS), "cpu_s": 0.07,
        "done_ns": 72 * MS, "peak_bytes": 1, "tokens_hash": "f",
        "device_s": device_ms and tuple(ms / 1e3 for ms in device_ms),
    }  # fmt: skip
    return Sample(**(known | fields))


def test_what_the_device_did_not_work_is_the_host_s():
    values, reasons = host.entry([sample()], "")
    assert values["device_s"] == pytest.approx(0.038)
    assert values["prefill_device_s"] == pytest.approx(0.030)
    assert values["host_gap_s"] == pytest.approx(0.071 - 0.038)
    assert reasons == {}


def test_without_events_the_gap_is_unknown():
    values, reasons = host.entry([sample(device_ms=None)], "")
    assert values["device_s"] is None and values["host_gap_s"] is None
    assert reasons == dict.fromkeys(("device_s", "prefill_device_s", "host_gap_s"), host.NO_EVENTS)
    assert {*host.entry([], "too slow")[1].values()} == {"too slow"}


def test_each_phase_has_its_own_share():
    found = host.from_events([sample()], {})["a", CELL]
    assert found == pytest.approx({"prefill": 0.020, "decode": 0.010 - 0.004})
    warm = sample(reason="warmup", device_ms=(1, 1, 1))
    assert host.from_events([warm, sample()], {})["a", CELL] == found
    assert host.from_events([sample(device_ms=None)], {}) == {}
    one = replace(sample(), cell=CELL._replace(new_tokens=1), token_ns=(51 * MS,), device_s=(0.03,))
    assert [*host.from_events([one], {}).values()] == [pytest.approx({"prefill": 0.020})]


def test_gaps_between_launches_are_the_host_s_where_a_queued_step_has_none():
    busy = {("a", CELL): {"decode": 0.001, "prefill": 0.040}}
    found = host.from_events([sample()], busy)["a", CELL]
    assert found["decode"] == pytest.approx(0.009), "1 ms of work looked like 4"
    assert found["prefill"] == pytest.approx(0.020), "events are never longer than the work"


def test_the_host_s_share_makes_the_class(report):  # noqa: F811
    """The engine's decode step with all of its time between launches; the baseline's with none."""
    samples = []
    for artifact in report["artifacts"]:
        artifact["device"] = "GPU"
        for entry, cell in zip(artifact["cells"], CELLS, strict=True):
            first, step = entry["prefill_s"], entry["tpot_s"]
            stamps = tuple(int(1e9 * (first + n * step)) for n in range(cell.new_tokens))
            share = 0.5 if artifact["format"] == "ort" else 1.0
            events = (first, *[step * share] * (cell.new_tokens - 1))
            samples.append(sample(
                arm=artifact["name"], cell=cell, start_ns=0, token_ns=stamps, device_s=events,
            ))  # fmt: skip
    bottleneck.attach(report, COSTS, {"GPU": CEILINGS}, host.from_events(samples, {}))
    base, _, engine = (a["cells"][0]["bottleneck"]["phase"]["decode"] for a in report["artifacts"])
    assert base["host_share"] == pytest.approx(0, abs=1e-3)
    assert base["class"] == "memory_bandwidth_weights"
    assert engine["host_share"] == pytest.approx(0.5, abs=1e-3) and engine["class"] == "host"
    assert {r["name"] for r in engine["remedies"]} >= {"CUDA graphs"}
    report["artifacts"][2]["decoding"] = "one CUDA graph a step, KV cache of fixed size"
    bottleneck.attach(report, COSTS, {"GPU": CEILINGS}, host.from_events(samples, {}))
    decode = report["artifacts"][2]["cells"][0]["bottleneck"]["phase"]["decode"]
    assert "CUDA graphs" not in {r["name"] for r in decode["remedies"]}


def test_every_device_has_its_own_ceilings(report):  # noqa: F811
    """The engine on the CPU, at four fifths of a CPU a tenth as fast as the GPU of the others."""
    *gpu, engine = report["artifacts"]
    for artifact in gpu:
        artifact["device"] = "GPU"
    for cell in engine["cells"]:
        for key in ("prefill_s", "tpot_s", "ttft_s", "e2e_s", "cpu_s"):
            cell[key] *= 10
    slow = replace(
        CEILINGS,
        bandwidth=tuple((size, rate / 10) for size, rate in CEILINGS.bandwidth),
        flops_per_s={name: rate / 10 for name, rate in CEILINGS.flops_per_s.items()},
    )
    bottleneck.attach(report, COSTS, {"GPU": CEILINGS, "cpu": slow})
    for artifact in (gpu[0], engine):
        decode = artifact["cells"][0]["bottleneck"]["phase"]["decode"]
        assert decode["eta"] == pytest.approx(0.8, rel=1e-6), artifact["name"]
    assert report["run"]["ceilings"].keys() == {"GPU", "cpu"}
    assert report["run"]["invalid_reasons"] == []


class Held:
    """A backend whose steps are queued whole only if it is held back for long enough."""

    vocab, launch_s, hold_s, queued = 11, 0.02, 0.0, False

    def prefill(self, ids_BS, lengths_B):
        return self.decode(None)

    def decode(self, tokens_B):
        profile.time.sleep(self.launch_s)
        self.queued = self.hold_s > self.launch_s * 1.5

    def device_s(self):
        return (0.5, 0.003) if self.queued else (0.5, 0.02)


@pytest.mark.parametrize(("hold", "found"), [(2.0, 0.003), (0.1, None)])
def test_only_steps_that_were_queued_whole_tell_how_long_the_work_is(monkeypatch, hold, found):
    monkeypatch.setattr(profile, "HOLD", hold)
    backend = Held()
    assert profile._held(backend, "decode", 2, 5) == found
    assert backend.hold_s == 0


def test_memory_of_two_devices_is_not_compared():
    from optpipe.bench.cells import OTHER_DEVICE, Table

    outcome = SimpleNamespace(
        baseline="baseline", loaded={"baseline": SimpleNamespace(device="GPU"),
                                     "a": SimpleNamespace(device="cpu")},
        measured=SimpleNamespace(samples=[sample(), sample(arm="baseline")], dropped={}, dead={}),
        left_out={}, broken={}, anchored=set(), unpaired=lambda name: None, bench=None,
    )  # fmt: skip
    assert Table(outcome).shift("a", CELL, "peak_bytes") == (None, OTHER_DEVICE)
