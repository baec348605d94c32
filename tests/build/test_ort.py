"""The engine folder: complete, and usable where there is no torch."""

import json
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import optpipe
from optpipe.artifact import Artifact
from optpipe.build.generate import Engine, generate
from optpipe.build.ort import Ort
from optpipe.export.onnx import Onnx
from optpipe.quant.rtn import Rtn

DEMO = Path(optpipe.__file__).parent / "demo"
NEEDED = ("onnxruntime", "numpy", "numpy.libs", "tokenizers", "flatbuffers", "google", "packaging")


@pytest.fixture
def engine(run):
    quantized = run(Rtn(bits=4, group_size=32), Artifact(path=DEMO, format="hf", key="k"))
    return run(Ort(), run(Onnx(), quantized)).path


@pytest.fixture
def bare_python(tmp_path):
    """A virtual environment with onnxruntime, numpy and tokenizers, and nothing else of ours."""
    venv.create(tmp_path / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib"))
    target = next((tmp_path / "venv").glob("lib*/**/site-packages"))
    for name in NEEDED:
        if (site / name).exists():
            (target / name).symlink_to(site / name)
    return next((tmp_path / "venv").glob("[bS]*/python*"))


def test_the_loader_runs_without_torch(engine, bare_python, tmp_path):
    elsewhere = tmp_path / "deployed"
    shutil.copytree(engine, elsewhere)
    probe = [str(bare_python), "-c", "import torch"]
    assert subprocess.run(probe, capture_output=True, check=False).returncode != 0

    def call(*args):
        command = [str(bare_python), "generate.py", *args, "--new-tokens", "12"]
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompt = tokenizer.encode("def main():")
    settings = json.loads((engine / "engine.json").read_text())
    expected = generate(Engine(engine), prompt, 12, set(settings["stop_tokens"]))
    said = call("def main():")
    assert (said.returncode, said.stdout) == (0, tokenizer.decode(expected) + "\n"), said.stderr
    (elsewhere / "tokenizer.json").unlink()
    numbers = call(" ".join(map(str, prompt)), "--ids")
    assert [int(n) for n in numbers.stdout.split()] == expected and len(expected) == 12
    for wrong, why in (("def main():",), "no tokenizer"), (("1 x", "--ids"), "got '1 x'"):
        refused = call(*wrong)
        assert refused.returncode == 2 and why in refused.stderr.splitlines()[-1]


def test_a_tokenizer_of_another_kind_becomes_one_the_loader_reads(run, tmp_path):
    """GPT-2 as it was published has vocab.json and merges.txt."""
    shutil.copytree(DEMO, tmp_path / "model")
    bpe = json.loads((DEMO / "tokenizer.json").read_text())["model"]
    (tmp_path / "model/tokenizer.json").unlink()
    (tmp_path / "model/vocab.json").write_text(json.dumps(bpe["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
    (tmp_path / "model/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>"}
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(settings))
    folder = run(Ort(), run(Onnx(), tmp_path / "model")).path
    text = "def main():\n    return 0"
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert ids == AutoTokenizer.from_pretrained(DEMO).encode(text)


def test_generation_stops_at_a_stop_token_and_at_capacity(tiny, run):
    folder = run(Ort(), run(Onnx(capacity=16), tiny())).path
    free = generate(Engine(folder, 1), [3, 4, 5], 100, set())
    assert len(free) == 13
    cut = free.index(free[4])
    assert generate(Engine(folder, 1), [3, 4, 5], 100, {free[4]}) == free[:cut]


def test_settings_name_what_stops(run, tiny):
    folder = run(Ort(), run(Onnx(), tiny())).path
    settings = json.loads((folder / "engine.json").read_text())
    assert settings["stop_tokens"] == [2] and settings["accuracy_level"] == 4


def test_a_reused_engine_forgets_the_last_prompt(tiny, run):
    engine = Engine(run(Ort(), run(Onnx(), tiny())).path, 1)
    ids = np.random.default_rng(0).integers(3, 288, (2, 20))
    lengths = np.array([20, 20])
    first = engine.prefill(ids, lengths)
    engine.decode(np.array([7, 8]))
    engine.prefill(ids[:1, :5], np.array([5]))
    np.testing.assert_array_equal(engine.prefill(ids, lengths), first)


@pytest.mark.parametrize("level", [0, 2, 5])
def test_bad_accuracy_levels_are_refused(level):
    with pytest.raises(ValueError, match=rf"1 \(float32\) or 4 \(int8\), got {level}"):
        Ort(accuracy_level=level)
