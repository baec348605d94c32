"""The adapter to lm-evaluation-harness against likelihoods computed from the torch model itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer

import optpipe.demo
from optpipe import evaluate
from optpipe.artifact import Artifact
from optpipe.bench.backend import open_backend
from optpipe.config import typed
from optpipe.demo.next_line import FILE, questions
from optpipe.errors import InputError
from optpipe.evaluate import EvalConfig, Evaluate, Scorer, compare, mcnemar, task_manager

DEMO = Path(optpipe.demo.__file__).parent
TEXT = "def main(argv):\n    return len(argv)\n"


@pytest.fixture
def backend(tiny):
    with open_backend(Artifact(path=tiny(), format="hf", key="k")) as opened:
        yield opened


def nll(folder, ids, start):
    """-ln P(ids[start:] | ids[:start]) in float64, and the arg-maxima there."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    with torch.inference_mode():
        logits = lm(input_ids=torch.tensor([ids[:-1]])).logits[0, start - 1 :]
    targets = torch.tensor(ids[start:])
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return float(loss), logits.argmax(-1).tolist()


def test_likelihoods_are_those_of_the_model(backend, tiny):
    ids = np.random.default_rng(0).integers(0, 288, 40).tolist()
    loss, greedy = nll(tiny(), ids, 30)
    found, is_greedy = Scorer(backend).loglikelihood(ids[:30], ids[30:])
    assert found == pytest.approx(-loss, abs=1e-4) and not is_greedy
    assert Scorer(backend).loglikelihood(ids[:30], greedy[:1])[1]
    assert Scorer(backend).loglikelihood(ids, []) == (0.0, True)


def test_a_long_context_loses_its_beginning(backend, tiny):
    """128 tokens of context: of 200 + 20 tokens the last 129 count, whose last is not fed."""
    ids = np.random.default_rng(1).integers(0, 288, 220).tolist()
    loss, _ = nll(tiny(), ids[-129:], 109)
    assert Scorer(backend).loglikelihood(ids[:200], ids[200:])[0] == pytest.approx(-loss, abs=1e-4)
    with pytest.raises(InputError, match="129 tokens does not fit in the context of 128"):
        Scorer(backend).loglikelihood([1], ids[:129])


def test_generation_is_greedy_and_stops(backend, tiny):
    ids = np.random.default_rng(2).integers(0, 288, 20).tolist()
    lm = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    wanted = list(ids)
    with torch.inference_mode():
        for _ in range(6):
            wanted.append(int(lm(input_ids=torch.tensor([wanted])).logits[0, -1].argmax()))
    scorer = Scorer(backend)
    assert scorer.generate(ids, 6, lambda _: False) == wanted[20:]
    assert scorer.generate(ids, 6, lambda tokens: len(tokens) == 2) == wanted[20:22]
    assert len(scorer.generate(ids * 20, 100, lambda _: False)) == 100, "it fits after a cut"
    with pytest.raises(InputError, match="128 new tokens leave no room"):
        scorer.generate(ids, 128, lambda _: False)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 5), (2, 9), (12, 1), (600, 700)])
def test_mcnemar_is_the_sign_test_of_what_changed(better, worse):
    expected = binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert mcnemar(better, worse) == pytest.approx(expected, rel=1e-9)


def test_changes_count_documents_both_ways_and_for_each_metric():
    correct = {"acc": [1.0, 1.0, 0.0, 0.0], "acc_norm": [0.0] * 4}
    now = {"acc": [1.0, 0.0, 1.0, 1.0], "acc_norm": [0.0, 0.0, 0.0, 1.0]}
    acc = {"became_right": 2, "became_wrong": 1, "mcnemar_p": 1.0}
    norm = {"became_right": 1, "became_wrong": 0, "mcnemar_p": 1.0}
    found = compare({"t": {"correct": correct}}, {"t": {"correct": now}})
    assert found == {"t": {"acc": acc, "acc_norm": norm}}


