"""What the C library and the kernel do once they were asked to; Linux with glibc only."""

import ctypes
import mmap
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optpipe.build import memory
from optpipe.build.tensorrt import TensorRT
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx

MB, ROOT = 1_000_000, Path(__file__).parents[2]
libc = ctypes.CDLL(None)
if sys.platform != "linux" or not hasattr(libc, "mallinfo2"):
    pytest.skip("no glibc", allow_module_level=True)


FREE_AND_TAKE = """
import ctypes, sys
from optpipe.build import memory

class Mallinfo(ctypes.Structure):  # ten sizes; the fourth counts blocks straight from the system
    _fields_ = [(name, ctypes.c_size_t) for name in "0123456789"]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Mallinfo
if "ask" in sys.argv:
    memory.return_freed()
libc.free(ctypes.c_void_p(libc.malloc(30_000_000)))
before = getattr(libc.mallinfo2(), "3")
libc.malloc(25_000_000)
print(getattr(libc.mallinfo2(), "3") - before)
"""


@pytest.mark.parametrize("argument, blocks", [("ask", 1), ("", 0)])
def test_a_block_comes_from_the_system_after_a_larger_one_was_freed(argument, blocks):
    """And so goes back to it. By default, this one comes out of the heap, and stays there."""
    command = [sys.executable, "-c", FREE_AND_TAKE, argument]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
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
    memory.page_out(file)
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


WIDE = {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 1, "head_dim": 64,
        "num_attention_heads": 16}  # fmt: skip
"""Weights of 107 MB in float16: far more than what a build of the smallest model takes."""


def test_a_build_takes_little_more_than_an_engine_and_its_plan(run, tiny):
    """What the process grows by: 2.7 times the weights, 3.7 with one more copy of them."""
    pytest.importorskip("tensorrt_rtx")
    run(TensorRT(), run(Onnx(dtype="float16"), tiny()))  # libraries and what they keep
    graph = run(Onnx(dtype="float16", capacity=64), tiny(**WIDE))
    weights = Checkpoint(tiny(**WIDE)).size_bytes / 2  # stored in float32
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before = memory_of_process("VmRSS")
    run(TensorRT(), graph)
    assert memory_of_process("VmHWM") - before < 3.2 * weights


def memory_of_process(what):
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.long
def test_the_qwen3_0_6b_shape_takes_at_most_four_times_its_weights(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    script = Path(__file__).with_name("memory.py")
    command = [sys.executable, script, tmp_path, "qwen3_0_6b", "float16"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert float(re.search(r"(\S+) times the weights", told)[1]) < 4
    assert int(re.search(r": (\d+) s, plan", told)[1]) < 180
