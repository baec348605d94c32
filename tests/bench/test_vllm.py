"""The backend against an engine of the same interface, which adds the last two tokens up."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench import paged
from optpipe.bench.backend import backend_class
from optpipe.bench.serving.serve import Scheduler
from optpipe.bench.vllm import Vllm

VOCAB = 288


def follow(row):
    return sum(row[-2:]) % VOCAB


def log_probs(row):
    return np.random.default_rng(row).normal(size=VOCAB).astype(np.float32)


class Flat:
    def __init__(self, positions):
        self.token_ids, self.logprobs, self.start_indices, self.end_indices = [], [], [], []
        for position in positions:
            self.start_indices.append(len(self.token_ids))
            order = [] if position is None else np.argsort(-position).tolist()
            self.token_ids += order
            self.logprobs += [float(position[token]) for token in order]
            self.end_indices.append(len(self.token_ids))


class Engine:
    """Steps all streams by a token; a prompt of more than eight tokens takes two steps."""

    def __init__(self, limit):
        self.limit = limit
        self.live, self.prompts, self.steps = {}, 0, 0

    def add_request(self, name, prompt, params):
        assert name not in self.live
        self.prompts += 1
        row = prompt["prompt_token_ids"]
        assert len(row) + 1 <= self.limit, "as vLLM's _validate_prompt_len"
        self.live[name] = [row, params, len(row) > 8, params["max_tokens"]]

    def abort_request(self, names):
        for name in names:
            self.live.pop(name, None)

    def has_unfinished_requests(self):
        return bool(self.live)

    def step(self):
        self.steps += 1
        found = []
        for name, state in list(self.live.items()):
            row, params, waiting, left = state
            if waiting:
                state[2] = False
                continue
            flat = params.get("prompt_logprobs") == -1
            given = [None, *(log_probs(row[:n]) for n in range(1, len(row)))] if flat else []
            out = SimpleNamespace(
                request_id=name,
                finished=left == 1,
                prompt_logprobs=Flat(given),
                outputs=[SimpleNamespace(token_ids=[follow(row)], logprobs=Flat([log_probs(row)]))],
            )
            found.append(out)
            state[0], state[3] = [*row, follow(row)], left - 1
            if left == 1:
                del self.live[name]
        return found


@pytest.fixture
def opened(monkeypatch, tiny):
    """opened() -> the backend on a fake vllm; its arguments in ``given``."""
    given = {}

    def make(**arguments):
        given.update(arguments)
        return SimpleNamespace(llm_engine=Engine(arguments["max_model_len"]))

    package, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    package.LLM, package.SamplingParams = make, dict
    params.RequestOutputKind = SimpleNamespace(DELTA=1)
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
    properties = SimpleNamespace(total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    artifact = Artifact(path=tiny(), format="vllm", key="k")
    with backend_class("vllm")(artifact, 1, "float32") as backend:
        assert type(backend) is Vllm
        yield backend, given


IDS = np.array([[3, 4, 5], [6, 7, 8]])


def test_rows_of_different_lengths_are_continued_token_by_token(opened):
    backend, _ = opened
    rows = [[3, 4, 5], [6, 7]]
    logits = backend.prefill(IDS, np.array([3, 2]))
    for _ in range(5):
        chosen = logits.argmax(-1)
        assert chosen.tolist() == [follow(row) for row in rows]
        assert logits.shape == (2, VOCAB) and logits.sum() == 2
        rows = [[*row, int(token)] for row, token in zip(rows, chosen, strict=True)]
        logits = backend.decode(chosen)
    assert backend._engine.prompts == 2 and backend._engine.steps == 6


def test_a_token_that_the_engine_did_not_choose_becomes_a_prompt(opened):
    backend, _ = opened
    backend.prefill(IDS, np.array([3, 3]))
    logits = backend.decode(np.array([100, 101]))
    assert logits.argmax(-1).tolist() == [follow([5, 100]), follow([8, 101])]
    assert backend._engine.prompts == 4 and len(backend._engine.live) == 2


def test_a_window_that_fills_the_model_is_scored(opened):
    backend, _ = opened
    ids = np.resize(np.arange(3, 9), (1, backend.capacity))
    assert backend.score(ids).shape == (1, backend.capacity, VOCAB)


def test_a_long_prompt_that_takes_two_steps_is_waited_for(opened):
    backend, _ = opened
    ids = np.arange(20).reshape(1, 20)
    assert backend.prefill(ids, np.array([20])).argmax() == follow([18, 19])
    assert backend._engine.steps == 2


def test_scores_are_the_log_probabilities_of_every_position(opened):
    backend, _ = opened
    backend.prefill(IDS, np.array([3, 3]))
    found = backend.score(IDS)
    wanted = [[log_probs(row[: n + 1]) for n in range(3)] for row in IDS.tolist()]
    np.testing.assert_array_equal(found, np.array(wanted, dtype=np.float32))
    assert not backend._engine.live
    backend.prefill(IDS[:1], np.array([3]))
    more = backend.extend(np.array([[9, 10]]))
    rows = ([3, 4, 5, 9], [3, 4, 5, 9, 10])
    np.testing.assert_array_equal(more[0], np.array([log_probs(row) for row in rows]))


def test_the_cache_is_capped_for_all_alike(opened):
    backend, given = opened
    # 3 blocks, 2 heads of 16 dimensions for keys and as many for values, 2 bytes
    assert given["kv_cache_memory_bytes"] == 3 * 2 * 16 * 2 * 2 * paged.KV_TOKENS
    assert backend.kv.token_bytes == 3 * 2 * 16 * 2 * 2
    assert backend.kv.pool_tokens == paged.KV_TOKENS
    assert given["max_model_len"] == 129 and given["enable_prefix_caching"] is False


def test_without_the_package_or_a_gpu_it_says_so(tiny, monkeypatch):
    artifact = Artifact(path=tiny(), format="vllm", key="k")
    monkeypatch.setattr(paged, "find_spec", lambda name: None)
    assert Vllm.missing(artifact) == "package 'vllm' is not installed"
    monkeypatch.setattr(paged, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Vllm.missing(artifact) == "vllm needs an NVIDIA GPU, and there is none"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Vllm.missing(artifact) is None


def test_a_server_feeds_it_requests_as_they_come(opened):
    backend, _ = opened
    assert isinstance(backend, Scheduler)
    first = backend.submit([3, 4, 5], 3)
    assert backend.step() == {first: [9]}
    second = backend.submit(np.arange(20), 2)  # a prompt of two steps
    assert backend.step() == {first: [14]}
    assert backend.step() == {first: [23], second: [37]}
    backend.drop()
    assert not backend._engine.live and not backend._streams
