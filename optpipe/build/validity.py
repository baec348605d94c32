"""Whether bytes are a plan, and whether a GPU can run it, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optpipe.build.nvidia import AMPERE_PLUS, FULL, capability
from optpipe.build.plan import listener


def malformed(trt: Any, plan_file: Path) -> bool:
    """Whether these bytes are no plan to TensorRT for RTX, which needs no GPU to tell."""
    _, diagnostics = _validity(trt, plan_file)
    return bool(diagnostics & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE))


def unfit(trt: Any, plan_file: Path, told: dict[str, Any], gpu: str) -> str | None:
    """Why this GPU cannot run a plan, of which ``told`` tells, if it cannot."""
    if trt.__name__ != FULL:
        return _invalid(trt, plan_file, gpu)
    built = told["target"]
    if gpu == built or (built == AMPERE_PLUS and capability(gpu) >= 80):
        return None
    return f"the plan is for {built}, the GPU here is {gpu}"


def _invalid(trt: Any, plan_file: Path, gpu: str) -> str | None:
    """Why TensorRT for RTX cannot run the plan on this GPU, if it cannot."""
    validity, diagnostics = _validity(trt, plan_file)
    if validity != trt.EngineValidity.INVALID:
        return None
    reasons = [
        reason.name.lower().replace("_", " ")
        for reason in trt.EngineInvalidityDiagnostics.__members__.values()
        if diagnostics & int(reason)
    ]
    return f"TensorRT-RTX says that {gpu} cannot run the plan: {', '.join(reasons) or 'no reason'}"


def _validity(trt: Any, plan_file: Path) -> Any:
    """(whether it can run here, what speaks against it)"""
    runtime = trt.Runtime(listener(trt))
    with plan_file.open("rb") as file:  # the header tells, the rest may be gigabytes
        return runtime.get_engine_validity(file.read(runtime.engine_header_size))
