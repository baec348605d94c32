"""Our checkpoints in vLLM on GPUs: do they load, and do they answer as our torch model does.

    PYTHONPATH=. python tests/export/vllm_gpu.py FOLDER SHAPE[,SHAPE] [--jobs N|--speed] [KIND ...]

SHAPE is demo, or a name from conf/model/shapes with random weights. Every checkpoint is made and
opened in a process of its own, N at once, dealt over all GPUs; its greedy tokens are compared with
those of the torch backend on the same artifact, in float16, and these with float32: where inputs
are rounded, the last bits of an activation decide between codes, and no two ways to multiply agree
further than that floor. Where tokens part, the margin is how much higher the torch model had its
own token there than the other: near zero, either was right. Eager, so that it starts soon; --speed
compiles, runs one at a time and adds times. KIND is the beginning of some of the names in KINDS;
without, all of them. What vLLM wrote is kept in $OUT, or FOLDER.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from shutil import rmtree
from statistics import median

import numpy as np
import torch
from eight_bits import eight_bit_layer

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.bench.torch import Torch
from optpipe.bench.vllm import OFFLINE, SETTINGS, Vllm
from optpipe.blockwise import rewrite
from optpipe.checkpoint import Checkpoint
from optpipe.export import vllm
from optpipe.export.readback import read_back
from optpipe.export.trtllm import Trtllm
from optpipe.quant.nvfp4 import Nvfp4
from optpipe.quant.rtn import Rtn
from optpipe.source import Demo, Random
from optpipe.stage import Stage

PROMPTS, PROMPT, NEW = 8, 64, 32
MARK = "FOUND "
EIGHT = {"bits": 8, "group_size": -1}
STATIC = {"bits": 8, "number": "fp8", "group_size": 0, "inputs": "fp8_tensor"}
INT4, INT8 = Rtn(bits=4, group_size=128), Rtn(bits=8, group_size=-1)
KINDS = {
    "float16": (None, vllm.Vllm),
    "int4 g128": (INT4, vllm.Vllm),
    "int8 weights": (INT8, vllm.Vllm),
    "int8 W8A8 per token": ({**EIGHT, "inputs": "int8_token"}, vllm.Vllm),
    "fp8 per token": ({**EIGHT, "number": "fp8", "inputs": "fp8_token"}, vllm.Vllm),
    "fp8 per tensor": (STATIC, vllm.Vllm),
    "nvfp4 weights": (Nvfp4(method="rtn", clip="minmax"), vllm.Vllm),
    "modelopt FP8": (STATIC, Trtllm),
    "modelopt FP8 per token": ({**EIGHT, "number": "fp8", "inputs": "fp8_token"}, Trtllm),
    "modelopt W4A16_NVFP4": (Nvfp4(method="rtn", clip="minmax"), Trtllm),
    "modelopt W4A16_AWQ": (INT4, Trtllm),  # vLLM 0.25.1 knows no such algorithm
}


def quiet(*_):
    pass


def stage(made, source, out):
    out.mkdir(parents=True)
    made.run(source, out, quiet)
    return Artifact(path=out, format=made.produces, key="k", lineage=("made",))


def input_scales(folder, vocab):
    """The largest input of every layer over 448, on random tokens."""
    lm, seen = model.load(Checkpoint(folder)).cuda(), {}

    def hook(name):
        return lambda _, x: seen.update({name: max(seen.get(name, 0), float(x[0].abs().max()))})

    for name in model.layers(Checkpoint(folder)):
        lm.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.inference_mode():
        lm(torch.randint(vocab, (4, 256), generator=torch.Generator().manual_seed(0)).cuda())
    return {name: largest / 448 for name, largest in seen.items()}


def quantized(form, source, out, scales):
    if form is None:
        return source
    if isinstance(form, Stage):
        return stage(form, source, out)
    layers = model.layers(Checkpoint(source.path))
    planned = {n: f if n == "lm_head" else replace(f, **form) for n, f in layers.items()}

    def change(name, layer, _):
        if name == "lm_head":
            return layer
        device = layer.weight.device
        return eight_bit_layer(layer.cpu(), planned[name], scales[name]).to(device)

    out.mkdir(parents=True)
    rewrite(source, out, planned, change, quiet)
    return Artifact(path=out, format="hf", key="k", lineage=("quant",))


def greedy(backend, ids):
    """Tokens (rows, NEW), and the logits they were the largest of, (rows, NEW, V)."""
    told, logits = backend.prefill(ids, np.full(len(ids), ids.shape[1])), []
    for _ in range(NEW):
        logits.append(told.copy())
        told = backend.decode(told.argmax(-1))
    logits = np.stack(logits, 1)
    return logits.argmax(-1), logits


def prompts(vocab):
    return np.random.default_rng(0).integers(3, vocab, (PROMPTS, PROMPT))


def timed(backend, tokens, batch, new):
    """Medians of TTFT and TPOT in milliseconds over five runs after two."""
    ids = np.random.default_rng(1).integers(3, backend.vocab, (batch, tokens))
    firsts, gaps = [], []
    for _ in range(7):
        start = time.perf_counter()
        told = backend.prefill(ids, np.full(batch, tokens))
        first = time.perf_counter()
        for _ in range(new):
            told = backend.decode(told.argmax(-1))
        firsts.append(1e3 * (first - start))
        gaps.append(1e3 * (time.perf_counter() - first) / max(new, 1))
    return median(firsts[2:]), median(gaps[2:])


def speeds(backend):
    """TTFT at 128 and about 1000 tokens, TPOT of one and eight rows."""
    long = min(1000, backend.capacity - 1)
    return [
        timed(backend, 128, 1, 0)[0],
        timed(backend, long, 1, 0)[0],
        timed(backend, 128, 1, 64)[1],
        timed(backend, 128, 8, 64)[1],
    ]


def agreement(ours, logits, theirs):
    """Rows with the same tokens throughout, and the largest margin where others part."""
    same = ours == theirs
    apart = [(row, int(same[row].argmin())) for row in np.flatnonzero(~same.all(1))]
    margins = [
        logits[row, at, ours[row, at]] - logits[row, at, theirs[row, at]] for row, at in apart
    ]
    wide = f", margin {max(margins):.3f} of a spread of {logits.std():.2f}" if apart else ""
    return f"{same.all(1).sum()} of {len(ours)} rows the same{wide}"


def given(shape):
    return Demo() if shape == "demo" else Random(config=shape)


def ours(made, dtype):
    """Greedy tokens and logits of the torch model."""
    with Torch(made, 1, dtype) as backend:
        return greedy(backend, prompts(backend.vocab))


def child(out, shape, kind, speed):
    """Make one checkpoint and open it in vLLM; the last line it prints is its row of the table."""
    out, (form, exporter) = Path(out), KINDS[kind]
    source = given(shape).prepare(out)
    scales = json.loads((out / f"{shape}.json").read_text())
    own = out / shape / kind.replace(" ", "_")
    compressed = quantized(form, source, own / "hf", scales)
    made = stage(exporter(), compressed, own / "checkpoint")
    if shape == "demo":
        read_back(made, compressed)
    tokens, logits = ours(compressed, "float16")
    floor = agreement(tokens, logits, ours(compressed, "float32")[0])
    gc.collect()
    torch.cuda.empty_cache()
    if speed == "eager":
        import vllm as package

        package.LLM = partial(package.LLM, enforce_eager=True)
    with Vllm(made, 1, "float16") as backend:
        theirs, _ = greedy(backend, prompts(backend.vocab))
        times = [] if speed == "eager" else speeds(backend)
    told = " | ".join([agreement(tokens, logits, theirs), floor, *(f"{t:.2f}" for t in times)])
    print(f"{MARK}{told}", flush=True)


def row(out, shape, kind, gpu, speed):
    """Of the table, from a process of its own."""
    call = [sys.executable, __file__, "--child", str(out), shape, kind, speed]
    own = {"CUDA_VISIBLE_DEVICES": gpu, "VLLM_DISABLE_COMPILE_CACHE": "1"}
    env = {**os.environ, **SETTINGS, **OFFLINE, **own}
    start = time.perf_counter()
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=420, env=env)
    name = kind.replace(" ", "_")
    log = Path(os.environ.get("OUT", out)) / f"{shape}_{name}.log"
    log.write_text(done.stdout + done.stderr)
    rmtree(out / shape / name)
    found = [line[len(MARK) :] for line in done.stdout.splitlines() if line.startswith(MARK)]
    lines = [line.strip() for line in done.stderr.splitlines()]
    last = max((n for n, line in enumerate(lines) if "Error" in line), default=0)
    told = found[0] if found else " ".join(lines[last : last + 3])[:400] or "died"
    print(f"| {shape} | {kind} | {told} | {time.perf_counter() - start:.0f} s |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("shapes")
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--speed", action="store_true")
    asked = parser.parse_args()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
        str(index) for index in range(torch.cuda.device_count())
    )
    print(f"{torch.cuda.get_device_name()}, GPUs {gpus}", flush=True)
    times = "TTFT 128 ms | TTFT long | TPOT b1 ms | TPOT b8 | " if asked.speed else ""
    floor = "torch float16 beside float32"
    print(f"| shape | checkpoint | beside torch | {floor} | {times}took |", flush=True)
    for shape in asked.shapes.split(","):
        source = given(shape).prepare(asked.folder)
        scales = input_scales(source.path, given(shape).checkpoint.decoder.vocab)
        (asked.folder / f"{shape}.json").write_text(json.dumps(scales))
    torch.cuda.empty_cache()
    wanted = [kind for kind in KINDS if kind.startswith(tuple(asked.kinds) or "")]
    turns = cycle(gpus.split(","))
    speed = "speed" if asked.speed else "eager"
    with ThreadPoolExecutor(1 if asked.speed else asked.jobs) as pool:
        futures = [
            pool.submit(row, asked.folder, shape, kind, next(turns), speed)
            for shape in asked.shapes.split(",")
            for kind in wanted
        ]
    for future in futures:
        future.result()  # raises what went wrong here, not in the child


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        main()
