"""Models in float16, and quantized in every form there is, without calibration."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optpipe import model
from optpipe.artifact import Artifact
from optpipe.blockwise import rewrite
from optpipe.checkpoint import Checkpoint

sys.path.insert(0, str(Path(__file__).parent))

from eight_bits import eight_bit_layer


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    """half(family) -> the tiny model in float16, which a checkpoint can hold bit by bit."""
    made = {}

    def folder(family="llama"):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            lm = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float16)
            lm.save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def eight_bits(tmp_path):
    """eight_bits(folder, number=, group_size=, inputs=) -> an artifact whose blocks are so."""

    def make(folder, **form):
        layers = model.layers(Checkpoint(folder))
        planned = {
            name: before if name == "lm_head" else replace(before, bits=8, **form)
            for name, before in layers.items()
        }

        def change(name, layer, statistic):
            return layer if name == "lm_head" else eight_bit_layer(layer, planned[name])

        out = tmp_path / "eight"
        out.mkdir()
        source = Artifact(path=folder, format="hf", key="k")
        rewrite(source, out, planned, change, lambda *_: None)
        return Artifact(path=out, format="hf", key="k", lineage=("quant",))

    return make
