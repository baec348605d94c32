"""What a build takes of memory; Linux with glibc only."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optpipe.build.tensorrt import TensorRT
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx

ROOT = Path(__file__).parents[2]
libc = ctypes.CDLL(None)
if sys.platform != "linux" or not hasattr(libc, "mallinfo2"):
    pytest.skip("no glibc", allow_module_level=True)

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
