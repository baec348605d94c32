"""A canonical ONNX file to a TensorRT plan: strongly typed, one profile a phase, weights shared.

All types come from the graph, as TensorRT 11 has no other way. Each symbolic size of the graph (B
rows, S tokens, L positions whose logits are wanted) gets a range in each profile: prefill takes
many tokens, decode one.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import GraphProto

from optpipe import libc
from optpipe.build import causal
from optpipe.build.nvidia import FULL, Package
from optpipe.build.sparse24 import sparse24
from optpipe.export.graph import DATA, MODEL, read
from optpipe.stage import Progress

log = logging.getLogger(__name__)
Range = tuple[int, int, int]
"""Least, typical and most."""
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Input -> least, typical and most shape."""
LOGITS = 256
"""Most positions of a call whose logits are wanted; longer scores come in parts."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to build, checked against what the package can do."""

    package: Package
    target: str | None
    flags: tuple[str, ...]
    profiles: dict[str, dict[str, Range]]
    """Name -> symbolic size -> range."""
    attention: str
    """One of causal.KINDS."""
    workspace_bytes: int | None
    timing_cache: Path | None


@dataclass(frozen=True, kw_only=True)
class Built:
    """What is known of a plan that was built."""

    tensors: list[dict[str, Any]]
    """Name, mode, dtype and shape of every input and output; sizes that vary by their symbols."""
    profiles: dict[str, Shapes]
    sparse24: dict[str, int]
    """Weights for which sparse kernels were allowed, by type."""
    warnings: list[str]


def ranges(max_batch: int, max_prompt: int, typical_prompt: int) -> dict[str, dict[str, Range]]:
    """The two profiles, by symbolic size; rows and decoding are tuned for one row."""
    rows, one = (1, 1, max_batch), (1, 1, 1)
    prompt = (1, min(typical_prompt, max_prompt), max_prompt)
    return {
        "prefill": {"B": rows, "S": prompt, "L": (1, 1, min(LOGITS, max_prompt))},
        "decode": {"B": rows, "S": one, "L": one},
    }


def build(request: Request, folder: Path, out: Path, progress: Progress) -> Built:
    """Build the plan of the graph in ``folder`` into the file ``out``. Raises RuntimeError."""
    trt = request.package.module
    logger, graph = listener(trt), read(folder).graph
    libc.return_freed()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    progress("parsing", 0, 1)
    parse(parser, folder, request.attention)
    causal.settle(trt, network, parser)
    config = builder.create_builder_config()
    sparse = sparse24(folder)
    _configure(trt, config, request, bool(sparse))
    kept = _attach_timings(config, request.timing_cache)
    profiles = {n: shapes(graph, sizes) for n, sizes in request.profiles.items()}
    for name, inputs in profiles.items():
        if not _add_profile(builder, config, inputs):
            raise RuntimeError(f"TensorRT refuses profile '{name}': {logger.said()}")

    def shown(phase: str, done: int, total: int) -> None:
        if done == total - 1:  # what was read is in the engine by now, which is written next
            libc.page_out(folder / DATA)
        progress(phase, done, total)

    monitor = reporter(trt, shown)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise RuntimeError(f"TensorRT built nothing: {logger.said()}")
    out.write_bytes(plan)
    if kept is not None:
        timings = config.get_timing_cache()
        kept.write_bytes(timings.serialize())
    tensors = table(network, graph)
    return Built(tensors=tensors, profiles=profiles, sparse24=sparse, warnings=logger.warnings)


def parse(parser: Any, folder: Path, attention: str) -> None:
    """Read the graph in ``folder``, weights from where they lie. Raises RuntimeError."""
    model = read(folder)
    if attention == "lower_right":
        causal.unmask(model)
    if not parser.parse(model.SerializeToString(), str(folder / MODEL)):
        raise RuntimeError(f"TensorRT cannot read the graph: {_parser_errors(parser)}")


