"""A KV cache in 8 bits: one scale for the keys and one for the values of every layer.

They are found beforehand and stored beside the model. In torch, attention rounds all keys and
values that it sees, which is what a runtime computes that rounds each once, when it enters the
cache: rounding what is rounded changes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from optpipe.errors import InputError
from optpipe.linear import round_inputs

if TYPE_CHECKING:
    from optpipe.family import Block, Decoder

FILE = "kv_cache.json"


@dataclass(frozen=True, kw_only=True)
class CacheForm:
    """How keys and values are stored: scale * number."""

    number: str
    """'int8' or 'fp8' (e4m3)."""
    key: list[float]
    """Scales of the keys, after their rotation, one for each layer; exact in float16."""
    value: list[float]

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)) + "\n")


def load(folder: Path) -> CacheForm | None:
    """The form of the cache of a model or a graph; None if it is not quantized."""
    file = folder / FILE
    return CacheForm(**json.loads(file.read_text())) if file.is_file() else None


def check_unrounded(path: Path) -> None:
    """Raises InputError if the cache is rounded with scales that are those of the values now."""
    if load(path) is not None:
        raise InputError(
            f"the KV cache of '{path}' is rounded with scales of its values as they are; change "
            "values before the cache stage"
        )


def attention(lm: PreTrainedModel, block: Block) -> nn.Module:
    """The module of a block that attends."""
    return lm.get_submodule(block.qkv[0].rpartition(".")[0])


def intercept(
    lm: PreTrainedModel, decoder: Decoder, change: Callable[[int, str, Tensor], Tensor]
) -> None:
    """Make attention see ``change(layer, 'key' or 'value', tensor)`` instead of both.

    Tensors are (B, KV heads, tokens, D); they hold all tokens so far.
    """
    for index, block in enumerate(decoder.blocks):

        def both(key: Tensor, value: Tensor, layer: int = index) -> tuple[Tensor, Tensor]:
            return change(layer, "key", key), change(layer, "value", value)

        attention(lm, block).change_cache = both  # type: ignore[assignment]
    # torch's fused attention knows no soft cap
    lm.set_attn_implementation("changed_eager" if decoder.attn_softcap else "changed_sdpa")


def rounded(lm: PreTrainedModel, decoder: Decoder, form: CacheForm) -> None:
    """Make a model round its keys and values."""
    scales = {"key": form.key, "value": form.value}

    def change(layer: int, part: str, x: Tensor) -> Tensor:
        return round_inputs(x, f"{form.number}_tensor", torch.tensor(scales[part][layer]))

    intercept(lm, decoder, change)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    key, value = module.change_cache(key, value)  # type: ignore[operator]
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> Any:
    """Every family has its own in the file of its model."""
    key, value = module.change_cache(key, value)  # type: ignore[operator]
    forward = sys.modules[type(module).__module__].eager_attention_forward
    return forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("changed_sdpa", _sdpa)
AttentionInterface.register("changed_eager", _eager)
AttentionMaskInterface.register("changed_sdpa", sdpa_mask)
AttentionMaskInterface.register("changed_eager", eager_mask)
