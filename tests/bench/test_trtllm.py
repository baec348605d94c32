"""The backend against a stand-in for TensorRT-LLM's LLM API, which adds the last two tokens up."""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from optpipe.artifact import Artifact
from optpipe.bench import paged
from optpipe.bench.backend import backend_class
from optpipe.bench.trtllm import Trtllm

VOCAB = 288


def logits(row):
    return np.random.default_rng(row).normal(size=VOCAB).astype(np.float32)


class Result:
    """Streams one token, then two at a time."""

    def __init__(self, row, params):
        self.row, self.params, self.aborted, self.size = list(row), params, False, 1

    def __next__(self):
        new = []
        for _ in range(self.size):
            new.append(sum([*self.row, *new][-2:]) % VOCAB)
        self.row += new
        self.size = 2
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids_diff=new)])

    def abort(self):
        self.aborted = True


class Llm:
    def __init__(self, **given):
        self.given, self.started, self.closed = given, [], False

    def generate_async(self, row, params, streaming):
        assert streaming and params["end_id"] == -1 and params["ignore_eos"]
        self.started.append(Result(row, params))
        return self.started[-1]

    def generate(self, row, params, use_tqdm):
        assert params["return_context_logits"] and params["max_tokens"] == 1
        if self.given["max_seq_len"] - len(row) < 1:
            raise ValueError("default_max_tokens must be greater than 0")
        found = np.stack([logits(row[: n + 1]) for n in range(len(row))])
        return SimpleNamespace(context_logits=torch.from_numpy(found))

    def shutdown(self):
        self.closed = True


@pytest.fixture
def backend(monkeypatch, tiny):
    monkeypatch.delenv("TLLM_ALLOW_LONG_MAX_MODEL_LEN", raising=False)
    package, api = ModuleType("tensorrt_llm"), ModuleType("tensorrt_llm.llmapi")
    package.LLM, package.SamplingParams, api.KvCacheConfig = Llm, dict, dict
    monkeypatch.setitem(sys.modules, "tensorrt_llm", package)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", api)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "fake")
    artifact = Artifact(path=tiny(), format="trtllm", key="k")
    with backend_class("trtllm")(artifact, 1, "float32") as opened:
        assert type(opened) is Trtllm
        yield opened
    assert opened._llm.closed


def test_streams_are_read_a_token_at_a_time(backend):
    rows = [[3, 4, 5], [6, 7, 8]]
    told = backend.prefill(np.array(rows), np.array([3, 3]))
    for _ in range(6):
        chosen = told.argmax(-1)
        assert chosen.tolist() == [sum(row[-2:]) % VOCAB for row in rows]
        rows = [[*row, int(token)] for row, token in zip(rows, chosen, strict=True)]
        told = backend.decode(chosen)
    assert len(backend._llm.started) == 2
    first = backend._llm.started[0]
    assert first.params["max_tokens"] == 128 - 3
    backend.decode(np.array([1, 2]))  # not what it chose
    assert first.aborted and backend._llm.started[2].row[:10] == [*rows[0], 1]


def test_scores_are_log_probabilities(backend):
    ids = np.array([[3, 4, 5]])
    wanted = torch.log_softmax(
        torch.from_numpy(np.stack([logits([3, 4, 5][:n]) for n in (1, 2, 3)])), -1
    )
    np.testing.assert_allclose(backend.score(ids)[0], wanted.numpy(), rtol=0, atol=1e-6)


def test_the_cache_is_capped_as_that_of_vllm(backend):
    config = backend._llm.given["kv_cache_config"]
    assert config == {"max_tokens": paged.KV_TOKENS, "enable_block_reuse": False}


def test_a_full_window_is_scored(backend):
    """With a token after it, beyond the context of the model."""
    assert backend.capacity == 128 and os.environ["TLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    backend.score(np.ones((1, 128), dtype=int))
    with pytest.raises(ValueError, match="default_max_tokens"):
        backend._log_probs([1] * 129)
