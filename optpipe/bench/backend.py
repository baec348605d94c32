"""What the benchmark needs of a runtime: prefill, decode and whole-sequence logits of one artifact.

Shapes: B rows of a batch, S tokens of a row, V entries of the vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from importlib import import_module
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from optpipe.artifact import Artifact
from optpipe.bench import machine
from optpipe.bench.kv import KvCache
from optpipe.errors import InputError

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]


class Backend(ABC):
    """One artifact, open in one runtime, with one KV cache. A context manager.

    The constructor of a subclass takes (artifact, threads, dtype) and loads everything, so that
    its duration is the load time. ``dtype`` is a name such as 'float32'; a runtime whose files
    fix the dtype ignores it and says in ``dtype`` what it computes in.

    Every method returns only when its logits lie in host memory. They may live in a buffer that
    the next call overwrites: copy what must last.
    """

    capacity: int
    """Most tokens a row of the KV cache can hold."""
    max_batch: int | None = None
    """Most rows it takes at once; None: as many as memory holds."""
    vocab: int
    weight_bytes: int
    """Bytes of the weights as this runtime holds them in memory."""
    dtype: str
    """What it computes in: 'float32', 'float16' or 'bfloat16'."""
    device: str
    """'cpu' or the name of the GPU."""
    kv: KvCache | None = None
    """How it stores keys and values; None: it does not tell."""
    decoding: str = "by the runtime"
    """How a step of one token is run, where there is more than one way."""

    @abstractmethod
    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None: ...

    @abstractmethod
    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        """Empty the cache, feed the prompts; logits (B, V) at the last real token of each row.

        Rows are padded on the right: only ``ids_BS[b, :lengths_B[b]]`` is real.
        """

    @abstractmethod
    def decode(self, tokens_B: Ids) -> Logits:
        """Feed one token to each row; logits (B, V) of the position after it."""

    def first_tokens(self, ids_BS: Ids, lengths_B: Ids) -> Ids:
        """The greedy token after each prompt, (B); chosen on a GPU, so that few bytes move."""
        tokens_B: Ids = self.prefill(ids_BS, lengths_B).argmax(-1)
        return tokens_B

    def next_tokens(self, tokens_B: Ids) -> Ids:
        """Feed one token to each row; the greedy tokens after them, (B)."""
        next_B: Ids = self.decode(tokens_B).argmax(-1)
        return next_B

    @abstractmethod
    def extend(self, ids_BS: Ids) -> Logits:
        """Feed S tokens to each row on top of the filled cache; logits (B, S, V) of all of them."""

    @abstractmethod
    def score(self, ids_BS: Ids) -> Logits:
        """Logits (B, S, V) of whole sequences from an empty cache; the cache is void afterwards."""

    def drop(self) -> None:
        """Forget all requests; one that went on by itself would run beside the arm timed next."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give memory and threads back."""

    @classmethod
    def memory_bytes(cls, artifact: Artifact, dtype: str) -> int:
        """Upper estimate of what the weights take in memory once loaded, from the files alone."""
        return 2 * artifact.size_bytes  # the file, mapped, and the copy packed for the kernels

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        """Why this machine cannot run it, say a package that is not installed; None: it can.

        Such an artifact is made and checked, but neither judged nor timed; the report says why.
        """
        return None

    def reset_peak(self) -> None:
        """Forget the peak of memory so far. Raises OSError where the system cannot."""
        machine.reset_peak()

    def peak_bytes(self) -> int:
        """Most memory since ``reset_peak``: the process on a CPU, the device on a GPU."""
        return machine.peak_bytes()

    def cpu_ns(self) -> int:
        """CPU time so far of all that it runs in: the threads of this process."""
        return time.process_time_ns()

    def device_s(self) -> tuple[float, ...] | None:
        """Seconds of each step since the last call, oldest first; None on a CPU.

        Between two events of the device around each prefill and each decode step.
        """
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


BACKENDS = {
    "hf": "optpipe.bench.torch.Torch",
    "onnx": "optpipe.bench.ort.Ort",
    "ort": "optpipe.bench.ort.Ort",
    "tensorrt": "optpipe.bench.tensorrt.TensorRT",
    "vllm": "optpipe.bench.vllm.Vllm",
    "trtllm": "optpipe.bench.trtllm.Trtllm",
}
"""Format of an artifact -> the class that opens it, imported only when it is needed."""
ENDPOINTS = {
    "vllm": "optpipe.bench.vllm.VllmEndpoint",
    "trtllm": "optpipe.bench.trtllm.TrtllmEndpoint",
}
"""Format -> the class that puts it behind a server, to be sent requests alone."""
NOT_DRIVEN = {
    "trtllm_legacy": "trtllm-build makes engines of it, where they will run; see its build.sh",
    "gguf": "llama.cpp runs it, which optpipe does not drive",
}
"""Formats that are made and checked but never benchmarked, and why."""


def backend_class(format: str) -> type[Backend]:
    """The backend of an artifact format; imports its runtime."""
    if format not in BACKENDS:
        raise InputError(f"no backend opens format '{format}'; known are {', '.join(BACKENDS)}")
    return _imported(BACKENDS[format])


def endpoint_class(format: str) -> type[Backend]:
    """The server for an artifact format; one of ENDPOINTS."""
    return _imported(ENDPOINTS[format])


def _imported(path: str) -> type[Backend]:
    module, _, name = path.rpartition(".")
    found: type[Backend] = getattr(import_module(module), name)
    return found


def open_backend(artifact: Artifact, threads: int = 1, dtype: str = "float32") -> Backend:
    """Load an artifact into the runtime of its format."""
    return backend_class(artifact.format)(artifact, threads, dtype)
