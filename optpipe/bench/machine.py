"""The machine a measurement was made on, and the memory of this process."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("optpipe", "torch", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "numpy",
            "tokenizers", "hydra-core", "nvidia-modelopt")  # fmt: skip
STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")


def describe() -> dict[str, Any]:
    """CPU, memory, system and load, as far as the system tells; what it does not is null."""
    cpu = _field(Path("/proc/cpuinfo"), "model name") or platform.processor() or None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "cores_usable": usable_cores(),
        "isa": _isa(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": available_bytes(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "load": list(psutil.getloadavg()),
        "reasons": {} if cpu else {"cpu": "the system does not name it"},
    }


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
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if not (limit.is_file() and used.is_file()) or not limit.read_text().strip().isdigit():
        return None
    return int(limit.read_text()) - int(used.read_text())


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
