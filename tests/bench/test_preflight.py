"""What is recorded of the machine, against a driver that answers as NVML does."""

import ctypes
import os
import subprocess
from types import SimpleNamespace

import pytest
import reports

from optpipe.bench import machine, nvml, preflight
from optpipe.bench.outcome import Outcome
from optpipe.bench.pages import html, schema, tables
from optpipe.bench.timed.selftest import LIMITS

TOLD = {
    "nvmlDeviceGetPowerUsage": 123_456, "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTemperature": 41, "nvmlDeviceGetCount_v2": 2, "nvmlDeviceGetEccMode": 1,
}  # fmt: skip
TEXTS = ("nvmlSystemGetDriverVersion", "nvmlDeviceGetName", "nvmlDeviceGetUUID",
         "nvmlDeviceGetVbiosVersion")  # fmt: skip


class Driver:
    """libnvidia-ml with two GPUs: writes through its pointers and returns codes, as C does."""

    def __init__(self, **fails):
        self.fails, self.bits, self.pids, self.used = fails, 0x4, [], 2**30

    def __getattr__(self, name):
        return lambda *given: self.fails.get(name) or self._answer(name, given)

    def _answer(self, name, given):
        out = [arg._obj if hasattr(arg, "_obj") else arg for arg in given]
        if name == "nvmlDeviceGetMemoryInfo":
            out[1].total, out[1].used = 80 * 2**30, self.used
        elif name.endswith("Processes_v3"):
            out[1].value = len(self.pids)
            for place, pid in zip(out[2], self.pids, strict=False):
                place.pid = pid
        elif name.endswith("ClockInfo"):
            out[2].value = {1: 1500, 2: 2600}[out[1]] + ("Max" in name)
        elif name in TEXTS:
            out[TEXTS.index(name) and 1].value = name.partition("Get")[2].encode()
        else:
            known = {**TOLD, "nvmlDeviceGetCurrentClocksThrottleReasons": self.bits}
            out[1 if name.endswith(("Mode", "Reasons")) else -1].value = known.get(name, 0)
        return nvml.OK


def test_a_gpu_is_what_its_driver_tells():
    one, two = nvml.read(Driver())
    assert one == two
    assert (one["driver"], one["name"], one["vbios"]) == (
        "DriverVersion", "Name", "VbiosVersion",
    )  # fmt: skip
    assert [one[k] for k in ("sm_mhz", "sm_max_mhz", "memory_mhz", "memory_max_mhz")] == [
        1500, 1501, 2600, 2601]  # fmt: skip
    assert (one["power_w"], one["power_limit_w"], one["temperature_c"]) == (123.456, 700.0, 41)
    assert one["ecc"] is True and one["mig"] is False
    assert one["clocks_limited_by"] == ["power cap"] and one["processes"] == []
    assert one["memory_bytes"] == 80 * 2**30 and one["reasons"] == {}


def test_what_the_driver_does_not_tell_is_null_with_a_reason():
    (one, _) = nvml.read(Driver(nvmlDeviceGetPowerUsage=3, nvmlDeviceGetMigMode=3))
    assert one["power_w"] is None and one["mig"] is None
    assert one["reasons"].keys() == {"power_w", "mig"}


def test_structures_have_the_layout_of_nvml_h():
    """nvmlMemory_t: three 64-bit numbers; nvmlProcessInfo_v2_t: 4 + pad, 8, 4, 4 bytes."""
    assert ctypes.sizeof(nvml._Memory) == 24
    assert ctypes.sizeof(nvml._Process) == 24 and nvml._Process.used.offset == 8


def test_without_a_driver_there_are_no_gpus(monkeypatch):
    monkeypatch.setattr(nvml, "LIBRARY", "libnot-there.so.1")
    assert nvml.gpus() == []


def test_the_machine_is_described_with_a_reason_for_every_null(monkeypatch):
    monkeypatch.setenv("OMP_PROC_BIND", "close")
    monkeypatch.setenv("MY_TOKEN", "secret")
    found = machine.describe()
    assert {key for key, value in found.items() if value is None} == found["reasons"].keys()
    assert found["environment"]["OMP_PROC_BIND"] == "close"
    assert "MY_TOKEN" not in found["environment"]
    whole = reports.report()
    whole["run"]["machine"] = found
    schema.check(whole)


def test_the_commit_is_that_of_the_checkout():
    here = machine.Path(machine.__file__).resolve().parents[2]
    done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    found = machine._revision()
    assert found is None if done.returncode else found.rstrip("+") == done.stdout.strip()


