from dataclasses import replace

import numpy as np
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench.backend import open_backend
from optpipe.bench.fidelity import quality
from optpipe.bench.fidelity.divergence import concatenate
from optpipe.bench.fidelity.quality import Judged, QualityConfig, Windows, cut
from optpipe.bench.fidelity.questions import Compare, Greedy, Reference, Steady, Write
from optpipe.bench.fidelity.reference import keep_in
from optpipe.bench.scenario import Cell, hash_ids, prompts
from optpipe.errors import InputError


def judged(workers, baseline="baseline", budget_s=60.0, count=3):
    rng = np.random.default_rng(0)
    ids_WS = rng.integers(0, 11, (count, 20))
    given = Windows(ids_WS=ids_WS, source={}, is_text=True)
    return quality.judge(workers, baseline, given, budget_s, lambda *_: None)


def test_more_noise_is_more_divergence_and_less_agreement(local):
    noises = [0.0, 0.1, 0.5, 2.0]
    workers = {"baseline": local("baseline")}
    workers |= {str(n): local(str(n), noise=n) for n in noises}
    scored = judged(workers).scored
    all_N = [concatenate(scored[str(n)]) for n in noises]
    kl = [positions.kl.sum() for positions in all_N]
    agreed = [positions.agrees.sum() for positions in all_N]
    assert kl[0] == 0 and kl == sorted(kl) and len(set(kl)) == 4
    assert agreed == sorted(agreed, reverse=True) and agreed[0] == 3 * 19


def test_all_arms_see_the_same_windows_when_time_runs_out(local):
    workers = {name: local(name) for name in ("baseline", "other")}
    found = judged(workers, budget_s=0.0)
    assert found.windows == 1
    assert {len(windows) for windows in found.scored.values()} == {1}
    given = Windows(ids_WS=np.zeros((3, 20), np.int64), source={}, is_text=True)
    kept = quality.shortened(given, 1)
    assert len(kept.ids_WS) == 1 and "after 1 of 3" in kept.source["reasons"]["windows"]
    assert quality.shortened(given, 3) is given


def test_an_arm_that_is_lost_has_a_reason_and_the_others_their_numbers(local):
    workers = {"baseline": local("baseline"), "a": local("a", fault="hang"), "b": local("b")}
    found = judged(workers)
    assert "'a' was ended" in found.missing["a"] and workers["a"].killed
    assert len(found.scored["b"]) == 3
    assert found.steady.keys() == found.greedy.keys() == {"baseline", "b"}


def test_without_the_baseline_there_is_no_comparison(local):
    workers = {"baseline": local("baseline", fault="hang"), "a": local("a")}
    assert judged(workers).missing.keys() == {"baseline", "a"}, "no stale reference"
    alone = judged({"a": local("a", noise=1.0)}, baseline=None)
    assert len(alone.scored["a"]) == 3


def test_what_an_earlier_session_found_stays():
    first = Judged(windows=2, faults={"a": ["1"]}, missing={"b": "late"})
    first.add(Judged(windows=3, faults={"a": ["2"], "c": ["3"]}))
    assert first == Judged(windows=2, faults={"a": ["1"], "c": ["3"]}, missing={"b": "late"})


def test_perplexity_is_that_of_the_text_given_the_window_so_far(tiny, tmp_path):
    """Against the loss transformers computes itself."""
    from transformers import AutoModelForCausalLM

    folder = tiny()
    ids_S = np.random.default_rng(0).integers(0, 288, 100)
    file = tmp_path / "reference.npy"
    with open_backend(Artifact(path=folder, format="hf", key="k")) as backend:
        reference = Reference(ids_S=ids_S, file=file)(backend)
        again = Compare(ids_S=ids_S, file=file)(backend)
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(ids_S)[None]
    with torch.inference_mode():
        loss = lm(input_ids=ids, labels=ids).loss.item()
    assert reference.nll.mean() == pytest.approx(loss, rel=1e-5) and len(again.nll) == 99
    assert (again.nll == reference.nll).all() and (again.kl == 0).all() and again.agrees.all()


