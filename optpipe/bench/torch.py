"""The torch runtime: a transformers model, its KV cache, and nothing else between the tokens.

On a GPU a step of one token is one CUDA graph (`graph`): launched kernel by kernel, a model of a
billion weights decodes as fast as Python launches, and everything else looks fast beside it.

Shapes: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend, Ids, Logits
from optpipe.bench.graph import Steps, moving
from optpipe.bench.kv import KvCache
from optpipe.bench.rings import Rings
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.model import load

CYCLES_PER_S = 2e9
"""At least as fast as the clock of any GPU, so that a wait is no shorter than asked for."""
EAGER = "kernel by kernel, KV cache that grows"
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


class Torch(Backend):
    """A checkpoint in torch, on the GPU where there is one."""

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        if dtype not in DTYPES:
            raise InputError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
        torch.set_num_threads(threads)
        checkpoint = Checkpoint(artifact.path)
        self._gpu = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if self._gpu else "cpu"
        lm: Any = load(checkpoint, DTYPES[dtype])  # transformers hides the type of .to
        self._lm = lm.to("cuda" if self._gpu else "cpu")
        self.capacity, self.vocab = checkpoint.decoder.context, checkpoint.decoder.vocab
        self.dtype, self.weight_bytes = dtype, _weight_bytes(self._lm)
        takes = signature(self._lm.forward).parameters
        self._cache_argument = "cache" if "cache" in takes else "past_key_values"  # before 5.24
        self._cache: DynamicCache | None = None
        self._pad_B: Tensor | None = None
        decoder, item = checkpoint.decoder, DTYPES[dtype].itemsize
        windows = [block.window for block in decoder.blocks]
        self.kv = KvCache.of(windows, decoder.kv_heads, decoder.head_dim, item)
        self._steps = Steps(self._lm, self._cache_argument, Rings(windows))
        table = moving(self._lm)
        self.graphed = self._gpu and table is None
        """Whether steps are CUDA graphs, or what stands for them on a CPU."""
        self.decoding = "one CUDA graph a step, KV cache of fixed size" if self.graphed else EAGER
        if self._gpu and table is not None:
            self.decoding += f", since a graph cannot replay rotary tables of type '{table}'"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.hold_s, self.queued = 0.0, False
        """The GPU waits so long before every pass, and whether the last was queued whole by then:
        so the time between its events has no gaps in which the GPU waited for a launch."""

    @classmethod
    def memory_bytes(cls, artifact: Artifact, dtype: str) -> int:
        # Codes take a byte and zeros come back when a layer is opened: count all weights as dense.
        checkpoint = Checkpoint(artifact.path)
        forms = (checkpoint.forms or {}).values()
        dense = sum(form.rows * form.cols for form in forms)
        elements = sum(int(np.prod(shape)) for shape in checkpoint.shapes().values())
        return (dense + elements) * int(DTYPES[dtype].itemsize)

    @torch.inference_mode()
    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        return _to_host(self._prefill(ids_BS, lengths_B))

    @torch.inference_mode()
    def decode(self, tokens_B: Ids) -> Logits:
        return _to_host(self._decode(tokens_B))

    @torch.inference_mode()
    def first_tokens(self, ids_BS: Ids, lengths_B: Ids) -> Ids:
        if not self._gpu:
            return super().first_tokens(ids_BS, lengths_B)
        return self._prefill(ids_BS, lengths_B).argmax(-1).cpu().numpy()

    @torch.inference_mode()
    def next_tokens(self, tokens_B: Ids) -> Ids:
        if not self._gpu:
            return super().next_tokens(tokens_B)
        return self._decode(tokens_B).argmax(-1).cpu().numpy()

    @torch.inference_mode()
    def extend(self, ids_BS: Ids) -> Logits:
        new = ids_BS.shape[1]
        if self.graphed:
            return _to_host(self._run(ids_BS, self._steps.more(new), keep=0))
        assert self._cache is not None
        given = self._given(int(self._cache.get_seq_length()), new)
        return _to_host(self._run(ids_BS, given, keep=0))

    @torch.inference_mode()
    def score(self, ids_BS: Ids) -> Logits:
        self._cache = self._pad_B = None
        logits: Tensor = self._lm(input_ids=self._tensor(ids_BS), use_cache=False).logits
        return _to_host(logits)

    def close(self) -> None:
        del self._lm, self._steps
        self._cache = None

    def reset_peak(self) -> None:
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            super().reset_peak()

    def peak_bytes(self) -> int:
        if not self._gpu:
            return super().peak_bytes()
        return torch.cuda.max_memory_allocated() + self._steps.pool_bytes

    def device_s(self) -> tuple[float, ...] | None:
        """Between the events around every forward pass; they are read only here, after timing."""
        if not self._gpu:
            return None
        torch.cuda.synchronize()
        found = tuple(start.elapsed_time(end) / 1e3 for start, end in self._events)
        self._events.clear()
        return found

    def _prefill(self, ids_BS: Ids, lengths_B: Ids) -> Tensor:
        """Logits (B, V) on the device."""
        pad_B = ids_BS.shape[1] - lengths_B
        if self.graphed:
            self._steps.begin(pad_B, ids_BS.shape[1])
        else:
            self._cache = DynamicCache(config=self._lm.config)
        self._pad_B = self._tensor(pad_B) if pad_B.any() else None
        return self._run(_pad_left(ids_BS, pad_B), self._given(0, ids_BS.shape[1]), keep=1)[:, 0]

    def _decode(self, tokens_B: Ids) -> Tensor:
        """Logits (B, V) on the device."""
        if self.graphed:
            return self._timed(self._steps.ready(tokens_B))[:, 0]
        assert self._cache is not None
        given = self._given(int(self._cache.get_seq_length()), 1)
        return self._run(tokens_B[:, None], given, keep=1)[:, 0]

    def _given(self, depth: int, new: int) -> dict[str, Any]:
        """Masks and positions of so many tokens at a depth, where padding makes them special."""
        if self._pad_B is None:
            return {}
        slots = torch.arange(depth + new, device=self._pad_B.device)
        return {
            "attention_mask": (slots >= self._pad_B[:, None]).long(),
            "position_ids": (slots[depth:] - self._pad_B[:, None]).clamp(min=0),
        }

    def _run(self, ids_BS: Ids, given: dict[str, Any], keep: int) -> Tensor:
        """Feed tokens on top of the cache; logits of the last ``keep`` of them (0: of all)."""
        cache = self._steps.cache if self.graphed else self._cache
        given = {**given, self._cache_argument: cache, "use_cache": True, "logits_to_keep": keep}
        input_ids = self._tensor(ids_BS)

        def forward() -> Tensor:
            logits: Tensor = self._lm(input_ids=input_ids, **given).logits
            return logits

        return self._timed(forward)

    def _timed(self, call: Callable[[], Tensor]) -> Tensor:
        """What it returns; between two events on a GPU, which may still be at it."""
        if self.hold_s and self._gpu:
            torch.cuda._sleep(int(self.hold_s * CYCLES_PER_S))
        start = self._mark()
        logits = call()
        end = self._mark()
        if start is not None and end is not None:
            self._events.append((start, end))
            self.queued = bool(self.hold_s) and not start.query()
        return logits

    def _mark(self) -> torch.cuda.Event | None:
        """A time stamp in the queue of the GPU; None on a CPU."""
        if not self._gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _tensor(self, array: Ids) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to("cuda" if self._gpu else "cpu")


def _to_host(logits: Tensor) -> Logits:
    """Waits for the GPU; copies nothing on a CPU."""
    return logits.float().cpu().numpy()


def _pad_left(ids_BS: Ids, pad_B: Ids) -> Ids:
    """Move the padding from the right to the left, so that cache slots keep true distances.

    Sliding-window masks count slots, not positions: a hole inside a row would shorten the window.
    """
    if not pad_B.any():
        return ids_BS
    return np.stack([np.roll(row, pad) for row, pad in zip(ids_BS, pad_B, strict=True)])


def _weight_bytes(lm: torch.nn.Module) -> int:
    """Parameters and buffers, each storage once: a tied head shares that of the embeddings."""
    tensors = [*lm.parameters(), *lm.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
