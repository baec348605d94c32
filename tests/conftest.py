"""Causal LMs small enough to optimize in a second: random weights of every family, no download."""

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for layers.py
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin starve a shared machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else references run a C++ compiler for ten seconds

import pytest
import torch
import transformers

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 288,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 32, "sliding_window": 16, "query_pre_attn_scalar": 32}
# caps small enough to change what a random model computes
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}


def pytest_collection_finish():
    """What modules hold is not searched for garbage again and again: a twentieth of all time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` are skipped, by name, where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=16),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=32),
    "phi3": lambda: transformers.Phi3Config(**COMMON),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **SLIDING, **CAPS),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **COMMON, **SLIDING, sliding_window_pattern=2
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=288,
        n_positions=128,
        n_embd=64,
        n_layer=3,
        n_head=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
FAMILIES = [*CONFIGS]


def save_random(family, folder, changes):
    """A random model of this family: weights large enough that its logits are not flat."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config = type(config)(**{**config.to_dict(), **changes}) if changes else config
    lm = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 1:  # norms and biases that do nothing would test nothing
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                parameter *= 3
    lm.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family) -> folder of a model of 3 blocks with 128 tokens of context, made once.

    Keywords change its config; None lets transformers work a value out.
    """
    made = {}

    def folder(family="llama", **changes):
        key = (family, *changes.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            save_random(family, made[key], changes)
        return made[key]

    return folder


@pytest.fixture
def families():
    return FAMILIES


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def run(tmp_path):
    """run(stage, folder or artifact) -> artifact of that stage; run.calib is a small one.

    A stage that compares with the untouched model gets its folder as ``baseline``.
    """
    from optpipe.artifact import Artifact
    from optpipe.calibrate import Calib

    def call(stage, source, baseline=None):
        if not isinstance(source, Artifact):
            source = Artifact(path=source, format="hf", key="k")
        out = tmp_path / f"{len([*tmp_path.iterdir()])}"
        out.mkdir()
        untouched = source if baseline is None else Artifact(path=baseline, format="hf", key="b")
        stats = stage.run_with(source, untouched, out, lambda *_: None)
        lineage = (*source.lineage, type(stage).__name__.lower())
        return Artifact(path=out, format=stage.produces, key="k", lineage=lineage, stats=stats)

    call.calib = Calib(source="random", samples=4, tokens=32)
    return call
