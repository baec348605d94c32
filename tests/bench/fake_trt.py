"""The calls of TensorRT that the backend makes, on ONNX Runtime; a GPU of host memory.

A plan is the path of an engine folder, whose ONNX file is executed where addresses point.
"""

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime as ort
import torch

PAST, PRESENT = "past_key_values", "present"
TYPES = {"half": np.float16, "float": np.float32, "int64": np.int64}
__version__ = "11.4.0.106"


class ILogger:
    class Severity:
        ERROR, WARNING = 1, 2


class ExecutionContextAllocationStrategy:
    ON_PROFILE_CHANGE = "per profile"


class CudaGraphStrategy:
    WHOLE_GRAPH_CAPTURE = "whole"


class Runtime:
    def __init__(self, logger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan):
        if not plan:
            self.logger.log(ILogger.Severity.ERROR, "the plan is empty")
            return None
        return Engine(Path(plan.decode()))


class Engine:
    contexts: ClassVar[list] = []  # of all engines, for tests to look at
    streamable_weights_size, most = 900_000, 10_000_000

    def __init__(self, folder):
        about = json.loads((folder / "engine.json").read_text())
        self.folder, self.profiles = folder, [*about["profiles"].values()]
        self.tensors = {entry["name"]: entry for entry in about["tensors"]}
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        file = str(folder / "model.onnx")
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.budget = self.streamable_weights_size

    def get_weight_streaming_automatic_budget(self):
        return 123_456

    @property
    def weight_streaming_budget_v2(self):
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, size):
        assert not any(context.engine is self for context in self.contexts), "set too late"
        if size <= self.most:  # else it is only logged
            self.budget = size

    def create_runtime_config(self):
        return RuntimeConfig()

    def create_execution_context(self, runtime_config):
        assert runtime_config.strategy == "per profile"
        self.contexts.append(Context(self, runtime_config))
        return self.contexts[-1]


class RuntimeConfig:
    strategy = cuda_graph_strategy = None

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy


class Context:
    def __init__(self, engine, config):
        self.engine, self.config = engine, config
        self.shapes, self.addresses, self.runs = {}, {}, []

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return stream == Host.handle

    def set_input_shape(self, name, shape):
        least, _, most = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(a <= size <= b for a, size, b in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return name in self.engine.tensors

    def infer_shapes(self):
        names = (name for name, entry in self.engine.tensors.items() if entry["mode"] == "input")
        return [name for name in names if name not in self.shapes]

    def execute_async_v3(self, stream):
        binding = self.engine.session.io_binding()
        for name, entry in self.engine.tensors.items():
            arguments = ("cpu", 0, TYPES[entry["dtype"]], self._shape(name), self.addresses[name])
            if entry["mode"] == "input":
                binding.bind_input(name, *arguments)
            else:
                binding.bind_output(name, *arguments)
        for name in (name for name in self.addresses if name.startswith(PRESENT)):
            assert self.addresses[name] == self.addresses[name.replace(PRESENT, PAST)]
        self.engine.session.run_with_iobinding(binding)
        self.runs.append(self.shapes["input_ids"])
        return stream == Host.handle

    def _shape(self, name):
        if name == "logits":
            return (*self.shapes["logits_at"], self.engine.tensors[name]["shape"][-1])
        return self.shapes[name.replace(PRESENT, PAST)]


class Host:
    """Stands in for optpipe.bench.cuda.Cuda."""

    name, handle = "host", 7

    def __init__(self):
        self.steps, self.graphs = [], 0

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def staging(self, shape):
        return torch.zeros(shape, dtype=torch.int64)

    @contextmanager
    def work(self):
        yield

    @contextmanager
    def counted(self):
        yield

    @contextmanager
    def timed(self, more=False):
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        if more:
            self.steps[-1] += took
        else:
            self.steps.append(took)

    def wait(self):
        pass

    def device_s(self):
        found, self.steps = tuple(self.steps), []
        return found

    def capture(self, enqueue):
        self.graphs += 1
        return enqueue