@pytest.mark.parametrize(
    ("limit", "cores"), [("150000 100000", 1.5), ("max 100000", None), (None, None)]
)
def test_the_limits_of_a_container(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    if limit:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert machine._container_cores() == cores
    assert machine._container_bytes() is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert machine._container_bytes() == 600


def host(driver=None, **fields):
    known = {"load": [0.5, 0, 0], "cores_usable": 2, "memory_available_bytes": 8e9,
             "gpus": [next(iter(nvml.read(driver)))] if driver else []}  # fmt: skip
    return known | fields


def outcome(**fields):
    instrument = {**dict.fromkeys(LIMITS, 0.001), "passed": True}
    known = {"arms": [SimpleNamespace(name="baseline")], "cells": [], "sessions": [],
             "loaded": {"baseline": SimpleNamespace(device="Name", gpu="UUID")}}  # fmt: skip
    return Outcome(**{**known, "left_out": {}, "instrument": instrument, **fields})


def failed(found):
    return [one["check"] for one in found if not one["passed"]]


def test_a_quiet_machine_passes_every_check():
    found = preflight.checks(host(Driver()), outcome())
    assert failed(found) == []
    assert [one["check"] for one in found] == [
        "load", "free memory", "self-test", "Name: others on it", "Name: clocks", "Name: MIG",
        "Name: memory in use",
    ]  # fmt: skip


def test_whatever_may_spoil_it_is_named():
    busy = Driver()
    busy.bits, busy.pids, busy.used = 0x40 | 0x1, [os.getpid(), 4711], 40 * 2**30
    bad = outcome(left_out={"big": "too large"}, instrument={"tpot_error": 0.2, "passed": False})
    found = preflight.checks(host(busy, load=[3.5, 0, 0]), bad)
    assert failed(found) == [
        "load", "free memory", "self-test", "Name: others on it", "Name: clocks",
        "Name: memory in use",
    ]  # fmt: skip
    told = {one["check"]: one["found"] for one in found}
    assert told["Name: others on it"] == "processes 4711"
    assert told["Name: clocks"] == "thermal, hardware, idle"
    assert told["self-test"] == "TPOT +20.00%" and "big" in told["free memory"]


def test_a_gpu_that_no_arm_ran_on_is_not_looked_at():
    busy = Driver()
    busy.pids = [4711]
    elsewhere = {"baseline": SimpleNamespace(device="Name", gpu="GPU-8")}
    assert failed(preflight.checks(host(busy), outcome(loaded=elsewhere))) == []


def test_arms_on_two_devices_are_named():
    told = {"baseline": "GPU", "quant": "GPU", "build": "cpu"}
    loaded = {name: SimpleNamespace(device=device, gpu=None) for name, device in told.items()}
    (check,) = [c for c in preflight.checks(host(), outcome(loaded=loaded)) if not c["passed"]]
    assert (check["check"], check["found"]) == ("devices", "GPU: baseline, quant; cpu: build")
    assert not failed(preflight.checks(host(), outcome(loaded={"baseline": loaded["build"]})))


@pytest.mark.parametrize(
    ("visible", "uuid"),
    [(None, "GPU-a"), ("1", "GPU-b"), ("1,0", "GPU-b"), ("GPU-b", "GPU-b"), ("GPU-", "GPU-a"),
     ("", None), ("-1", None), ("2", None), ("MIG-x", None)],
)  # fmt: skip
def test_the_gpu_that_cuda_takes_first(visible, uuid):
    found = nvml.current([{"uuid": "GPU-a"}, {"uuid": "GPU-b"}], visible)
    assert (found and found["uuid"]) == uuid


def test_variables_are_told_but_no_secret(monkeypatch):
    for name in ("NVIDIA_API_KEY", "VLLM_API_KEY", "VLLM_USE_V1", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.setenv(name, "1")
    found = machine.describe()["environment"]
    assert {"VLLM_USE_V1", "NVIDIA_TF32_OVERRIDE"} <= found.keys()
    assert not {"NVIDIA_API_KEY", "VLLM_API_KEY"} & found.keys()


def test_what_engines_bring_is_part_of_the_environment(monkeypatch):
    monkeypatch.setattr(machine, "_version", lambda name: "1")
    assert {"vllm", "tensorrt-llm", "tensorrt-rtx", "torch"} <= machine.versions().keys()


def test_arms_must_fit_in_the_memory_of_the_gpu(monkeypatch):
    gpu = {"uuid": "GPU-a", "memory_bytes": 8e9, "memory_used_bytes": 5e9}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "available_bytes", lambda: 20_000_000_000)
    for gpus, torch, free in (([gpu], "2.11.0", 3e9), ([gpu], "2.11.0+cpu", 2e10),
                              ([], "2.11.0", 2e10)):  # fmt: skip
        monkeypatch.setattr(machine.nvml, "gpus", lambda gpus=gpus: gpus)
        monkeypatch.setattr(machine, "_version", lambda _, torch=torch: torch)
        assert machine.free_bytes() == free
        assert machine.device_free_bytes() == (3e9 if gpus else None)


def test_reports_show_what_failed():
    whole = reports.report()
    whole["run"]["preflight"] = preflight.checks(host(Driver(), load=[3.5, 0, 0]), outcome())
    whole["run"]["machine"]["gpus"] = [*nvml.read(Driver())]
    schema.check(whole)
    page, text = html.page(whole, []), tables.markdown(whole)
    assert "load: 3.50; wanted: at most 2, the usable cores" in page
    assert "- load: 3.50; wanted: at most 2, the usable cores" in text
    assert "VbiosVersion" in page and "power cap" in page
    assert "self-test" not in text, "what passed is in report.json and on the page"
