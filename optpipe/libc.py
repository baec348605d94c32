"""What the C library and the kernel are asked to do with memory; nothing but on Linux with glibc.

A process that built a float16 plan of qwen3_0_6b took 4.27 times the bytes of its weights, and with
`return_freed` and `page_out` 3.25 times (tests/build/memory.py).
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD, PAGE_OUT = -1, -3, 21
"""As malloc.h and sys/mman.h have them."""
NEVER, MOST = -1, 32 * 2**20
"""Do not trim; the largest threshold that mallopt(3) takes on 64 bits."""


def trim() -> None:
    """Give freed memory back to the system.

    glibc keeps what was freed in blocks below 32 MiB, and where they were aligned, as torch's are,
    it does not use all of it again: blocks of a model that are read one at a time would add up.
    """
    _call("malloc_trim", 0)


def return_freed() -> None:
    """From now on give back freed blocks of 128 KiB and more.

    It starts so, but keeps blocks of up to 32 MiB once one of that size was freed.
    """
    _call("mallopt", MMAP_THRESHOLD, 128 * 1024)


def keep_freed() -> None:
    """From now on keep what is freed for what is allocated next, and begin with an empty store.

    glibc gives the top of its heap back to the system when nothing in use happens to lie above it,
    and asks for large pieces anew each time. Which of eight equal processes did so was a matter of
    luck: a prefill of 896 tokens took 0 to 28 000 page faults and up to a quarter longer, in all
    iterations of a process alike. Runtimes with an allocator of their own never see it.
    """
    trim()
    _call("mallopt", MMAP_THRESHOLD, MOST)
    _call("mallopt", TRIM_THRESHOLD, NEVER)


def page_out(file: Path) -> None:
    """Let go of the pages of a file that some library has mapped; those needed are read again."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {file.resolve()}"):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGE_OUT)


def _call(name: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl has neither, nor keeps so much
            getattr(ctypes.CDLL(None), name)(*arguments)
