"""What engines with a paged KV cache and a scheduler of their own have in common as backends.

Such an engine takes prompts and streams tokens that it chose itself; it is timed as that, one
token of every row at a time. Shapes: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import torch

from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend, Ids, Logits
from optpipe.bench.kv import KvCache
from optpipe.checkpoint import Checkpoint

KV_TOKENS = 65536
"""What the KV cache of every such engine holds, all rows together: these engines otherwise take
nearly all memory there is, and arms that are resident together must share the device."""
SLACK_BYTES = 4_000_000_000
"""Activations, CUDA graphs and libraries, beside weights and cache."""
ITEM = 2
"""Bytes of an element of such a cache, unless it is rounded to 8 bits."""
CONTEXT = 32768
"""Longest sequence, unless the model's own context is shorter."""
ROOM = 1
"""An engine takes a full window, to tell its log-probabilities, only with a token after it, which
it never reads. Where the window is the context of the model, each must be told to allow that."""


class Paged(Backend):
    """Greedy streams; the engine's part is in the abstract methods.

    ``prefill`` and ``decode`` return 1 at the token that the engine chose and 0 elsewhere, as the
    engine tells no more without slowing down; the logits of ``extend`` and ``score`` are
    log-probabilities, that is logits up to a constant at each position.
    """

    cache_in_bytes: ClassVar[bool] = False
    """Whether the size of its cache is given to the engine in bytes: of 8 bits it holds more."""

    @classmethod
    def memory_bytes(cls, artifact: Artifact, dtype: str) -> int:
        cache_bytes = kv_bytes(Checkpoint(artifact.path))
        return super().memory_bytes(artifact, dtype) + cache_bytes + SLACK_BYTES

    def _open(self, artifact: Artifact) -> Checkpoint:
        """What is known from the files alone."""
        checkpoint = Checkpoint(artifact.path)
        self.capacity = min(checkpoint.decoder.context, CONTEXT)
        self.vocab = checkpoint.decoder.vocab
        self.weight_bytes = checkpoint.size_bytes
        self.dtype = str(checkpoint.config.dtype).removeprefix("torch.")
        self.device = torch.cuda.get_device_name()
        decoder, item = checkpoint.decoder, 1 if rounds_cache(checkpoint) else ITEM
        pool = KV_TOKENS * ITEM // item if self.cache_in_bytes else KV_TOKENS
        windows = [None] * len(decoder.blocks)  # an engine may free what a window leaves behind
        heads, size = decoder.kv_heads, decoder.head_dim
        self.kv = KvCache.of(windows, heads, size, item, pool_tokens=pool)
        self._rows: list[list[int]] = []
        self._told: list[int] | None = None
        return checkpoint

    @abstractmethod
    def _begin(self, rows: list[list[int]]) -> list[int]:
        """Drop what runs, start a stream for each prompt; the first token of each."""

    @abstractmethod
    def _next(self) -> list[int]:
        """The next token of each stream."""

    @abstractmethod
    def _log_probs(self, row: list[int]) -> Logits:
        """(S, V) after each token of one sequence."""

    def first_tokens(self, ids_BS: Ids, lengths_B: Ids) -> Ids:
        self._rows = [row[:length].tolist() for row, length in zip(ids_BS, lengths_B, strict=True)]
        return self._chosen(self._begin(self._rows))

    def next_tokens(self, tokens_B: Ids) -> Ids:
        chosen = tokens_B.tolist()
        follows = self._told == chosen
        self._rows = [[*row, token] for row, token in zip(self._rows, chosen, strict=True)]
        # a token that the engine did not choose itself is a prompt to it
        return self._chosen(self._next() if follows else self._begin(self._rows))

    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        return self._one_hot(self.first_tokens(ids_BS, lengths_B))

    def decode(self, tokens_B: Ids) -> Logits:
        return self._one_hot(self.next_tokens(tokens_B))

    def extend(self, ids_BS: Ids) -> Logits:
        self._told = None
        new = ids_BS.tolist()
        self._rows = [[*row, *own] for row, own in zip(self._rows, new, strict=True)]
        return np.stack([self._log_probs(row)[-ids_BS.shape[1] :] for row in self._rows])

    def score(self, ids_BS: Ids) -> Logits:
        self._told = None
        return np.stack([self._log_probs(row) for row in ids_BS.tolist()])

    def drop(self) -> None:
        self._told = None

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def _chosen(self, tokens: list[int]) -> Ids:
        self._told = tokens
        return np.array(tokens, dtype=np.int64)

    def _one_hot(self, tokens_B: Ids) -> Logits:
        logits_BV = np.zeros((len(tokens_B), self.vocab), dtype=np.float32)
        logits_BV[np.arange(len(tokens_B)), tokens_B] = 1
        return logits_BV


def unusable(package: str) -> str | None:
    """Why an engine of this package cannot run here, if it cannot."""
    if find_spec(package) is None:
        return f"package '{package}' is not installed"
    if not torch.cuda.is_available():
        return f"{package} needs an NVIDIA GPU, and there is none"
    return None


def kv_bytes(checkpoint: Checkpoint, tokens: int = KV_TOKENS) -> int:
    """Of a cache in 16 bits for so many tokens."""
    decoder = checkpoint.decoder
    return 2 * len(decoder.blocks) * decoder.kv_heads * decoder.head_dim * ITEM * tokens


def rounds_cache(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint asks for a cache in 8 bits."""
    told = getattr(checkpoint.config, "quantization_config", None) or {}
    return bool(told.get("kv_cache_scheme"))
