"""TensorRT and TensorRT for RTX as a backend: one engine, contexts for prefill and for decode.

All contexts share the weights and one KV cache, bound once as past and as present; fewer rows use
its first ones, so that no address changes. Decoding has a context and a CUDA graph per number of
rows, as NVIDIA advises. TensorRT for RTX captures graphs itself, once it has compiled its kernels.

Shapes: B rows, S tokens, L positions whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optpipe.artifact import Artifact
from optpipe.bench.backend import Backend, Ids, Logits
from optpipe.bench.cuda import Cuda
from optpipe.bench.kv import KvCache
from optpipe.build.nvidia import FULL, gpu_target
from optpipe.build.plan import LOGITS, listener
from optpipe.build.tensorrt import PLAN, about
from optpipe.build.validity import unfit
from optpipe.errors import one_line
from optpipe.export.graph import DATA

DTYPES = {"float": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}
PAST, PRESENT = "past_key_values", "present"
NUMBERS = ("input_ids", "position_ids", "write_indices", "logits_at")
"""The inputs that are no cache, in the order of the rows of a step."""
ALIGN = 32
"""TensorRT wants addresses at multiples of 256 bytes: of so many int64."""
PREFILL, DECODE = 0, 1
"""Profiles."""
Array = NDArray[Any]


@dataclass(frozen=True)
class Decode:
    """A step of one token for a number of rows, with all that it needs bound."""

    context: Any
    replay: Callable[[], None]
    logits_B1V: Tensor


class TensorRT(Backend):
    """Opens format 'tensorrt'; the dtype is that of the graph."""

    device: str

    def __init__(self, artifact: Artifact, threads: int, dtype: str) -> None:
        settings = about(artifact.path)
        self._gpu = Cuda()
        trt = import_module(settings["package"])
        self._rtx = settings["package"] != FULL
        self._logger = listener(trt)
        runtime = trt.Runtime(self._logger)
        if "version_compatible" in settings["flags"]:  # such a plan brings host code, ours
            runtime.engine_host_code_allowed = True
        with self._gpu.counted():
            engine = runtime.deserialize_cuda_engine((artifact.path / PLAN).read_bytes())
        if engine is None:
            raise RuntimeError(f"TensorRT cannot load the plan: {self._logger.said()}")
        if "weight_streaming" in settings["flags"]:
            self._stream(engine, settings["streaming_mb"])
        self.capacity, self.device = settings["capacity"], self._gpu.name
        self._max_batch, self._max_prompt = settings["max_batch"], settings["max_prompt"]
        self.max_batch = self._max_batch
        self._tensors = {entry["name"]: entry for entry in settings["tensors"]}
        logits = self._tensors["logits"]
        self.vocab, self._dtype = logits["shape"][-1], DTYPES[logits["dtype"]]
        self.dtype = str(self._dtype).removeprefix("torch.")
        self.weight_bytes = (artifact.path / DATA).stat().st_size  # a plan has kernels, too
        self._caches = [name for name in self._tensors if name.startswith(PAST)]
        self._cache = {n: self._gpu.zeros(self._full(n), self._dtype) for n in self._caches}
        self.kv = KvCache.of_tensors(self._cache.values(), self._max_batch)
        self._numbers = [name for name in NUMBERS if name in self._tensors]
        self._trt, self._engine, self._runtime = trt, engine, runtime
        self._prefill = self._context(PREFILL)
        self._depth_B = np.zeros(0, np.int64)
        padded = -self._max_batch % ALIGN + self._max_batch
        self._staged = self._gpu.staging((len(self._numbers), padded))
        self._step = self._gpu.zeros((len(self._numbers), padded), torch.int64)
        self._steps: dict[int, Decode] = {}

    @classmethod
    def missing(cls, artifact: Artifact) -> str | None:
        settings = about(artifact.path)
        if settings["plan"] is None:
            return f"no plan was built: {settings['not_built']}"
        name, version, gpu = settings["package"], settings["version"], gpu_target()
        if gpu is None or find_spec(name) is None:
            none = f"there is no NVIDIA GPU here; the plan is for {settings['target']}"
            return none if gpu is None else f"package '{name}' is not installed"
        try:
            trt = import_module(name)
        except (ImportError, OSError) as error:  # a library it needs is missing
            return f"package '{name}' is broken: {one_line(error)}"
        if trt.__version__ != version and "version_compatible" not in settings["flags"]:
            return f"the plan is of {name} {version}, installed is {trt.__version__}"
        return unfit(trt, artifact.path / PLAN, settings, gpu)

    def prefill(self, ids_BS: Ids, lengths_B: Ids) -> Logits:
        wanted_BV = np.zeros((len(ids_BS), self.vocab), np.float32)
        return self._prompted(ids_BS, lengths_B, wanted_BV, self._to_host)

    def first_tokens(self, ids_BS: Ids, lengths_B: Ids) -> Ids:
        return self._prompted(ids_BS, lengths_B, np.zeros(len(ids_BS), np.int64), self._greedy)

    def decode(self, tokens_B: Ids) -> Logits:
        return self._to_host(self._decode(tokens_B))[:, 0]

    def next_tokens(self, tokens_B: Ids) -> Ids:
        return self._greedy(self._decode(tokens_B))[:, 0]

    def extend(self, ids_BS: Ids) -> Logits:
        size = min(LOGITS, self._max_prompt)
        parts = []
        for start in range(0, ids_BS.shape[1], size):
            part_BS = ids_BS[:, start : start + size]
            at_BL = np.tile(np.arange(part_BS.shape[1]), (len(part_BS), 1))
            parts.append(self._to_host(self._feed(part_BS, at_BL, more=start > 0)))
        return np.concatenate(parts, 1)

    def score(self, ids_BS: Ids) -> Logits:
        self._reset(len(ids_BS))
        return self.extend(ids_BS)

    def close(self) -> None:
        self._steps.clear()  # graphs and contexts before the engine that they run
        self._cache.clear()
        del self._prefill, self._engine, self._runtime

    @classmethod
    def memory_bytes(cls, artifact: Artifact, dtype: str) -> int:
        return (artifact.path / PLAN).stat().st_size  # of the host, while it is read

    def reset_peak(self) -> None:
        self._gpu.reset_peak()

    def peak_bytes(self) -> int:
        return self._gpu.peak_bytes()

    def device_s(self) -> tuple[float, ...] | None:
        return self._gpu.device_s()

    def _reset(self, rows: int) -> None:
        if rows > self._max_batch:
            most = f"the engine's build.max_batch of {self._max_batch}"
            raise ValueError(f"{rows} rows exceed {most}")
        self._depth_B = np.zeros(rows, np.int64)

    def _check(self, rows: int, tokens: int) -> None:
        assert rows == len(self._depth_B), "as many rows as were prefilled"
        longest = int(self._depth_B.max()) + tokens
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens exceed the engine's capacity of {self.capacity}")

    def _full(self, name: str, rows: int | None = None) -> tuple[int, ...]:
        """The shape of a cache for ``rows``, by default as many as there may be."""
        rows = self._max_batch if rows is None else rows
        return (rows, *(int(size) for size in self._tensors[name]["shape"][1:]))

    def _stream(self, engine: Any, most_mb: int | None) -> None:
        """Keep so many weights on the GPU; TensorRT wants to know before there is a context."""
        budget = engine.get_weight_streaming_automatic_budget()
        if most_mb is not None:
            budget = min(most_mb * 1_000_000, engine.streamable_weights_size)
        with self._gpu.counted():
            engine.weight_streaming_budget_v2 = budget
        if engine.weight_streaming_budget_v2 != budget:
            raise RuntimeError(f"TensorRT refuses {budget} bytes of weights: {self._logger.said()}")

    def _context(self, profile: int) -> Any:
        """An execution context of one profile, with the cache bound as past and as present."""
        trt, engine = self._trt, self._engine
        runtime_config = engine.create_runtime_config()
        # the default takes as much scratch memory as the largest profile, in every context
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        runtime_config.set_execution_context_allocation_strategy(strategy)
        if self._rtx and profile == DECODE:
            runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        with self._gpu.counted():
            context = engine.create_execution_context(runtime_config)
            if not context.set_optimization_profile_async(profile, self._gpu.handle):
                raise RuntimeError(f"TensorRT refuses profile {profile}: {self._logger.said()}")
            self._gpu.wait()
        for name in self._caches:
            address = self._cache[name].data_ptr()
            for bound in (name, name.replace(PAST, PRESENT)):
                context.set_tensor_address(bound, address)
        return context

    def _prompted(
        self, ids_BS: Ids, lengths_B: Ids, found: Array, read: Callable[[Tensor], Array]
    ) -> Array:
        """Feed prompts in parts; ``found`` (B, ..) gets what is read at the end of each row."""
        self._reset(len(ids_BS))
        for start in range(0, ids_BS.shape[1], self._max_prompt):
            part_BS = ids_BS[:, start : start + self._max_prompt]
            last_B = lengths_B - 1 - start
            here_B = (last_B >= 0) & (last_B < part_BS.shape[1])
            at_B1 = np.where(here_B, last_B, 0)[:, None]
            found[here_B] = read(self._feed(part_BS, at_B1, more=start > 0))[here_B, 0]
        self._depth_B = lengths_B.astype(np.int64)  # padding is overwritten before it is seen
        return found

    def _feed(self, ids_BS: Ids, logits_at_BL: Ids, more: bool) -> Tensor:
        """Feed tokens on top of the cache; logits (B, L, V) at the wanted positions."""
        rows, tokens = ids_BS.shape
        self._check(rows, tokens)
        if tokens == 1:
            return self._decode(ids_BS[:, 0], more)
        values = {
            "input_ids": ids_BS,
            "position_ids": self._depth_B[:, None] + np.arange(tokens),
            "write_indices": self._depth_B,
            "logits_at": logits_at_BL,
        }
        with self._gpu.work():
            inputs = {
                name: torch.from_numpy(np.ascontiguousarray(values[name])).to(self._step.device)
                for name in self._numbers
            }
        shape = (rows, logits_at_BL.shape[1], self.vocab)
        logits_BLV = self._gpu.zeros(shape, self._dtype)
        self._bind(self._prefill, rows, inputs, logits_BLV)
        with self._gpu.timed(more):
            self._enqueue(self._prefill)
        self._depth_B = self._depth_B + tokens
        return logits_BLV

    def _decode(self, tokens_B: Ids, more: bool = False) -> Tensor:
        """Logits (B, 1, V), until the next step of as many rows."""
        self._check(len(tokens_B), 1)
        rows = len(tokens_B)
        values = {"input_ids": tokens_B, **dict.fromkeys(NUMBERS[1:3], self._depth_B)}
        for row, name in enumerate(self._numbers):
            self._staged[row, :rows] = torch.from_numpy(values.get(name, np.zeros_like(tokens_B)))
        with self._gpu.work():
            self._step.copy_(self._staged, non_blocking=True)
        if rows not in self._steps:
            self._steps[rows] = self._prepare(rows)
        step = self._steps[rows]
        with self._gpu.timed(more):
            step.replay()
        self._depth_B = self._depth_B + 1
        return step.logits_B1V

    def _prepare(self, rows: int) -> Decode:
        """The step of one token for so many rows; also runs it, which changes nothing.

        It writes the token and its keys where the replay that follows writes them again.
        """
        inputs = {
            name: self._step[row, :rows].view(rows, *([1] if name != "write_indices" else []))
            for row, name in enumerate(self._numbers)
        }
        logits_B1V = self._gpu.zeros((rows, 1, self.vocab), self._dtype)
        context = self._context(DECODE)
        self._bind(context, rows, inputs, logits_B1V)
        self._enqueue(context)  # TensorRT settles its state for new shapes outside of a capture
        self._gpu.wait()

        def enqueue() -> None:
            self._enqueue(context)

        replay = enqueue if self._rtx else self._gpu.capture(enqueue)
        return Decode(context, replay, logits_B1V)

    def _bind(self, context: Any, rows: int, inputs: dict[str, Tensor], logits: Tensor) -> None:
        shapes = {name: self._full(name, rows) for name in self._caches}
        shapes |= {name: tuple(value.shape) for name, value in inputs.items()}
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise RuntimeError(f"TensorRT refuses {name} {shape}: {self._logger.said()}")
        for name, value in {**inputs, "logits": logits}.items():
            context.set_tensor_address(name, value.data_ptr())
        if unset := context.infer_shapes():
            raise RuntimeError(f"inputs without a shape: {', '.join(unset)}")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._gpu.handle):
            raise RuntimeError(f"TensorRT cannot run: {self._logger.said()}")

    def _greedy(self, logits_BLV: Tensor) -> Ids:
        with self._gpu.work():
            return logits_BLV.argmax(-1).cpu().numpy()

    def _to_host(self, logits_BLV: Tensor) -> Logits:
        with self._gpu.work():  # float32 only on the host: half as much to copy
            return logits_BLV.cpu().float().numpy()
