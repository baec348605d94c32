"""A preset of NVIDIA's Model-Optimizer for every layer (AWQ arXiv:2306.00978, SmoothQuant
arXiv:2211.10438, FP8 arXiv:2209.05433); ``presets`` has what they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.family import HEAD
from optpipe.linear import PER_CHANNEL, Form, Layers
from optpipe.quant.grid import GROUP_SIZES, stored
from optpipe.quant.presets import PRESETS, Rounding, check_preset
from optpipe.stage import Progress, Stage

REFUSED = {
    "mxfp4": "no form here holds its codes of 4 bits in blocks of 32",
    "mxfp8": "it calibrates nothing; use quant=mxfp8",
    "auto_quantize": "use quant=auto_quantize",
}


@dataclass(frozen=True, kw_only=True)
class Modelopt(Stage):
    """Every layer of the blocks; the head stays as it is. One block is in memory at a time."""

    rewrites: ClassVar[bool] = True

    preset: str = "fp8"
    """'int4_rtn', 'int4_awq' (weights), 'w4a8', 'int8_smoothquant', 'fp8', 'nvfp4', 'nvfp4_awq'
    (weights and inputs). 'nvfp4_awq' needs CUDA."""
    group_size: int = 128
    """Of int4 and w4a8: inputs that share a scale, 16, 32, 64, 128 or 256."""
    calib: Calib = field(default_factory=Calib)
    """Also of int4_rtn, which makes nothing of it."""

    def __post_init__(self) -> None:
        if self.preset in REFUSED:
            raise ValueError(f"preset '{self.preset}': {REFUSED[self.preset]}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {[*PRESETS]}, got '{self.preset}'")
        if self.group_size not in GROUP_SIZES or self.group_size == PER_CHANNEL:
            raise ValueError(f"group_size must be one of {GROUP_SIZES[1:]}, got {self.group_size}")

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return {n: form if n == HEAD else self.form(n, form) for n, form in layers.items()}

    def form(self, name: str, form: Form) -> Form:
        return PRESETS[self.preset].form(name, form, self.group_size)

    def inputs(self, model: Checkpoint) -> str:
        check_preset(model, self.preset)
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.inputs(checkpoint)
        planned = self.plan(model.layers(checkpoint))
        presets = {name: self.preset for name in planned if name != HEAD}
        Rounding(presets, self.group_size, self.calib.ids(checkpoint)).write(
            checkpoint, out, planned, progress
        )
        return {"preset": self.preset, **stored(planned), **self.calib.facts()}
