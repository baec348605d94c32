"""A deployable ONNX Runtime engine: the lowered graph, a tokenizer, settings and a loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnxruntime

from optpipe.artifact import Artifact, Stats
from optpipe.build import generate
from optpipe.build.lower import Lowering
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import InputError
from optpipe.export.graph import read
from optpipe.export.onnx import Onnx, graph_bits, rotated_dims
from optpipe.linear import Layers
from optpipe.stage import Progress, Stage
from optpipe.text import has_tokenizer, save_fast

SETTINGS, LOADER = "engine.json", "generate.py"


@dataclass(frozen=True, kw_only=True)
class Ort(Stage):
    """Lower a canonical graph for ONNX Runtime and put everything beside it that runs it."""

    accepts: ClassVar[frozenset[str]] = frozenset({"onnx"})
    produces: ClassVar[str] = "ort"

    accuracy_level: int = 4
    """What MatMulNBits may round activations to: 4 int8, 1 float32. Int8 is the fast one; with
    8-bit weights anything else was 30 to 50 times slower on CPUs."""

    def __post_init__(self) -> None:
        if self.accuracy_level not in (1, 4):
            raise ValueError(
                f"accuracy_level must be 1 (float32) or 4 (int8), got {self.accuracy_level}"
            )

    def plan(self, layers: Layers) -> Layers:
        for name, form in layers.items():
            if form.inputs is not None and form.inputs.endswith("_block"):
                raise ValueError(
                    f"layer '{name}' rounds its inputs by '{form.inputs}', for which ONNX Runtime "
                    "has no kernel on a CPU; set quant.activations=none, or end in TensorRT"
                )
        return layers

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        _check_dtype(source.stats.get("dtype"))
        progress("lowering", 0, 1)
        Lowering(source.path, out, self.accuracy_level).run()
        copy_side_files(source.path, out)
        if has_tokenizer(source.path):  # in whatever form; the loader reads this one
            save_fast(source.path, out / "tokenizer.json")
        shutil.copy2(str(generate.__file__), out / LOADER)
        settings = {
            "stop_tokens": Checkpoint(source.path).stop_tokens,
            "accuracy_level": self.accuracy_level,
            "onnxruntime": onnxruntime.__version__,
            "source_key": source.key,
        }
        (out / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
        progress("lowering", 1, 1)
        return {"accuracy_level": self.accuracy_level, "int8_activations": self._int8(out)}

    def inputs(self, model: Checkpoint) -> str:
        decoder = model.decoder
        rotated = rotated_dims(model)
        if decoder.head_dim % 8 or rotated % 16:
            raise InputError(
                "GroupQueryAttention takes heads of a multiple of 8 dimensions, of which a multiple"
                f" of 16 rotate; this model has {decoder.head_dim}, {rotated} rotate; end with "
                "stages=[...,export]"
            )
        _ = model.stop_tokens  # raises what is wrong with them
        return str(onnxruntime.__version__)

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        for stage in earlier:
            if isinstance(stage, Onnx):
                _check_dtype(stage.dtype)

    def output_bits(self, layers: Layers, rest: int, float_bits: int) -> float:
        return graph_bits(layers, rest, 32)  # if the graph is in float16, less

    def _int8(self, out: Path) -> bool:
        """Whether any product of the engine rounds its activations."""
        products = (node for node in read(out).graph.node if node.op_type == "MatMulNBits")
        return self.accuracy_level == 4 and any(products)


def _check_dtype(dtype: str | None) -> None:
    if dtype == "bfloat16":
        raise InputError("ONNX Runtime multiplies no bfloat16 on a CPU; set export.dtype")
