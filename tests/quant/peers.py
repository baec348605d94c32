"""Our methods and those of other libraries on the demo model, by one held-out perplexity.

    python tests/quant/peers.py                                   # ours and nvidia-modelopt's
    python tests/quant/peers.py --llmcompressor VENV/bin/python   # and llm-compressor's

All calibrate on the same 64 windows of 512 tokens, with the settings of the peer, and are scored on
the same ten of 1024, each as its own library runs it. llm-compressor needs an environment of its
own (transformers 5.15 to 5.17) from which this package can be imported. Every peer must have
changed the model. Exit code 1 if one of ours is more than 1 % worse than the peer beside it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import optpipe
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.text import tokenize

DEMO = Path(optpipe.__file__).parent / "demo"
WINDOWS, CONTEXT = 10, 1024
TOLERANCE = 1.01


@torch.inference_mode()
def perplexity(lm):
    ids = torch.tensor(tokenize(DEMO, (DEMO / "heldout.txt").read_text()))
    losses = []
    for window in ids[: WINDOWS * CONTEXT].reshape(WINDOWS, CONTEXT):
        logits = lm(window[None]).logits[0, :-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]))
    return math.exp(torch.stack(losses).mean())


def dense():
    from optpipe import model

    return model.load(Checkpoint(DEMO))


def ours(*stages):
    """The perplexity after our stages."""
    from optpipe import model
    from optpipe.artifact import Artifact

    with tempfile.TemporaryDirectory() as folder:
        source = Artifact(path=DEMO, format="hf", key="demo")
        for place, stage in enumerate(stages):
            out = Path(folder) / str(place)
            out.mkdir()
            stage.run(source, out, lambda *_: None)
            source = Artifact(path=out, format="hf", key=str(place))
        return perplexity(model.load(Checkpoint(source.path)))


def modelopt(preset):
    """As modelopt itself computes it; 'export:' as it does for its checkpoints, where layers that
    read the same inputs divide them alike."""
    from optpipe.quant.presets import PRESETS, imported

    exported, _, preset = preset.rpartition(":")
    lm, ids_ST = dense(), Calib().ids(Checkpoint(DEMO))
    with imported() as mtq, torch.inference_mode():
        config = PRESETS[preset].settings(mtq, 128)
        mtq.quantize(lm, config, lambda lm: [lm(ids[None]) for ids in ids_ST])
        if exported:
            from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

            requantize_resmooth_fused_llm_layers(lm)
    return perplexity(lm)


def pairs():
    """Name -> (what of ours, what of modelopt's or the recipe of llm-compressor)."""
    from optpipe.prune.sparsegpt import SparseGpt
    from optpipe.prune.wanda import Wanda
    from optpipe.quant.awq import Awq
    from optpipe.quant.fp8 import Fp8
    from optpipe.quant.gptq import Gptq
    from optpipe.quant.int8 import Int8
    from optpipe.quant.modelopt import Modelopt
    from optpipe.quant.rtn import Rtn
    from optpipe.transform.smoothquant import SmoothQuant

    return {
        "int4 g128, rounding": ([Rtn()], "int4_rtn"),
        "int4 g128, AWQ": ([Awq()], "int4_awq"),
        "int4 g128, modelopt's AWQ in our form": ([Modelopt(preset="int4_awq")], "export:int4_awq"),
        "int8, SmoothQuant": ([SmoothQuant(linears=True, alpha=1.0), Int8()], "int8_smoothquant"),
        "int8, modelopt's in our form": ([Modelopt(preset="int8_smoothquant")], "int8_smoothquant"),
        "fp8": ([Fp8()], "fp8"),
        "int4 g128, GPTQ": ([Gptq()], "lc:gptq"),
        "int4 g128, AWQ of llm-compressor": ([Awq()], "lc:awq"),
        "int8 per token, SmoothQuant": (
            [SmoothQuant(alpha=0.5), Int8(activations="token")],
            "lc:smoothquant",
        ),
        "half of the weights, SparseGPT": ([SparseGpt()], "lc:sparsegpt"),
        "2:4, SparseGPT": ([SparseGpt(pattern="2:4")], "lc:sparsegpt24"),
        "half of the weights, Wanda": ([Wanda()], "lc:wanda"),
    }


def recipe(name):
    """The modifiers of llm-compressor."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    every = ["re:.*_proj$"]  # the string "Linear" would match nothing, without a warning
    weights = {"targets": "Linear", "ignore": ["lm_head"]}
    if name == "gptq":
        return [GPTQModifier(scheme="W4A16", **weights)]
    if name == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        return [AWQModifier(), QuantizationModifier(scheme="W4A16", **weights)]
    if name == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smooth = SmoothQuantModifier(smoothing_strength=0.5)
        return [smooth, QuantizationModifier(scheme="W8A8", **weights)]
    pattern = "2:4" if name.endswith("24") else "0:0"
    kind = WandaPruningModifier if name == "wanda" else SparseGPTModifier
    return [kind(sparsity=0.5, mask_structure=pattern, targets=every)]


def llmcompressor(name):
    """In the environment of llm-compressor: perplexity and share of zeros."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    ids = Calib().ids(Checkpoint(DEMO)).tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    oneshot(
        model=lm,
        dataset=Dataset.from_dict(rows),
        recipe=recipe(name),
        max_seq_length=512,
        num_calibration_samples=len(ids),
    )
    weights = [p for n, p in lm.named_parameters() if n.endswith("_proj.weight")]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    print(json.dumps({"perplexity": perplexity(lm), "zeros": zeros}))


def peer(name, python):
    """A peer's perplexity, or None without an environment for it."""
    if not name.startswith("lc:"):
        return modelopt(name)
    if python is None:
        return None
    name = name.removeprefix("lc:")
    done = subprocess.run(
        [python, __file__, "--peer", name], capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(f"llm-compressor {name} failed: {done.stderr.strip().splitlines()[-1]}")
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if name.startswith(("sparsegpt", "wanda")):
        assert abs(found["zeros"] - 0.5) < 0.01, f"{name} left {found['zeros']:.0%} zeros"
    return found["perplexity"]


def compare(python, only):
    base, bad = perplexity(dense()), []
    print(f"dense {base:.4f}")
    for name, (stages, other) in pairs().items():
        if only and only not in name:
            continue
        started_s = time.perf_counter()
        us = ours(*stages)
        took_s = time.perf_counter() - started_s
        them = peer(other, python)
        if them is None:
            print(f"{name:40} {us / base - 1:+8.2%} {took_s:4.0f} s    not run", flush=True)
            continue
        assert abs(them - base) > 1e-4, f"{other} did nothing"
        other_s = time.perf_counter() - started_s - took_s
        print(
            f"{name:40} {us / base - 1:+8.2%} {took_s:4.0f} s    {other:18} "
            f"{them / base - 1:+8.2%} {other_s:4.0f} s",
            flush=True,
        )
        if us > TOLERANCE * them:
            bad.append(name)
    if bad:
        sys.exit(f"more than 1 % worse than the peer: {', '.join(bad)}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--llmcompressor", help="python of an environment with llm-compressor")
    parser.add_argument("--peer", help="run one recipe of llm-compressor in this environment")
    parser.add_argument("--only", help="part of a name")
    arguments = parser.parse_args()
    if arguments.peer:
        llmcompressor(arguments.peer)
    else:
        compare(arguments.llmcompressor, arguments.only)
