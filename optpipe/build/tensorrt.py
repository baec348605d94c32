"""A TensorRT plan, and the ONNX file it was built from, which any runtime can check it by.

The plan is what TensorRT or TensorRT for RTX makes of the canonical graph. Where neither can build
here, the folder holds the graph and says why there is no plan; no run fails for that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from optpipe.artifact import Artifact, Stats
from optpipe.build import causal, nvidia
from optpipe.build import plan as plans
from optpipe.build.nvidia import Package
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import GateError, InputError
from optpipe.export.graph import DATA, MODEL, SESSION, read
from optpipe.export.onnx import graph_bits
from optpipe.linear import Layers
from optpipe.stage import Progress, Stage

PLAN, SIDECAR, INSPECTED = "engine.plan", "engine.json", "layers.json"
TYPICAL_PROMPT = 128
KERNEL_BITS = 8 * 64_000_000
"""Room for compiled kernels in a plan."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TensorRT(Stage):
    """Build a plan with two profiles, prefill and decode, over one set of weights."""

    accepts: ClassVar[frozenset[str]] = frozenset({"onnx"})
    produces: ClassVar[str] = "tensorrt"

    package: str = "auto"
    """'tensorrt', 'tensorrt_rtx', or 'auto': the first of these that can build here."""
    target: str | None = None
    """GPU to build for: 'current', or a compute capability such as 'sm89'; null: what the package
    does by default, the GPU of this machine or, in TensorRT for RTX, sm80 and later."""
    max_batch: int = 16
    """Most rows of a batch."""
    max_prompt: int | None = None
    """Most tokens of a row in one call of prefill, longer prompts come in parts; null: as many as
    the KV cache holds."""
    typical_prompt: int = TYPICAL_PROMPT
    """Tokens that prefill is tuned for, at most ``max_prompt``."""
    attention: str = "mask"
    """'mask': that of the graph; 'lower_right': TensorRT's own causal kind by the lengths of the
    keys, in layers that look at all tokens. The ONNX file, and what is verified, is the same."""
    flags: list[str] = field(default_factory=list)
    """Any of 'weight_streaming', 'refit', 'version_compatible'. Sparse kernels are not asked for
    here: they are allowed where the weights are 2:4."""
    workspace_mb: int | None = None
    """Most scratch memory of a kernel, 10^6 bytes; null: all of the GPU."""
    timing_cache: str | None = None
    """File of kernel timings to read and extend, so that the next build is faster."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("package", self.package, ("auto", *nvidia.PACKAGES)),
            ("target", self.target, (None, *nvidia.TARGETS)),
            ("attention", self.attention, causal.KINDS),
            *(("flags", flag, nvidia.FLAGS) for flag in self.flags),
        ):
            if value not in allowed:
                names = ", ".join(str(a or "null") for a in allowed)
                raise ValueError(f"{name} must be one of {names}, got '{value}'")
        for name in ("max_batch", "max_prompt", "typical_prompt", "workspace_mb"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")

    def plan(self, layers: Layers) -> Layers:
        if (why := nvidia.refuse_layers(layers, self.target)) is not None:
            raise ValueError(why)
        return layers

    def inputs(self, model: Checkpoint) -> list[str | None]:
        context = model.decoder.context
        if self.max_prompt is not None and self.max_prompt > context:
            raise InputError(f"max_prompt {self.max_prompt} exceeds the context of {context}")
        if self.attention != "mask" and (why := causal.refuse(model.decoder)) is not None:
            raise InputError(f"attention '{self.attention}': {why}; use attention=mask")
        package, why = self._package()
        if package is None:
            log.warning("no plan will be built, only its ONNX file checked: %s", why)
            return [why]
        self._check(package)
        _ = model.stop_tokens  # raises what is wrong with them
        return [package.name, package.version, package.gpu]

    def output_bits(self, layers: Layers, rest: int, float_bits: int) -> float:
        return graph_bits(layers, rest, 32) + KERNEL_BITS  # the ONNX file is linked, not copied

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        if Checkpoint(source.path).cache is not None:
            raise InputError("TensorRT writes to caches of floats only: leave stage 'cache' out")
        _link(source.path, out)
        copy_side_files(source.path, out)
        properties = {p.key: p.value for p in read(out).metadata_props}
        capacity = int(properties["capacity"])
        if self.max_prompt is not None and self.max_prompt > capacity:
            raise InputError(f"max_prompt {self.max_prompt} exceeds export.capacity {capacity}")
        package, why = self._package()
        about: dict[str, Any] = {"plan": None, "not_built": why, "capacity": capacity}
        if package is not None:
            about |= self._build(package, out, capacity, progress)
        about["stop_tokens"] = Checkpoint(source.path).stop_tokens
        about["onnx_key"] = source.key
        about["sha256"] = {f.name: _sha256(f) for f in sorted(out.iterdir())}
        (out / SIDECAR).write_text(json.dumps(about, indent=1) + "\n")
        stats = {name: value for name, value in source.stats.items() if name != "verified"}
        return {**stats, "package": package and package.name, "not_built": why}

    def _package(self) -> tuple[Package | None, str | None]:
        """What builds, or why nothing does. Raises InputError if that was asked for by name."""
        try:
            return nvidia.find(self.package), None
        except InputError as error:
            if self.package != "auto" or self.target or self.flags:
                raise
            return None, str(error)

    def _check(self, package: Package) -> None:
        """Raise InputError for what this package cannot do here."""
        refused = [package.refuse_target(self.target), *map(package.refuse_flag, self.flags)]
        refused.append(package.refuse_attention(self.attention))
        if self.timing_cache is not None and package.name != nvidia.FULL:
            refused.append(f"{package.name} times nothing while it builds: no timing_cache")
        if self.timing_cache is not None and not Path(self.timing_cache).parent.is_dir():
            refused.append(f"timing_cache: there is no folder for '{self.timing_cache}'")
        if why := next((why for why in refused if why), None):
            raise InputError(why)

    def _build(
        self, package: Package, out: Path, capacity: int, progress: Progress
    ) -> dict[str, Any]:
        request = plans.Request(
            package=package,
            target=self.target,
            flags=tuple(self.flags),
            profiles=plans.ranges(self.max_batch, self.max_prompt or capacity, self.typical_prompt),
            attention=self.attention,
            workspace_bytes=self.workspace_mb and self.workspace_mb * 1_000_000,
            timing_cache=Path(self.timing_cache) if self.timing_cache else None,
        )
        built = plans.build(request, out, out / PLAN, progress)
        plan = (out / PLAN).read_bytes()
        if package.gpu is not None and (layers := plans.inspect(package.module, plan)) is not None:
            (out / INSPECTED).write_text(layers)
        portable = nvidia.portable(read(out).graph)
        default = package.gpu if package.name == nvidia.FULL else portable
        return {
            "plan": PLAN,
            "not_built": None,
            "package": package.name,
            "version": package.version,
            "gpu": package.gpu,
            "target": package.gpu if self.target == "current" else self.target or default,
            "attention": self.attention,
            "flags": [*self.flags, *(["sparse_weights"] if plans.sparse24(out) else [])],
            "max_batch": self.max_batch,
            "max_prompt": self.max_prompt or capacity,
            "profiles": built.profiles,
            "tensors": built.tensors,
            "warnings": built.warnings,
        }


def about(folder: Path) -> dict[str, Any]:
    """What the folder of an engine says about itself."""
    found: dict[str, Any] = json.loads((folder / SIDECAR).read_text())
    return found


def check_files(folder: Path) -> None:
    """Raise GateError unless every file is what it was when the engine was made, and a plan one.

    Only TensorRT for RTX tells a plan from other bytes without loading it.
    """
    told = about(folder)
    for name, expected in told["sha256"].items():
        if not (folder / name).is_file() or _sha256(folder / name) != expected:
            raise GateError(f"'{folder / name}' is not the file that the engine was made with")
    if told["plan"] is None or told["package"] != nvidia.RTX:
        return
    if plans.malformed(import_module(nvidia.RTX), (folder / PLAN).read_bytes()):
        raise GateError(f"'{folder / PLAN}' is not a plan that {nvidia.RTX} recognizes")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _link(source: Path, out: Path) -> None:
    """The same ONNX file under a second name, or where the file system has no links, a copy."""
    for name in (MODEL, DATA, SESSION):
        if not (source / name).is_file():  # few graphs need settings
            continue
        try:
            os.link(source / name, out / name)
        except OSError:
            shutil.copyfile(source / name, out / name)
