"""Our checkpoints in vLLM on a GPU: do they load, answer as our torch model does, how fast.

    PYTHONPATH=. python tests/export/vllm_gpu.py FOLDER demo|llama_1b [KIND ...]

makes checkpoints of one shape in FOLDER and opens each in a process of its own. The demo model's
greedy tokens are compared with those of the torch backend on the same artifact, in float16. KIND is
the beginning of some of the names in KINDS; without, all of them.
"""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from eight_bits import eight_bit_layer

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.bench.torch import Torch
from optpipe.bench.vllm import Vllm
from optpipe.blockwise import rewrite
from optpipe.checkpoint import Checkpoint
from optpipe.export import vllm
from optpipe.export.readback import read_back
from optpipe.export.trtllm import Trtllm
from optpipe.quant.rtn import Rtn
from optpipe.source import Demo, Random

PROMPTS, PROMPT, NEW = 8, 64, 32
MARK = "FOUND "
EIGHT = {"bits": 8, "group_size": -1}
STATIC = {"bits": 8, "number": "fp8", "group_size": 0, "inputs": "fp8_tensor"}
KINDS = {
    "float16": (None, vllm.Vllm),
    "int4 g128": ("int4", vllm.Vllm),
    "int8 weights": ("int8", vllm.Vllm),
    "int8 W8A8 per token": ({**EIGHT, "inputs": "int8_token"}, vllm.Vllm),
    "fp8 per token": ({**EIGHT, "number": "fp8", "inputs": "fp8_token"}, vllm.Vllm),
    "fp8 per tensor": (STATIC, vllm.Vllm),
    "modelopt FP8": (STATIC, Trtllm),
    "modelopt W4A16_AWQ": ("int4", Trtllm),  # vLLM 0.25.1 knows no such algorithm
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
    if form in ("int4", "int8"):
        rtn = Rtn(bits=4, group_size=128) if form == "int4" else Rtn(bits=8, group_size=-1)
        return stage(rtn, source, out)
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
    told, tokens = backend.prefill(ids, np.full(len(ids), ids.shape[1])), []
    for _ in range(NEW):
        tokens.append(told.argmax(-1))
        told = backend.decode(tokens[-1])
    return np.stack(tokens, 1)


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


def child(folder, name):
    """Open one checkpoint in vLLM; the last line it prints is what it found."""
    with Vllm(Artifact(path=Path(folder), format=name, key="k"), 1, "float16") as backend:
        tokens = greedy(backend, prompts(backend.vocab)).tolist()
        long = min(1000, backend.capacity - 1)
        found = {
            "tokens": tokens,
            "ttft_128": timed(backend, 128, 1, 0)[0],
            "ttft_long": timed(backend, long, 1, 0)[0],
            "tpot_1": timed(backend, 128, 1, 64)[1],
            "tpot_8": timed(backend, 128, 8, 64)[1],
        }
    print(f"{MARK}{json.dumps(found)}", flush=True)


def opened(made):
    call = [sys.executable, __file__, "--child", str(made.path), made.format]
    done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=420)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line] or ["died"]
        made.path.with_suffix(".log").write_text(done.stdout + done.stderr)
        return lines[-1][-160:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith(MARK))[len(MARK) :])


def agreement(ours, theirs):
    """Share of rows with the same tokens throughout, and the mean length of the equal prefix."""
    same = np.array(ours) == np.array(theirs)
    prefix = np.where(same.all(1), NEW, same.argmin(1))
    return f"{same.all(1).mean():.0%} of rows, prefix {prefix.mean():.1f} of {NEW}"


def main(out, shape, kinds):
    print(torch.cuda.get_device_name(), flush=True)
    print("| shape | checkpoint | TTFT 128 ms | TTFT long | TPOT b1 ms | TPOT b8 | as torch |")
    print("|---|---|---|---|---|---|---|", flush=True)
    given = Demo() if shape == "demo" else Random(config=shape)
    source = given.prepare(out)
    scales = input_scales(source.path, given.checkpoint.decoder.vocab)
    for name, (form, exporter) in KINDS.items():
        if kinds and not name.startswith(kinds):
            continue
        own = out / shape / name.replace(" ", "_")
        compressed = quantized(form, source, own / "hf", scales)
        made = stage(exporter(), compressed, own / "checkpoint")
        if shape == "demo":
            read_back(made, compressed)
        found = opened(made)
        if isinstance(found, str):
            print(f"| {shape} | {name} | {found} |", flush=True)
            continue
        equal = "-"
        if shape == "demo":
            with Torch(compressed, 1, "float16") as torch_side:
                equal = agreement(greedy(torch_side, prompts(torch_side.vocab)), found["tokens"])
        times = (found[key] for key in ("ttft_128", "ttft_long", "tpot_1", "tpot_8"))
        row = " | ".join(f"{t:.2f}" for t in times)
        print(f"| {shape} | {name} | {row} | {equal} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:])
    else:
        main(Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:]))