def inspect(trt: Any, plan: bytes) -> str | None:
    """What the layers of a plan became, JSON; None if this GPU cannot load it."""
    runtime = trt.Runtime(listener(trt))
    runtime.engine_host_code_allowed = True  # a version compatible plan brings some, and it is ours
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def shapes(graph: GraphProto, sizes: dict[str, Range]) -> Shapes:
    """The shapes of all inputs that vary, from the ranges of their symbols."""
    found: Shapes = {}
    for value in graph.input:
        dims = _dims(value)
        if any(isinstance(dim, str) for dim in dims):
            least, typical, most = (
                tuple(sizes[dim][k] if isinstance(dim, str) else dim for dim in dims)
                for k in range(3)
            )
            found[value.name] = (least, typical, most)
    return found


def _add_profile(builder: Any, config: Any, inputs: Shapes) -> bool:
    """Whether TensorRT takes it."""
    profile = builder.create_optimization_profile()
    for name, (least, typical, most) in inputs.items():
        profile.set_shape(name, least, typical, most)
    return int(config.add_optimization_profile(profile)) >= 0


def _configure(trt: Any, config: Any, request: Request, sparse: bool) -> None:
    flags = [*request.flags, *(["sparse_weights"] if sparse else [])]
    for flag in flags:
        if flag == "ampere_plus":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        else:
            config.set_flag(getattr(trt.BuilderFlag, flag.upper()))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    if request.target is not None and request.package.name != FULL:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, request.target.upper()), 0)


def _attach_timings(config: Any, file: Path | None) -> Path | None:
    """Give the builder the timings of earlier builds; where to write those of this one, if it may.

    Those of another GPU or TensorRT do not bind this build, and are not written over.
    """
    if file is None:
        return None
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if timings is not None and config.set_timing_cache(timings, False):
        return file
    log.warning(
        "timing_cache: '%s' is of another GPU or another TensorRT; the plan is built without, and "
        "the file stays as it is", file
    )  # fmt: skip
    return None


def table(network: Any, graph: GraphProto) -> list[dict[str, Any]]:
    """Inputs and outputs as TensorRT has them, sizes that vary by the symbols of the graph."""
    symbols = {value.name: _dims(value) for value in (*graph.input, *graph.output)}
    values = [("input", network.get_input(i)) for i in range(network.num_inputs)]
    values += [("output", network.get_output(i)) for i in range(network.num_outputs)]
    return [_entry(mode, tensor, symbols[tensor.name]) for mode, tensor in values]


def _entry(mode: str, network_tensor: Any, symbols: list[str | int]) -> dict[str, Any]:
    shape = [
        symbol if size == -1 else size
        for size, symbol in zip(network_tensor.shape, symbols, strict=True)
    ]
    dtype = network_tensor.dtype.name.lower()
    return {"name": network_tensor.name, "mode": mode, "dtype": dtype, "shape": shape}


def _dims(value: Any) -> list[str | int]:
    return [dim.dim_param or int(dim.dim_value) for dim in value.type.tensor_type.shape.dim]


def _parser_errors(parser: Any) -> str:
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        found.append(f"{error.node_operator()} '{error.node_name()}': {error.desc()}")
    return "; ".join(found)


def listener(trt: Any) -> Any:
    """A logger that keeps warnings, and errors for the message of whoever fails."""

    class Listener(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity <= trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

        def said(self) -> str:
            return "; ".join(self.errors[-3:]) or "it does not say why"

    return Listener()


def reporter(trt: Any, progress: Progress) -> Any:
    """A progress monitor for the phases without a parent; it ends the build on Ctrl-C."""

    class Reporter(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self.steps: dict[str, int] = {}
            self.lock = threading.Lock()  # TensorRT calls from threads of its own

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self.lock:
                if parent is None:
                    self.steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            with self.lock:
                self.steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                with self.lock:
                    if phase in self.steps:
                        progress(phase, step + 1, self.steps[phase])
            except KeyboardInterrupt:  # it must not travel through the C++ in between
                self.interrupted = True
            return not self.interrupted

    return Reporter()
