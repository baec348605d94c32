"""Time and peak memory of building a plan with tensorrt_rtx, of a shape with random weights.

    python tests/build/memory.py STORE qwen3_0_6b float16
    python tests/build/memory.py STORE qwen3_0_6b int4

The build stage alone, in a process of its own; the peak is that of the process, the pages of the
weight file that it reads included.
"""

import math
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from optpipe.artifact import Artifact
from optpipe.build.tensorrt import PLAN, TensorRT
from optpipe.checkpoint import Checkpoint
from optpipe.export.onnx import Onnx
from optpipe.model import parameter_shapes
from optpipe.quant.rtn import Rtn
from optpipe.source import Random


def export(store, shape, weights):
    source = Random(config=shape).prepare(store)
    methods = [Rtn(bits=4, group_size=128)] if weights == "int4" else []
    for stage in [*methods, Onnx(dtype="float16")]:
        out = store / f"{shape}-{weights}-{stage.produces}"
        if not out.exists():
            out.mkdir()
            stage.run(source, out, lambda *_: None)
        source = Artifact(path=out, format=stage.produces, key="k")
    return source


def build(graph, out):
    started_s = time.monotonic()
    TensorRT(package="tensorrt_rtx").run(graph, out, lambda *_: None)
    return time.monotonic() - started_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(store, shape, weights):
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        graph = one.submit(export, Path(store), shape, weights).result()
    float16 = 2 * sum(math.prod(s) for s in parameter_shapes(Checkpoint(graph.path)).values())
    out = Path(store) / f"{shape}-{weights}-tensorrt"
    out.mkdir()
    with ProcessPoolExecutor(1, get_context("spawn")) as one:
        took_s, peak = one.submit(build, graph, out).result()
    print(
        f"{shape} {weights}: {took_s:.0f} s, plan {(out / PLAN).stat().st_size / 1e6:.0f} MB, peak "
        f"{peak / 1e9:.2f} GB, {peak / float16:.2f} times the weights in float16"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
