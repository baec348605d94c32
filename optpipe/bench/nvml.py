"""What the NVIDIA driver tells of its GPUs, through NVML: no package, no CUDA context.

Names and units are those of nvml.h; what a GPU does not tell is None.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from ctypes import byref, c_char_p, c_uint, c_ulonglong, c_void_p, create_string_buffer
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
OK, TOO_SMALL = 0, 7
SM, MEMORY = 1, 2
"""nvmlClockType_t."""
LENGTH = 96
MOST_PROCESSES = 64
SLOWED = {0x8: "hardware slowdown", 0x20: "thermal, software", 0x40: "thermal, hardware",
          0x80: "power brake"}  # fmt: skip
"""Bits of nvmlClocksThrottleReasons under which a clock is lower than the work would have it."""
CAPPED = {0x1: "idle", 0x2: "application clocks", 0x4: "power cap", 0x10: "sync boost",
          0x100: "display clocks"}  # fmt: skip
"""Bits that are part of normal use."""
Facts = dict[str, Any]


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Process(ctypes.Structure):
    _fields_ = [("pid", c_uint), ("used", c_ulonglong), ("gpu", c_uint), ("compute", c_uint)]


def gpus() -> list[Facts]:
    """One entry a GPU; none where there is no NVIDIA driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return []
    if library.nvmlInit_v2() != OK:
        return []
    try:
        return [*read(library)]
    finally:
        library.nvmlShutdown()


def current(found: list[Facts], visible: str | None) -> Facts | None:
    """The GPU that CUDA takes first; ``visible``: CUDA_VISIBLE_DEVICES, None where it is not set.

    GPUs of several kinds may be numbered otherwise by CUDA, which puts the fastest first.
    """
    first = "0" if visible is None else visible.partition(",")[0].strip()
    if first.isdigit():
        return found[int(first)] if int(first) < len(found) else None
    return next((gpu for gpu in found if first and (gpu["uuid"] or "").startswith(first)), None)


class Board:
    """One GPU, to be read while it works. Raises OSError for what the driver does not tell."""

    name = "NVML, the whole board"

    def __init__(self, uuid: str, library: Any = None) -> None:
        self._library = library or ctypes.CDLL(LIBRARY)
        self._handle = c_void_p()
        if self._library.nvmlInit_v2() != OK:
            raise OSError("NVML cannot be initialized")
        code = self._library.nvmlDeviceGetHandleByUUID(c_char_p(uuid.encode()), byref(self._handle))
        if code != OK:
            raise OSError(f"NVML knows no GPU '{uuid}' (code {code})")

    def joules(self) -> float:
        """Energy since the driver was loaded."""
        value = c_ulonglong()  # mJ
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, byref(value))
        if code != OK:
            raise OSError(f"the driver counts no energy of this GPU (NVML code {code})")
        return value.value / 1e3

    def watts(self) -> float:
        """Power draw; since Ampere an average over the last second."""
        value = _number(self._library.nvmlDeviceGetPowerUsage, self._handle)
        if value is None:
            raise OSError("the driver does not tell the power of this GPU")
        return value / 1e3

    def slowed(self) -> str:
        """Why its clocks are lower than the work would have them; empty: they are not."""
        limits = _limits(self._library, self._handle) or []
        return ", ".join(limit for limit in limits if limit in SLOWED.values())


def read(library: Any) -> Iterator[Facts]:
    """Clocks in MHz, power in W, memory in bytes, temperature in degrees Celsius."""
    driver = create_string_buffer(LENGTH)
    told = library.nvmlSystemGetDriverVersion(driver, LENGTH) == OK
    for index in range(_number(library.nvmlDeviceGetCount_v2) or 0):
        handle = c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, byref(handle)) != OK:
            continue
        found = {"driver": driver.value.decode() if told else None, **_device(library, handle)}
        nulls = [key for key, value in found.items() if value is None]
        yield {**found, "reasons": dict.fromkeys(nulls, "the driver does not tell")}


def _device(library: Any, handle: c_void_p) -> Facts:
    def clock(call: Any, which: int) -> int | None:
        return _number(call, handle, which)

    power, limit = (
        _number(call, handle)
        for call in (library.nvmlDeviceGetPowerUsage, library.nvmlDeviceGetEnforcedPowerLimit)
    )
    memory = _Memory()
    known = library.nvmlDeviceGetMemoryInfo(handle, byref(memory)) == OK
    return {
        "name": _text(library.nvmlDeviceGetName, handle),
        "uuid": _text(library.nvmlDeviceGetUUID, handle),
        "vbios": _text(library.nvmlDeviceGetVbiosVersion, handle),
        "sm_mhz": clock(library.nvmlDeviceGetClockInfo, SM),
        "sm_max_mhz": clock(library.nvmlDeviceGetMaxClockInfo, SM),
        "memory_mhz": clock(library.nvmlDeviceGetClockInfo, MEMORY),
        "memory_max_mhz": clock(library.nvmlDeviceGetMaxClockInfo, MEMORY),
        "power_w": None if power is None else power / 1e3,
        "power_limit_w": None if limit is None else limit / 1e3,
        "temperature_c": _number(library.nvmlDeviceGetTemperature, handle, 0),
        "ecc": _mode(library.nvmlDeviceGetEccMode, handle),
        "mig": _mode(library.nvmlDeviceGetMigMode, handle),
        "clocks_limited_by": _limits(library, handle),
        "memory_bytes": memory.total if known else None,
        "memory_used_bytes": memory.used if known else None,
        "processes": _processes(library, handle),
    }


def _limits(library: Any, handle: c_void_p) -> list[str] | None:
    bits = c_ulonglong()
    if library.nvmlDeviceGetCurrentClocksThrottleReasons(handle, byref(bits)) != OK:
        return None
    return [name for bit, name in {**SLOWED, **CAPPED}.items() if bits.value & bit]


def _processes(library: Any, handle: c_void_p) -> list[int] | None:
    """The others, by process id as the driver counts, which a container may count otherwise.

    This process may have a context of its own: stages before the benchmark computed there.
    """
    count, found = c_uint(MOST_PROCESSES), (_Process * MOST_PROCESSES)()
    code = library.nvmlDeviceGetComputeRunningProcesses_v3(handle, byref(count), found)
    if code not in (OK, TOO_SMALL):
        return None
    return [int(one.pid) for one in found[: count.value] if one.pid != os.getpid()]


def _number(call: Any, *given: Any) -> int | None:
    value = c_uint()
    return int(value.value) if call(*given, byref(value)) == OK else None


def _mode(call: Any, handle: c_void_p) -> bool | None:
    """Of a setting that has a current and a pending state."""
    now, pending = c_uint(), c_uint()
    return bool(now.value) if call(handle, byref(now), byref(pending)) == OK else None


def _text(call: Any, handle: c_void_p) -> str | None:
    buffer = create_string_buffer(LENGTH)
    return buffer.value.decode() if call(handle, buffer, LENGTH) == OK else None