def test_the_bundled_questions_are_what_their_function_makes():
    lines = FILE.read_text().splitlines()
    assert lines == [*questions((DEMO / "heldout.txt").read_text(encoding="utf-8"), seed=0)]
    rows = [json.loads(line) for line in lines]
    assert all(len(set(row["choices"])) == 4 for row in rows)
    right = [row["answer"] for row in rows]
    assert len(rows) == 120 and FILE.stat().st_size < 100_000
    assert max(right.count(n) for n in range(4)) < 45, "no place is right more often than chance"


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'optpipe\[eval\]'"):
        task_manager(EvalConfig())
    monkeypatch.setattr("sys.argv", ["evaluate", str(DEMO)])
    assert evaluate.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "message"), [({"tasks": []}, "eval.tasks"), ({"limit": 0}, "eval.limit=0")]
)
def test_bad_values_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        EvalConfig(**fields)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "conf" / "eval").glob("*.yaml"))
)
def test_options_give_every_value(path):
    content = OmegaConf.load(path)
    assert typed(content, EvalConfig, "eval") and len(content) == 3


@pytest.fixture
def harness():
    """harness(backend) -> the class that lm_eval sees."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed: 30 packages")
    from optpipe.harness import Harness

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    return lambda backend: Harness(Scorer(backend), tokenizer)


@pytest.fixture(scope="module")
def demo():
    with open_backend(Artifact(path=DEMO, format="hf", key="k")) as opened:
        yield opened


class Asked:
    """A request of lm_eval."""

    def __init__(self, *args):
        self.args = args


def test_rolling_likelihood_is_that_of_the_whole_text(harness, demo):
    lm = harness(demo)
    ids = lm.tok_encode(TEXT, add_special_tokens=False)
    loss, _ = nll(DEMO, [0, *ids], 1)
    assert lm.loglikelihood_rolling([Asked(TEXT)])[0] == pytest.approx(-loss, abs=1e-3)
    long = (DEMO / "heldout.txt").read_text(encoding="utf-8")[:6000]
    ids = lm.tok_encode(long, add_special_tokens=False)
    assert 1024 < len(ids) < 2048
    first, _ = nll(DEMO, [0, *ids[:1024]], 1)
    left = len(ids) - 1024  # predicted with as much context before them as fits
    rest, _ = nll(DEMO, ids[-1025:], 1025 - left)
    assert lm.loglikelihood_rolling([Asked(long)])[0] == pytest.approx(-first - rest, rel=1e-5)


def test_pairs_and_answers(harness, demo):
    lm = harness(demo)
    context, rest = "def main(argv):\n    ", "return len(argv)\n"
    ids = lm.tok_encode(context + rest)
    start = len(lm.tok_encode(context.rstrip()))
    loss, _ = nll(DEMO, ids, start)
    assert lm.loglikelihood([Asked(context, rest)])[0][0] == pytest.approx(-loss, abs=1e-3)
    (line,) = lm.generate_until([Asked("import os\nimport ", {"until": ["\n"], "max_gen_toks": 8})])
    assert line and "\n" not in line
    with pytest.raises(InputError, match="only greedy decoding"):
        lm.generate_until([Asked("x", {"do_sample": True})])


def test_the_bundled_task_shows_that_the_demo_model_has_learned(harness, demo):
    """Chance is 25 %, and stays below 50 % of 16 questions but in one of fifty trials."""
    found = Evaluate(config=EvalConfig(limit=16), tokenizer=DEMO)(demo)["next_line"]
    accuracy = found["metrics"]["acc"]
    assert found["documents"] == 16
    assert (
        accuracy["value"] == pytest.approx(np.mean(found["correct"]["acc"]))
        and accuracy["value"] >= 0.5
    )
    norm = found["metrics"]["acc_norm"]["value"]
    assert norm == pytest.approx(np.mean(found["correct"]["acc_norm"]))
    spread = math.sqrt(accuracy["value"] * (1 - accuracy["value"]) / 15)
    assert accuracy["stderr"] == pytest.approx(spread)


def test_a_task_that_is_not_there_is_named(harness, tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        task_manager(EvalConfig(folder=str(tmp_path / "none")))
    assert set(task_manager(EvalConfig()).all_tasks) == {"next_line"}