def test_a_baseline_is_scored_once_for_all_runs_that_keep_its_logits(local, tmp_path):
    ids_WS = np.random.default_rng(0).integers(0, 11, (3, 20))
    given, found = Windows(ids_WS=ids_WS, source={}, is_text=True), []
    scored = []

    def counted(name, **plan):
        worker = local(name, **plan)
        score = worker.backend.score
        worker.backend.score = lambda ids: scored.append((name, len(ids[0]))) or score(ids)
        return worker

    for kept in (None, tmp_path / "kept", tmp_path / "kept"):
        workers = {"baseline": counted("baseline"), "a": counted("a", noise=0.1)}
        found.append(quality.judge(workers, "baseline", given, 60.0, lambda *_: None, kept))
    windows = [name for name, size in scored if name == "baseline"]
    steady = 1 + 3 + 1  # together, each row alone, the first again
    assert len(windows) == (3 + steady) + (3 + steady) + (0 + steady)
    assert len([*(tmp_path / "kept").iterdir()]) == 3
    for other in found[1:]:
        for name in ("baseline", "a"):
            for mine, theirs in zip(found[0].scored[name], other.scored[name], strict=True):
                np.testing.assert_array_equal(mine.kl, theirs.kl)
                np.testing.assert_array_equal(mine.nll, theirs.nll)


def test_logits_are_found_again_only_for_the_same_computation(local):
    worker, ids_WS = local("baseline"), np.zeros((2, 10), np.int64)

    def place(content="c", cache="cache", arm=worker.arm, ids_WS=ids_WS, **fields):
        return keep_in(cache, arm, content, replace(worker.loaded, **fields), ids_WS)

    same = place()
    assert place() == same and place(load_s=9.0) == same
    others = [place(content="d"), place(dtype="float16"), place(device="GPU"),
              place(arm=replace(worker.arm, threads=2))]  # fmt: skip
    assert len({same, *others}) == 5
    assert place(cache=None) is None
    assert place(ids_WS=np.zeros((400, 1000), np.int64), vocab=150_000) is None, "240 GB"


def test_an_arm_is_steady_up_to_the_effect_of_its_batch(tiny):
    """Against torch's KL of the logits of a row alone and in a batch, in bfloat16."""
    ids_BS = np.random.default_rng(0).integers(0, 288, (8, 40))
    artifact = Artifact(path=tiny(), format="hf", key="k")
    with open_backend(artifact, dtype="bfloat16") as backend:
        found = Steady(ids_BS=ids_BS)(backend)
        both = [backend.score(ids)[0, :-1].astype(np.float64) for ids in (ids_BS[:1], ids_BS)]
    log_p, log_q = (torch.from_numpy(x).log_softmax(-1) for x in both)
    effect = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.floor.kl[:39], effect.numpy(), atol=1e-12)
    assert found.repeats and len(found.floor.kl) == 8 * 39


def test_the_same_input_that_gives_other_logits_is_seen(local):
    rows = np.zeros((1, 9), np.int64)
    assert Steady(ids_BS=rows)(local("a").backend).repeats
    assert not Steady(ids_BS=rows)(local("b", fault="moody").backend).repeats


