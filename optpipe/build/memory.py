"""Memory that TensorRT frees or has read, back to the system: a plan less at the peak.

A process that built a float16 plan of qwen3_0_6b took 4.27 times the bytes of its weights, and now
3.25 times (tests/build/memory.py): a copy in the engine, one in the plan, and what made them.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

MMAP_THRESHOLD, PAGE_OUT = -3, 21
"""As malloc.h and sys/mman.h have them."""


def return_freed() -> None:
    """Make the C library give back freed blocks of 128 KiB and more.

    It starts so, but keeps blocks of up to 32 MiB once one of that size was freed.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl has no such option, nor keeps so much
            ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 128 * 1024)


def page_out(file: Path) -> None:
    """Let go of the pages of a file that some library has mapped; those needed are read again."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {file.resolve()}"):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGE_OUT)
