"""TensorRT and TensorRT for RTX: which of them is here, and what it can build on this machine.

Both have the same builder and parser. TensorRT times kernels on the GPU it builds for. TensorRT for
RTX compiles kernels where the plan is loaded, so that it builds without a GPU, for the compute
capabilities that it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from onnx import GraphProto, TensorProto

from optpipe.errors import InputError, one_line
from optpipe.linear import Form, Layers

FULL, RTX = "tensorrt", "tensorrt_rtx"
PACKAGES = (FULL, RTX)
OLDEST = {FULL: (10, 15), RTX: (1, 7)}
"""The first version whose parser reads TensorScatter, which writes the KV cache."""
LOWER_RIGHT = (11, 0)
"""The first TensorRT whose attention has a causal kind and lengths of keys."""
EXTRA = {FULL: "tensorrt", RTX: "tensorrt-rtx"}
TARGETS = ("current", "sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121")
FIRST = {"fp8": 89, "mxfp8": 89, "nvfp4": 100}
"""The first compute capability that a plan with weights in these numbers is built for."""
BFLOAT16 = 80
FLAGS = ("weight_streaming", "refit", "version_compatible", "ampere_plus")
PORTABLE = "sm80, sm86, sm89, sm120 and later"
PORTABLE_FP8 = "sm89, sm120 and later"
PORTABLE_FP4 = "sm120 and later"
"""What TensorRT for RTX builds for unless it is told otherwise, by its documentation."""
NEWEST_RTX = 121
"""Plans of TensorRT for RTX are for all that is newer, too."""
AMPERE_PLUS = "sm80 and later"
"""What TensorRT builds for with that flag."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """An installed package that can build here."""

    name: str
    version: str
    gpu: str | None
    """Compute capability of the GPU of this machine, such as 'sm90'; None: there is none."""

    @cached_property
    def module(self) -> Any:
        return import_module(self.name)

    @property
    def targets(self) -> tuple[str, ...]:
        """What it can build for, besides 'current' where there is a GPU."""
        if self.name == FULL:  # it times kernels, so it builds for what it runs on
            return (self.gpu,) if self.gpu else ()
        known = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in known if name.startswith("SM"))

    @property
    def runs_here(self) -> bool:
        """Whether the GPU of this machine runs what it builds; TensorRT for RTX knows no sm90."""
        if self.gpu is None:
            return False
        return self.name == FULL or self.gpu in self.targets or capability(self.gpu) > NEWEST_RTX

    def refuse_target(self, target: str | None) -> str | None:
        """Why it cannot build for ``target``, if it cannot."""
        if target is None or target in self.targets:
            return None
        if target == "current":
            return None if self.gpu else "target 'current' needs an NVIDIA GPU, and there is none"
        known = ", ".join(self.targets)
        other = "" if self.name == FULL else f"; {FULL} builds for the {target} it runs on"
        return f"{self.name} {self.version} cannot build for {target} here, only for {known}{other}"

    def refuse_attention(self, kind: str) -> str | None:
        """Why it cannot attend so, if it cannot."""
        if kind == "mask" or self.name != FULL or _release(self.version) >= LOWER_RIGHT:
            return None
        oldest = ".".join(map(str, LOWER_RIGHT))
        return f"{self.name} {self.version} has no attention '{kind}', {oldest} or newer has"

    def refuse_flag(self, flag: str) -> str | None:
        """Why it cannot build with ``flag``, if it cannot."""
        if self.name == FULL:
            return None
        if flag == "version_compatible":
            return f"{self.name} has no lean runtime, which flag 'version_compatible' asks for"
        if flag == "ampere_plus":
            return f"{self.name} builds for {PORTABLE} anyway: leave flag 'ampere_plus' out"
        if flag == "refit" and self.gpu is None:
            return f"{self.name} asks for a GPU to build with flag 'refit', and there is none"
        return None


def find(wanted: str, refuse: Callable[[Package], str | None] = lambda _: None) -> Package:
    """The package of this name; for 'auto' the first of PACKAGES that can build here.

    ``refuse`` says why a package cannot build what is wanted, if it cannot. Raises InputError with
    what is the matter with each, and what to install where none is.
    """
    gpu, usable = gpu_target(), False
    reasons: list[str] = []
    for name in PACKAGES if wanted == "auto" else (wanted,):
        found = _look(name, gpu)
        if isinstance(found, str):
            reasons.append(found)
        elif (why := refuse(found)) is not None:
            reasons.append(why)
            usable = True
        else:
            return found
    text = "; ".join(reasons)
    if not usable:
        advice = " or ".join(f"'optpipe[{EXTRA[name]}]'" for name in PACKAGES[::-1])
        text += f"; pip install {advice} (the first builds without a GPU)"
        text += ", or end with stages=[...,export]"
    raise InputError(text)


def gpu_target() -> str | None:
    """The compute capability of the GPU of this machine, such as 'sm90'; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def capability(target: str) -> int:
    """89 of 'sm89'."""
    return int(target.removeprefix("sm"))


def _look(name: str, gpu: str | None) -> Package | str:
    """The package, or why it cannot build here."""
    if find_spec(name) is None:
        return f"package '{name}' is not installed"
    try:
        version = str(import_module(name).__version__)
    except (ImportError, OSError) as error:  # its libraries are missing or of another kind
        return f"package '{name}' cannot be imported: {one_line(error)}"
    if _release(version) < OLDEST[name]:
        oldest = ".".join(map(str, OLDEST[name]))
        return f"{name} {version} cannot read TensorScatter, {oldest} or newer can"
    if name == FULL and gpu is None:
        return f"{name} {version} builds on a machine with an NVIDIA GPU only"
    return Package(name=name, version=version, gpu=gpu)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def portable(graph: GraphProto) -> str:
    """Which GPUs a plan of tensorrt_rtx for no target in particular runs on."""
    types = {t.data_type for t in graph.initializer}
    if TensorProto.FLOAT4E2M1 in types:
        return PORTABLE_FP4
    return PORTABLE_FP8 if TensorProto.FLOAT8E4M3FN in types else PORTABLE


def refuse_floats(dtype: str, target: str | None) -> str | None:
    """Why a GPU computes nothing in these floats, if it does not."""
    if target and dtype == "bfloat16" and capability(target) < BFLOAT16:
        return f"bfloat16 begins with sm{BFLOAT16}, not {target}; use export.dtype=float16"
    return None


def refuse_layers(layers: Layers, target: str | None) -> str | None:
    """Why TensorRT cannot multiply with one of these layers, if it cannot."""
    for name, form in layers.items():
        if form.bits is not None and (why := _refuse(form, target)) is not None:
            return f"layer '{name}' {why}"
    return None


def _refuse(form: Form, target: str | None) -> str | None:
    if not form.symmetric:
        return "has zero points, TensorRT takes symmetric=true only"
    if form.inputs is not None and form.inputs.endswith("_token"):
        return f"rounds its inputs by '{form.inputs}', TensorRT by one scale"
    if form.inputs == "fp8_tensor" and form.number == "int":
        return (
            f"has int{form.bits} weights and fp8 inputs, of which TensorRT makes no product; "
            "export=trtllm does, and so does build=ort"
        )
    if target == "sm75" and form.number == "int" and (form.bits or 8) < 8:
        return f"has weights of {form.bits} bits, which sm75 cannot unpack"
    first = FIRST.get(form.number, 0)
    if target and capability(target) < first:
        return f"has {form.number} weights, which begin with sm{first}, not {target}"
    return None
