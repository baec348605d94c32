"""What the C library and the kernel do once they were asked to; Linux with glibc only."""

import ctypes
import mmap
import subprocess
import sys

import pytest

from optpipe.libc import page_out

MB = 1_000_000
if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    pytest.skip("no glibc", allow_module_level=True)

FREE_AND_TAKE = """
import ctypes, sys
from optpipe.libc import return_freed

class Mallinfo(ctypes.Structure):  # ten sizes; the fourth counts blocks straight from the system
    _fields_ = [(name, ctypes.c_size_t) for name in "0123456789"]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo
if "ask" in sys.argv:
    return_freed()
libc.free(ctypes.c_void_p(libc.malloc(30_000_000)))
before = getattr(libc.mallinfo2(), "3")
libc.malloc(25_000_000)
print(getattr(libc.mallinfo2(), "3") - before)
"""


@pytest.mark.parametrize("argument, blocks", [("ask", 1), ("", 0)])
def test_a_block_comes_from_the_system_after_a_larger_one_was_freed(argument, blocks):
    """And so goes back to it. By default, this one comes out of the heap, and stays there."""
    command = [sys.executable, "-c", FREE_AND_TAKE, argument]
    told = subprocess.run(command, capture_output=True, check=True, text=True)
    assert int(told.stdout) == blocks


def test_pages_of_a_mapped_file_go_and_come_again(tmp_path):
    file, other = tmp_path / "weights", tmp_path / "weights.more"
    for path in (file, other):
        path.write_bytes(bytes(range(256)) * 32_000)
    with file.open("rb") as stream, other.open("rb") as more:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        kept = mmap.mmap(more.fileno(), 0, access=mmap.ACCESS_READ)
    total, beside = sum(mapped[:]), sum(kept[:])
    assert resident(file) > 7 * MB
    page_out(file)
    assert resident(file) < MB and resident(other) > 7 * MB
    assert sum(mapped[:]) == total == beside


def resident(file):
    """Bytes of the mappings of a file that are in memory."""
    found, ours = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0]:
                ours = line.rstrip().endswith(f" {file}")
            elif ours and line.startswith("Rss:"):
                found += int(line.split()[1]) * 1024
    return found


FREED = """
import numpy as np, psutil
from optpipe.libc import trim
resident = lambda: psutil.Process().memory_info().rss
np.ones(2 << 20)  # glibc keeps blocks of up to 16 MB once one was freed
kept = [np.ones(1 << 19) for _ in range(32)]
del kept[::2]  # holes
held = resident()
trim()
print(held - resident())
"""


def test_freed_memory_goes_back_to_the_system():
    """In a process of its own, in which nobody has asked malloc for anything else."""
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 48 * 2**20


KEPT = """
import resource, sys
import numpy as np
from optpipe.libc import keep_freed

if "ask" in sys.argv:
    keep_freed()
def take(): [np.ones(1 << 21) for _ in range(4)]  # blocks of 16 MB
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("argument, most, least", [("ask", 50, 0), ("", 10**9, 1000)])
def test_what_was_freed_is_taken_again_without_a_page_fault(argument, most, least):
    command = [sys.executable, "-c", KEPT, argument]
    told = subprocess.run(command, capture_output=True, check=True, text=True)
    assert least <= int(told.stdout) <= most
