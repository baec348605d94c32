"""The machine a measurement was made on, and the memory of this process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from optpipe.bench import nvml

PACKAGES = ("optpipe", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy",
            "tokenizers", "hydra-core", "nvidia-modelopt", "tensorrt", "tensorrt-rtx",
            "tensorrt-llm", "vllm", "triton")  # fmt: skip
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")
BOOT = Path("/proc/sys/kernel/random/boot_id")
LASTING = ("cpu", "cores_usable", "container_cores", "container_bytes", "governor", "max_mhz",
           "isa", "memory_bytes", "os", "python", "environment")  # fmt: skip
GPU_LASTING = ("name", "driver", "sm_max_mhz", "memory_max_mhz", "power_limit_w", "mig")
VARIABLES = ("OMP_", "KMP_", "MKL_", "OPENBLAS_", "GOMP_", "ORT_", "CUDA_", "NVIDIA_", "PYTORCH_",
             "TORCH_", "MALLOC_", "LD_PRELOAD", "VLLM_", "TLLM_", "TRTLLM_", "TRITON_",
             "NCCL_")  # fmt: skip
"""Beginnings of environment variables that can change a measurement."""
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
"""In the name of one that is in no report, such as NVIDIA_API_KEY."""


def describe() -> dict[str, Any]:
    """CPU, GPUs, memory, system and load, as far as the system tells; what it does not is null."""
    known = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None,
        "governor": _line(FREQUENCY / "scaling_governor"),
        "max_mhz": _thousandth(_line(FREQUENCY / "cpuinfo_max_freq")),
        "container_cores": _container_cores(),
        "container_bytes": _limit("memory.max"),
        "git": _revision(),
    }
    why = {
        "cpu": "the system does not name it",
        "governor": "the system does not tell how the clock is governed",
        "max_mhz": "the system does not tell how fast the clock may be",
        "container_cores": "no limit on CPU time in /sys/fs/cgroup",
        "container_bytes": "no limit on memory in /sys/fs/cgroup",
        "git": "optpipe does not run from a checkout of its own",
    }
    return {
        **known,
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "isa": _isa(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": available_bytes(),
        "gpus": nvml.gpus(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "load": list(psutil.getloadavg()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if _tells(k)},
        "reasons": {key: reason for key, reason in why.items() if known[key] is None},
    }


def _tells(variable: str) -> bool:
    return variable.startswith(VARIABLES) and not any(word in variable for word in SECRET)


def lasting(about: Mapping[str, Any]) -> dict[str, Any]:
    """What of `describe` does not change by itself."""
    gpus = [{key: gpu.get(key) for key in GPU_LASTING} for gpu in about.get("gpus") or []]
    return {**{key: about.get(key) for key in LASTING}, "gpus": gpus}


def boot() -> str | None:
    """Of the machine, by name: stamps of one boot are of one clock; None: the system has none."""
    return _line(BOOT)


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a measurement."""
    return {name: found for name in PACKAGES if (found := _version(name)) is not None}


def usable_cores() -> int:
    """Cores this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be had without swapping, within the limit of a container if there is one."""
    free: int = psutil.virtual_memory().available
    within = _container_bytes()
    return free if within is None else min(free, within)


def free_bytes() -> int:
    """What arms may take together: of main memory or of the GPU, whichever has less.

    An arm that computes on the CPU counts as if it took memory of the GPU, too.
    """
    free, torch, device = available_bytes(), _version("torch") or "", device_free_bytes()
    return free if device is None or torch.endswith("+cpu") else min(free, device)


def device_free_bytes() -> int | None:
    """Memory of the GPU that is free; None: there is none, or it does not tell."""
    gpu = nvml.current(nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if gpu is None or gpu["memory_used_bytes"] is None:
        return None
    return int(gpu["memory_bytes"] - gpu["memory_used_bytes"])


def resident_bytes() -> int:
    """Memory that this process holds now, libraries and mapped files that were read included."""
    found: int = psutil.Process().memory_info().rss
    return found


def device_used_bytes() -> int | None:
    """Memory of the GPU that is taken, by whomever; None: there is none, or it does not tell."""
    gpu = nvml.current(nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    used: int | None = None if gpu is None else gpu["memory_used_bytes"]
    return used


def reset_peak() -> None:
    """Start a new peak of resident memory. Raises OSError where that is impossible (not Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Peak resident memory of this process since ``reset_peak``."""
    peak = _field(STATUS, "VmHWM")
    if peak is None:
        raise OSError(f"no peak of resident memory (VmHWM) in {STATUS}")
    return int(peak.split()[0]) * 1024  # in kB


def _container_bytes() -> int | None:
    """What the limit of a container (cgroup v2) leaves; None if there is no limit."""
    limit, used = _limit("memory.max"), _limit("memory.current")
    return None if limit is None or used is None else limit - used


def _container_cores() -> float | None:
    """CPU time a second that a container may take; None if there is no limit."""
    quota, _, period = (_line(CGROUP / "cpu.max") or "max").partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _limit(name: str) -> int | None:
    found = _line(CGROUP / name)
    return int(found) if found is not None and found.isdigit() else None


def _thousandth(number: str | None) -> float | None:
    return None if number is None else int(number) / 1e3


def _line(file: Path) -> str | None:
    """The content of a file of one line; None if it is not there or may not be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _revision() -> str | None:
    """The commit of optpipe's own checkout, with a + if files differ from it."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    commit, changes = (_git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain", "-uno"))
    return None if commit is None else commit + ("+" if changes else "")


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *command], capture_output=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode().strip() if done.returncode == 0 else None


def _isa() -> list[str]:
    """The instruction sets that decide how fast small types are."""
    flags = (_field(Path("/proc/cpuinfo"), "flags") or "").split()
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return [flag for flag in wanted if flag in flags]


def _field(file: Path, key: str) -> str | None:
    """The first 'KEY : VALUE' of a file in /proc."""
    if not file.is_file():
        return None
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
