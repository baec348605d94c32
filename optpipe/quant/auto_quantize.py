"""auto_quantize of NVIDIA's Model-Optimizer: a preset for each layer, or none, within a budget.

What a layer loses with a preset is scored on calibration text: 'gradient' takes the squared change
of its output, weighted with the squared gradient of the loss (a diagonal Fisher matrix), 'kl_div'
the divergence of the logits; then a linear program (as in HAWQ-V3, arXiv:2011.10680), or a
threshold, spends the budget. Layers that read the same inputs get the same preset. What was settled
is then calibrated and rounded as in ``modelopt``, block by block.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from optpipe import model, order
from optpipe.artifact import Artifact, Stats
from optpipe.bounds import Open
from optpipe.calibrate import Calib
from optpipe.checkpoint import Checkpoint
from optpipe.device import fastest
from optpipe.errors import InputError
from optpipe.family import HEAD
from optpipe.linear import PER_CHANNEL, Form, Layers
from optpipe.quant.grid import GROUP_SIZES, stored
from optpipe.quant.presets import PRESETS, Rounding, check_preset, imported
from optpipe.quant.scoring import Scored, check_fits
from optpipe.stage import Progress, Stage

METHODS = ("gradient", "kl_div")
FLOAT_BITS = 16.0


@dataclass(frozen=True, kw_only=True)
class AutoQuantize(Stage):
    """Every layer of the blocks; the head stays as it is.

    On a CPU the search reads weights from files, block by block; before each format modelopt looks
    at all of them once, outside of that order, when their pages may fill what memory there is. On a
    GPU the search holds the whole model. The rounding after it holds one block.
    """

    rewrites: ClassVar[bool] = True

    effective_bits: float = 6.0
    """At most so many bits a weight, as modelopt counts them: those of codes (nvfp4: 4.5), without
    scales; 16 where a layer stays as it is."""
    formats: list[str] = field(default_factory=lambda: ["int4_rtn", "fp8"])
    """Presets of quant=modelopt that a layer may take."""
    method: str = "gradient"
    """'gradient' or 'kl_div': what the loss of a preset is estimated by."""
    score_samples: int = 32
    """Samples of calib that losses are estimated on."""
    group_size: int = 128
    """Of int4 and w4a8: inputs that share a scale, 16, 32, 64, 128 or 256."""
    calib: Calib = field(default_factory=Calib)

    def __post_init__(self) -> None:
        if not self.formats or not set(self.formats) <= set(PRESETS):
            raise ValueError(f"formats must be some of {[*PRESETS]}, got {list(self.formats)}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got '{self.method}'")
        if self.group_size not in GROUP_SIZES or self.group_size == PER_CHANNEL:
            raise ValueError(f"group_size must be one of {GROUP_SIZES[1:]}, got {self.group_size}")
        if self.score_samples < 1:
            raise ValueError(f"score_samples must be at least 1, got {self.score_samples}")
        least = min(PRESETS[name].effective_bits for name in self.formats)
        if not least <= self.effective_bits <= FLOAT_BITS:
            raise ValueError(
                f"effective_bits must be from {least:g}, with all layers in the shortest of "
                f"{list(self.formats)}, to {FLOAT_BITS:g}, got {self.effective_bits:g}"
            )

    def plan(self, layers: Layers) -> Layers:
        order.check("fold", layers)
        return {n: form if n == HEAD else self.form(n, form) for n, form in layers.items()}

    def form(self, name: str, form: Form) -> Form:
        if name.endswith((".left", ".right")):
            raise ValueError(
                f"layer '{name}' is a factor; modelopt does not know which factors read the same "
                "inputs, use quant=modelopt or quant=mixed"
            )
        options = tuple(PRESETS[p].form(name, form, self.group_size) for p in self.formats)
        return Open(**asdict(max(options, key=Form.stored_bits)), options=(form, *options))

    def inputs(self, model: Checkpoint) -> str:
        for name in self.formats:
            check_preset(model, name, runs=True)
        check_fits(model)
        return self.calib.inputs(model)

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        checkpoint = Checkpoint(source.path)
        self.inputs(checkpoint)
        layers, ids_ST = model.layers(checkpoint), self.calib.ids(checkpoint)
        progress(f"auto_quantize by {self.method}", 0, len(checkpoint.decoder.blocks))
        presets, effective_bits = self.search(checkpoint, ids_ST, out)
        planned = {
            name: PRESETS[presets[name]].form(name, form, self.group_size)
            if name in presets
            else form
            for name, form in layers.items()
        }
        Rounding(presets, self.group_size, ids_ST).write(checkpoint, out, planned, progress)
        chosen = {name: presets.get(name, "none") for name in layers if name != HEAD}
        return {
            "effective_bits": effective_bits,
            "layers_of_formats": dict(Counter(chosen.values())),
            "layer_formats": chosen,
            **(stored(planned) if presets else {}),
            **self.calib.facts(),
        }

    def search(
        self, checkpoint: Checkpoint, ids_ST: Tensor, folder: Path
    ) -> tuple[dict[str, str], float]:
        """The preset of every layer that gets one, and the bits a weight that modelopt counts.

        Raises InputError if it finds nothing within the budget.
        """
        scored = Scored(checkpoint, folder)
        batches = [ids_T[None].to(fastest()) for ids_T in ids_ST]
        head = f"*{checkpoint.decoder.head}*"
        with imported() as mtq, contextlib.redirect_stderr(io.StringIO()):  # many progress bars
            from modelopt.torch.quantization.algorithms import QuantRecipe

            configs = [PRESETS[name].settings(mtq, self.group_size) for name in self.formats]
            _, state = mtq.auto_quantize(
                scored.lm,
                constraints={
                    "effective_bits": self.effective_bits,
                    "cost": {"excluded_module_name_patterns": [head]},
                },
                quantization_formats=configs,
                data_loader=batches,
                forward_step=scored.logits,
                forward_backward_step=scored.score,
                disabled_layers=[head],
                num_calib_steps=len(batches),
                num_score_steps=min(self.score_samples, len(batches)),
                method=self.method,
            )
            recipes = [
                QuantRecipe(config, name)
                for config, name in zip(configs, self.formats, strict=True)
            ]
        best = state["best"]
        if not best["is_satisfied"]:
            raise InputError(
                f"modelopt found no formats, of {list(self.formats)}, within "
                f"effective_bits={self.effective_bits:g}"
            )
        return self._presets(state, recipes), float(best["constraints"]["effective_bits"])

    def _presets(self, state: Mapping[str, Any], recipes: list[Any]) -> dict[str, str]:
        """The preset of every layer that gets one, from what the search leaves."""
        found: dict[str, str] = {}
        for key, recipe in state["best"]["recipe"].items():
            if recipe in recipes:
                name = self.formats[recipes.index(recipe)]
                found |= dict.fromkeys(state["candidate_stats"][key]["module_names"], name)
        return found