def test_greedy_tokens_are_those_of_transformers(tiny):
    from transformers import AutoModelForCausalLM

    ids_BS = np.random.default_rng(1).integers(3, 288, (2, 9))
    with open_backend(Artifact(path=tiny(), format="hf", key="k")) as backend:
        found = Greedy(ids_BS=ids_BS, new_tokens=6, limit_s=60)(backend)
    lm = AutoModelForCausalLM.from_pretrained(tiny()).eval()
    ids = torch.from_numpy(ids_BS)
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, lm(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    np.testing.assert_array_equal(found.T, ids[:, 9:].numpy())


def test_an_arm_that_takes_few_rows_is_asked_for_some_at_a_time(local):
    ids_BS = np.random.default_rng(0).integers(0, 11, (5, 4))
    greedy = Greedy(ids_BS=ids_BS, new_tokens=3, limit_s=60)
    few, all_at_once = greedy(local("few", max_batch=2).backend), greedy(local("all").backend)
    assert few.shape == (3, 5)
    np.testing.assert_array_equal(few, all_at_once)


def test_the_tokens_of_a_cell_are_noted_for_those_that_were_fast_enough(local):
    cell, found = Cell("single", 2, 8, 3), Judged()
    workers = {"a": local("a"), "b": local("b", fault="hang")}
    quality.expect(workers, cell, 11, 5, found)
    first_B = prompts(cell, 11, 5).sum(-1) % 11
    tokens_NB = np.stack([(first_B + step) % 11 for step in range(3)])
    assert found.expected == {("a", cell): hash_ids(tokens_NB)} and "b" in found.missing


def test_windows_are_spread_evenly_and_do_not_overlap():
    found = cut(list(range(100)), [], size=10, most=4)
    assert found[:, 0].tolist() == [0, 20, 50, 70] and found.shape == (4, 10)
    assert cut(list(range(35)), [7], size=11, most=9).tolist() == [
        [7, *range(10)], [7, *range(10, 20)], [7, *range(20, 30)],
    ]  # fmt: skip
    assert cut([1, 2, 3], [], size=10, most=4).tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match="1 tokens"):
        cut([1], [], size=10, most=4)


def test_the_bundled_text_in_the_tokens_of_the_demo_model():
    found = quality.windows(quality.BUNDLED.parent, QualityConfig(windows=3), 64, 4096, 0)
    assert found.ids_WS.shape == (3, 64) and found.is_text
    assert found.source["text"] == "heldout.txt" and len(found.source["text_sha256"]) == 64


def test_without_a_tokenizer_the_baseline_writes_the_text(local, tmp_path):
    workers = {"baseline": local("baseline"), "a": local("a", capacity=30)}
    loaded = {name: worker.loaded for name, worker in workers.items()}
    config = QualityConfig(windows=2)
    found = quality.prepare(workers, loaded, tmp_path, config, 3)
    assert found.is_text and found.ids_WS.shape == (2, 30)
    assert found.source["sampled_from"] == "baseline" and found.source["text"] is None
    assert found.source["reasons"]["window"].startswith("'a' holds no more than 30 tokens")
    again = quality.prepare(workers, loaded, tmp_path, config, 3)
    np.testing.assert_array_equal(found.ids_WS, again.ids_WS)
    alone = quality.prepare({"a": workers["a"]}, {"a": loaded["a"]}, tmp_path, config, 3)
    assert not alone.is_text and "sampled_from" not in alone.source


def test_sampled_text_follows_the_probabilities_of_the_model(tiny):
    """A model predicts its own samples as well as its entropy says, random ids far worse."""
    rng = np.random.default_rng(0)
    with open_backend(Artifact(path=tiny(), format="hf", key="k")) as backend:
        ids_WS = Write(ids_BS=rng.integers(0, 288, (16, 1)), tokens=60, seed=4)(backend)
        logits = torch.from_numpy(backend.score(ids_WS)[:, :-1]).double()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    targets = torch.from_numpy(ids_WS[:, 1:]).ravel()
    nll = torch.nn.functional.nll_loss(log_p.flatten(0, 1), targets)
    assert nll.item() == pytest.approx(entropy, rel=0.03)
    uniform = -log_p.mean().item()
    assert uniform > 1.03 * entropy, "the test could not fail"


def test_bad_values_are_refused(tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("hm")
    binary.write_bytes(b"\xff" * 100)
    for fields, message in [
        ({"windows": 0}, "windows=0"),
        ({"windows": 1, "required": "near"}, "windows=1: at least 2 is needed with .*=near"),
        ({"max_perplexity_increase": -0.1}, "max_perplexity_increase=-0.1"),
        ({"required": "perfect"}, "required='perfect': allowed are null, lossless, near, comp"),
        ({"text": str(tmp_path / "none.txt")}, "none.txt': No such file"),
        ({"text": str(short)}, "too short"),
        ({"text": str(binary)}, "not UTF-8"),
    ]:
        with pytest.raises(InputError, match=message):
            QualityConfig(**fields)
