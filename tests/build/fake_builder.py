"""The calls of TensorRT's builder, with which tests see what a GPU's own package is asked for.

tests/build/test_tensorrt_api.py holds those calls against the real signatures. Builds the bytes of
the graph that was parsed; knows only the timings of the cache it is given and one of its own.
"""

from enum import IntEnum
from types import SimpleNamespace

import onnx

__version__, __name__ = "11.4.0.106", "tensorrt"
BuilderFlag = SimpleNamespace(
    **{name: name for name in ("WEIGHT_STREAMING", "REFIT", "VERSION_COMPATIBLE", "SPARSE_WEIGHTS")}
)
HardwareCompatibilityLevel = SimpleNamespace(AMPERE_PLUS="ampere+")
LayerInformationFormat = SimpleNamespace(JSON="json")
LayerType = SimpleNamespace(ATTENTION_INPUT="attention")
MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
configs = []  # of all builds


class NetworkDefinitionCreationFlag(IntEnum):
    STRONGLY_TYPED = 1


class ILogger:
    class Severity:
        ERROR, WARNING = 1, 2


class IProgressMonitor:
    pass


class Builder:
    refuses = None  # what it says instead of building

    def __init__(self, logger):
        self.logger = logger

    def create_network(self, flags):
        assert flags == 2, "strongly typed"
        return Network()

    def create_builder_config(self):
        configs.append(Config())
        return configs[-1]

    def create_optimization_profile(self):
        return Profile()

    def build_serialized_network(self, network, config):
        if self.refuses:
            self.logger.log(ILogger.Severity.ERROR, self.refuses)
            return None
        config.progress_monitor.phase_start("building", None, 1)
        config.progress_monitor.step_complete("building", 0)
        config.progress_monitor.phase_finish("building")
        return network.model.SerializeToString()


class Network:
    num_layers = 0

    def __getattr__(self, name):
        return len(getattr(self.model.graph, name.removeprefix("num_").removesuffix("s")))

    def get_input(self, index):
        return tensor(self.model.graph.input[index])

    def get_output(self, index):
        return tensor(self.model.graph.output[index])


def tensor(value):
    dims = value.type.tensor_type.shape.dim
    shape = [-1 if dim.dim_param else dim.dim_value for dim in dims]
    dtype = {10: "HALF", 1: "FLOAT", 7: "INT64"}[value.type.tensor_type.elem_type]
    return SimpleNamespace(name=value.name, shape=shape, dtype=SimpleNamespace(name=dtype))


class OnnxParser:
    def __init__(self, network, logger):
        self.network = network

    def parse(self, model, path):
        self.network.model = onnx.load_from_string(model)
        return True


class Config:
    hardware_compatibility_level = "none"

    def __init__(self):
        self.flags, self.pools, self.profiles, self.cache = set(), {}, [], None

    def set_flag(self, flag):
        self.flags.add(flag)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def add_optimization_profile(self, profile):
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, known):
        if known == b"junk":
            return None
        return SimpleNamespace(known=known, serialize=lambda: known + b"timed;")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.known.startswith(b"other"):
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, least, typical, most):
        self.shapes[name] = least, typical, most


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, plan):
        assert self.engine_host_code_allowed
        layers = '{"Layers": ["one"]}'
        inspector = SimpleNamespace(get_engine_information=lambda format: layers)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)
