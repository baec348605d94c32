"""vLLM as a backend: offline, in this process, and as the server that `vllm serve` runs.

Written against vLLM 0.25.1. Offline the engine is stepped by hand, so that every token is seen as
it comes. No prefix is ever reused, as every arm does the same work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from optpipe.artifact import Artifact
from optpipe.bench.backend import Logits
from optpipe.bench.endpoint import HOST, NAME, Endpoint
from optpipe.bench.paged import ROOM, Paged, kv_bytes, unusable
from optpipe.checkpoint import Checkpoint

SETTINGS = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # would be compiled at the first token
    "VLLM_NO_USAGE_STATS": "1",  # it would call home
}
OFFLINE = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process between us and the engine
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # see paged.ROOM
}


class Vllm(Paged):
    """A checkpoint in vLLM."""

    cache_in_bytes = True

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        os.environ.update(SETTINGS | OFFLINE)
        from vllm import LLM, SamplingParams  # takes seconds, and is rarely installed
        from vllm.sampling_params import RequestOutputKind

        checkpoint = self._open(artifact)
        llm: Any = LLM(
            model=str(artifact.path),
            skip_tokenizer_init=True,
            dtype=self.dtype,
            max_model_len=self.capacity + ROOM,
            kv_cache_memory_bytes=kv_bytes(checkpoint),
            gpu_memory_utilization=_share(artifact),
            enable_prefix_caching=False,
            max_logprobs=-1,
        )
        self._engine, self._params = llm.llm_engine, SamplingParams
        self._delta = RequestOutputKind.DELTA
        self._streams: dict[str, list[int]] = {}
        self._started = 0

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        return unusable("vllm")

    def submit(self, ids: Sequence[int], new_tokens: int) -> str:
        """Start a request beside those that run; see serving/serve.py."""
        return self._add([*ids], max_tokens=new_tokens, output_kind=self._delta)

    def step(self) -> dict[str, list[int]]:
        """Step the engine until some requests have tokens; those, by name."""
        found: dict[str, list[int]] = {}
        while not found:
            for output in self._engine.step():
                if output.request_id in self._streams and output.outputs[0].token_ids:
                    found[output.request_id] = [*output.outputs[0].token_ids]
        return found

    def _begin(self, rows: list[list[int]]) -> list[int]:
        self.drop()
        for row in rows:
            self._add(row, max_tokens=self.capacity - len(row), output_kind=self._delta)
        return self._next()

    def _next(self) -> list[int]:
        while not all(self._streams.values()):
            for name, tokens in self.step().items():
                self._streams[name].extend(tokens)
        return [stream.pop(0) for stream in self._streams.values()]

    def _log_probs(self, row: list[int]) -> Logits:
        self.drop()
        everything = {"prompt_logprobs": -1, "logprobs": -1, "flat_logprobs": True}
        name = self._add(row, max_tokens=1, **everything)
        found: Any = None
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.request_id == name and output.finished:
                    found = output
        assert found is not None
        self._streams.clear()
        prompt, last = found.prompt_logprobs, found.outputs[0].logprobs
        # the first position of a prompt has no token before it, and no entry
        parts = [self._dense(prompt, at) for at in range(1, len(row))]
        return np.stack([*parts, self._dense(last, 0)])

    def close(self) -> None:
        self.drop()
        del self._engine
        torch.cuda.empty_cache()

    def _add(self, row: list[int], **params: Any) -> str:
        name, self._started = str(self._started), self._started + 1
        given = self._params(temperature=0.0, ignore_eos=True, detokenize=False, **params)
        self._engine.add_request(name, {"prompt_token_ids": row}, given)
        self._streams[name] = []
        return name

    def drop(self) -> None:
        super().drop()
        self._engine.abort_request([*self._streams])
        self._streams.clear()
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _dense(self, flat: Any, at: int) -> Logits:
        """One position of vLLM's flat list of (token, log-probability), (V)."""
        here = slice(flat.start_indices[at], flat.end_indices[at])
        dense = np.full(self.vocab, -np.inf, dtype=np.float32)
        dense[flat.token_ids[here]] = flat.logprobs[here]
        return dense


class VllmEndpoint(Endpoint):
    """A checkpoint behind vLLM's OpenAI endpoint."""

    ask: ClassVar[Mapping[str, object]] = {"return_token_ids": True}
    cache_in_bytes = True

    def command(self, artifact: Artifact, port: int) -> Sequence[str]:
        os.environ.update(SETTINGS)
        options: dict[str, object] = {
            "model": artifact.path,
            "served-model-name": NAME,
            "host": HOST,
            "port": port,
            "dtype": self.dtype,
            "max-model-len": self.capacity,
            "kv-cache-memory-bytes": kv_bytes(Checkpoint(artifact.path)),
            "gpu-memory-utilization": _share(artifact),
        }
        flags = ["skip-tokenizer-init", "no-enable-prefix-caching", "disable-uvicorn-access-log"]
        given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return [*server, *given, *(f"--{flag}" for flag in flags)]

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        return unusable("vllm")


def _share(artifact: Artifact) -> float:
    """Of the GPU's memory: only checked against what is free, as the cache has its own limit."""
    total: int = torch.cuda.get_device_properties(0).total_memory
    return Vllm.memory_bytes(artifact, "") / total
