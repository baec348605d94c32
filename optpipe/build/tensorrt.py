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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from optpipe.artifact import Artifact, Stats
from optpipe.build import causal, nvidia
from optpipe.build import plan as plans
from optpipe.build.nvidia import Package
from optpipe.build.validity import malformed
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import GateError, InputError
from optpipe.export.graph import DATA, MODEL, SESSION, read
from optpipe.export.onnx import Onnx, graph_bits
from optpipe.linear import Layers
from optpipe.stage import Limits, Progress, Stage

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
    """Any of 'weight_streaming', 'refit', 'version_compatible', 'ampere_plus' (for this GPU and all
    since sm80). Sparse kernels are not asked for here: they are allowed where weights are 2:4."""
    streaming_mb: int | None = None
    """Most weights that stay on the GPU with flag 'weight_streaming', 10^6 bytes, the rest comes
    from the host at every step; null: as many as TensorRT thinks fit when the plan is loaded."""
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
        if self.streaming_mb is not None and "weight_streaming" not in self.flags:
            raise ValueError("streaming_mb needs flag 'weight_streaming'")
        for name in ("max_batch", "max_prompt", "typical_prompt", "workspace_mb", "streaming_mb"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")

    def plan(self, layers: Layers) -> Layers:
        if (why := nvidia.refuse_layers(layers, self._oldest_gpu())) is not None:
            raise ValueError(why)
        return layers

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        if number_after(earlier, model) is not None:
            raise InputError("TensorRT writes to caches of floats only: leave stage 'cache' out")
        for stage in earlier:
            if isinstance(stage, Onnx):
                self._check_prompt(stage.tokens(model))
                if why := nvidia.refuse_floats(stage.dtype, self._oldest_gpu()):
                    raise InputError(why)

    def inputs(self, model: Checkpoint) -> list[str | None]:
        if self.timing_cache is not None and not Path(self.timing_cache).parent.is_dir():
            raise InputError(f"timing_cache: there is no folder for '{self.timing_cache}'")
        if self.timing_cache is not None and Path(self.timing_cache).is_dir():
            raise InputError(f"timing_cache: '{self.timing_cache}' is a folder, name a file")
        if self.attention != "mask" and (why := causal.refuse(model.decoder)) is not None:
            raise InputError(f"attention '{self.attention}': {why}; use attention=mask")
        package, why = self._package()
        if package is None:
            log.warning("no plan will be built, only its ONNX file checked: %s", why)
            return [why]
        if package.gpu and not package.runs_here:
            log.warning(
                "%s builds no plan that the %s here runs, so that it will not be benchmarked; pip "
                "install 'optpipe[%s]'", package.name, package.gpu, nvidia.EXTRA[nvidia.FULL]
            )  # fmt: skip
        _ = model.stop_tokens  # raises what is wrong with them
        return [package.name, package.version, package.gpu]

    def limits(self, limits: Limits, model: Checkpoint) -> Limits:
        return replace(limits, rows=self.max_batch, rows_key="build.max_batch")

    def output_bits(self, layers: Layers, rest: int, float_bits: int) -> float:
        return graph_bits(layers, rest, 32) + KERNEL_BITS  # the ONNX file is linked, not copied

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        self.follow([], Checkpoint(source.path))
        _link(source.path, out)
        copy_side_files(source.path, out)
        properties = {p.key: p.value for p in read(out).metadata_props}
        capacity = int(properties["capacity"])
        self._check_prompt(capacity)
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
        """What builds, or why nothing does. Raises InputError if something was asked for."""
        try:
            return nvidia.find(self.package, self._refuse), None
        except InputError as error:
            wishes = (self.target, self.flags, self.timing_cache, self.attention != "mask")
            if self.package != "auto" or any(wishes):
                raise
            return None, str(error)

    def _refuse(self, package: Package) -> str | None:
        """Why this package cannot do here what is asked for, if it cannot."""
        refused = [package.refuse_target(self.target), *map(package.refuse_flag, self.flags)]
        refused.append(package.refuse_attention(self.attention))
        if self.timing_cache is not None and package.name != nvidia.FULL:
            refused.append(f"{package.name} times nothing while it builds: no timing_cache")
        return next((why for why in refused if why), None)

    def _oldest_gpu(self) -> str | None:
        """What the plan must run on, if that is known before it is built."""
        if "ampere_plus" in self.flags:
            return "sm80"
        if self.target not in (None, "current"):
            return self.target
        package, _ = self._package()
        if package is None or (self.target is None and package.name != nvidia.FULL):
            return None
        return package.gpu

    def _built_for(self, package: Package, out: Path) -> str | None:
        """Which GPUs the plan runs on, in words."""
        if package.name == nvidia.FULL:
            return nvidia.AMPERE_PLUS if "ampere_plus" in self.flags else package.gpu
        return self._oldest_gpu() or nvidia.portable(read(out).graph)

    def _check_prompt(self, capacity: int) -> None:
        if self.max_prompt is not None and self.max_prompt > capacity:
            raise InputError(f"max_prompt {self.max_prompt} exceeds export.capacity {capacity}")

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
        if package.gpu is not None:
            layers = plans.inspect(package.module, (out / PLAN).read_bytes())
            if layers is not None:
                (out / INSPECTED).write_text(layers)
        return {
            "plan": PLAN,
            "not_built": None,
            "package": package.name,
            "version": package.version,
            "gpu": package.gpu,
            "target": self._built_for(package, out),
            "attention": self.attention,
            "flags": [*self.flags, *(["sparse_weights"] if built.sparse24 else [])],
            "sparse24": built.sparse24,
            "streaming_mb": self.streaming_mb,
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
    if malformed(import_module(nvidia.RTX), folder / PLAN):
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
