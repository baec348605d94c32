"""TensorRT-LLM as a backend, through its LLM API, and as a server: artifacts of format 'trtllm'.

Written from the documentation and sources of 1.3 (PyTorch backend); it has not been run. The engine
works on its own: streams are read as they come.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from optpipe.artifact import Artifact
from optpipe.bench.backend import Logits
from optpipe.bench.endpoint import HOST, Endpoint
from optpipe.bench.paged import KV_TOKENS, ROOM, Paged, unusable

SETTINGS = {"TLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}  # see paged.ROOM
CACHE = {"max_tokens": KV_TOKENS, "enable_block_reuse": False}


class Trtllm(Paged):
    """A unified checkpoint in TensorRT-LLM; no prefix is ever reused."""

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        os.environ.update(SETTINGS)
        from tensorrt_llm import LLM, SamplingParams  # takes seconds, and is rarely installed
        from tensorrt_llm.llmapi import KvCacheConfig

        self._open(artifact)
        self._llm: Any = LLM(
            model=str(artifact.path),
            skip_tokenizer_init=True,
            dtype=self.dtype,
            max_seq_len=self.capacity + ROOM,
            kv_cache_config=KvCacheConfig(**CACHE),
        )
        self._params = SamplingParams
        self._results: list[Any] = []
        self._waiting: list[list[int]] = []

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        return unusable("tensorrt_llm")

    def _begin(self, rows: list[list[int]]) -> list[int]:
        self.drop()
        for row in rows:
            params = self._greedy(self.capacity - len(row))
            self._results.append(self._llm.generate_async(row, params, streaming=True))
        self._waiting = [[] for _ in rows]
        return self._next()

    def _next(self) -> list[int]:
        for result, waiting in zip(self._results, self._waiting, strict=True):
            while not waiting:  # an answer may hold several tokens
                waiting.extend(next(result).outputs[0].token_ids_diff)
        return [waiting.pop(0) for waiting in self._waiting]

    def _log_probs(self, row: list[int]) -> Logits:
        self.drop()
        params = self._greedy(1, return_context_logits=True)
        logits_SV: torch.Tensor = self._llm.generate(row, params, use_tqdm=False).context_logits
        return np.asarray(torch.log_softmax(logits_SV.float(), dim=-1).cpu().numpy())

    def close(self) -> None:
        self.drop()
        self._llm.shutdown()

    def _greedy(self, new: int, **more: Any) -> Any:
        # without a tokenizer it asks for an end token; -1 is none
        given = {"end_id": -1, "ignore_eos": True, "temperature": 0.0, **more}
        return self._params(max_tokens=new, **given)

    def drop(self) -> None:
        super().drop()
        for result in self._results:
            result.abort()
        self._results, self._waiting = [], []


class TrtllmEndpoint(Endpoint):
    """A unified checkpoint behind trtllm-serve."""

    ask: ClassVar[Mapping[str, object]] = {"detokenize": False}

    def command(self, artifact: Artifact, port: int) -> Sequence[str]:
        os.environ.update(SETTINGS)
        settings = artifact.path.with_name(f"{artifact.path.name}-endpoint.yaml")
        settings.write_text(json.dumps({"kv_cache_config": CACHE}))  # JSON is YAML
        options = {
            "host": HOST,
            "port": port,
            "max_seq_len": self.capacity + ROOM,
            "extra_llm_api_options": settings,
        }
        given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        return ["trtllm-serve", "serve", str(artifact.path), *given]

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        return unusable("tensorrt_llm")
