"""The KV cache in int8 or fp8 with static scales (as in FlexGen, arXiv:2303.06865, for its sizes;
per-tensor scales from calibration, as vLLM and TensorRT-LLM read them).

Weights stay as they are. The last stage before an export: scales are those of the keys and values
that the model makes once everything else is done to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from optpipe import kvcache, model
from optpipe.artifact import Artifact, Stats
from optpipe.blockwise import rewrite
from optpipe.calibrate import Calib, Squares
from optpipe.checkpoint import Checkpoint
from optpipe.errors import InputError
from optpipe.family import Block
from optpipe.linear import LARGEST
from optpipe.quant.inputs import input_scale
from optpipe.stage import Progress, Stage


@dataclass(frozen=True, kw_only=True)
class KvCache(Stage):
    """Halves what a decode step reads of the cache of a float16 model."""

    last: ClassVar[bool] = True

    number: str = "int8"
    """'int8', which ONNX Runtime has, or 'fp8' (e4m3), which vLLM and TensorRT-LLM have."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if self.number not in LARGEST:
            raise ValueError(f"number must be one of {(*LARGEST,)}, got '{self.number}'")

    def inputs(self, model: Checkpoint) -> str:
        return self.calib.inputs(model)

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        if (number := number_after(earlier, model)) is not None:
            raise InputError(f"the KV cache is quantized already, to {number}")

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.follow([], checkpoint)
        decoder, layers = checkpoint.decoder, model.layers(checkpoint)
        largest = {part: [0.0] * len(decoder.blocks) for part in ("key", "value")}

        def note(layer: int, part: str, x: Tensor) -> Tensor:
            largest[part][layer] = max(largest[part][layer], float(x.abs().max()))
            return x

        def react(lm: PreTrainedModel, block: Block, seen: dict[str, Any]) -> None:
            if block == decoder.blocks[0]:
                kvcache.intercept(lm, decoder, note)

        observation = self.calib.observe(checkpoint, frozenset(), Squares)
        observation = replace(observation, react=react)
        rewrite(source, out, layers, lambda _, layer, __: layer, progress, observation)
        top = LARGEST[self.number]
        scales = {p: [float(input_scale(m, top)) for m in most] for p, most in largest.items()}
        kvcache.CacheForm(number=self.number, **scales).save(out)
        return {"kv_cache": self.number, **observation.facts}


def number_after(earlier: Sequence[Stage], model: Checkpoint) -> str | None:
    """In what these stages leave the KV cache: 'int8', 'fp8', or None for floats."""
    numbers = [stage.number for stage in earlier if isinstance(stage, KvCache)]
    if numbers:
        return numbers[-1]
    return model.cache.number if model.cache else None
