"""The config of a smaller model: where each family keeps its sizes, and which may change."""

from __future__ import annotations

import copy
import math
from typing import Any

from optpipe.family import Decoder, describe
from optpipe.model import shapes_of

ATTENTION, MLP = "attention", "mlp"
BIASED = {
    ATTENTION: {
        "llama": "attention_bias",
        "qwen3": "attention_bias",
        "gemma2": "attention_bias",
        "gemma3_text": "attention_bias",
        "gpt2": None,
    },
    MLP: {"llama": "mlp_bias", "gpt2": None},
}
"""What gives the output projection of a part a bias: a key of the config, None if it has one
anyway. In the families that are missing the architecture has no place for it."""


DIVIDING = ("llama", "gemma2", "gemma3_text")
"""Families whose config must have a hidden size that is a multiple of its heads; transformers
neither writes nor reads another."""


def fewest_groups(decoder: Decoder, least: int) -> int:
    """The fewest key-value heads, no less than these, that a config of the family may have."""
    if decoder.family not in DIVIDING:
        return least
    shared = decoder.heads // decoder.kv_heads
    fitting = (n for n in range(least, decoder.kv_heads) if decoder.hidden % (shared * n) == 0)
    return next(fitting, decoder.kv_heads)


def narrowed(config: Any, channels: int, groups: int, biased: bool) -> Any:
    """A copy with this many FFN channels and key-value heads, query heads in proportion.

    ``biased``: what shrinks gets a bias on its output. Raises ValueError where the family cannot.
    """
    decoder, smaller = describe(config), copy.deepcopy(config)
    if groups != decoder.kv_heads:
        if decoder.family == "gpt2":
            raise ValueError(
                "GPT-2 fixes heads x head size to the hidden size, so no head can go; set heads=0"
            )
        smaller.head_dim = decoder.head_dim  # else it would be derived from the number of heads
        smaller.num_attention_heads = decoder.heads // decoder.kv_heads * groups
        smaller.num_key_value_heads = groups
        _allow_bias(smaller, ATTENTION, biased)
    if channels != decoder.intermediate:
        key = "n_inner" if decoder.family == "gpt2" else "intermediate_size"
        setattr(smaller, key, channels)
        _allow_bias(smaller, MLP, biased)
    return smaller


def _allow_bias(config: Any, part: str, biased: bool) -> None:
    family = config.model_type
    if not biased:
        return
    if family not in BIASED[part]:
        raise ValueError(
            f"family '{family}' has no bias on the output of its {part}, so compensation=bias is "
            "impossible; use compensation=weights"
        )
    if (key := BIASED[part][family]) is not None:
        setattr(config, key, True)


def shortened(config: Any, kept: list[int]) -> Any:
    """A copy that has only the decoder blocks ``kept``."""
    smaller = copy.deepcopy(config)
    smaller.num_hidden_layers = len(kept)
    before = source_blocks(config)
    smaller.source_blocks = [before[index] for index in kept]
    if (kinds := getattr(config, "layer_types", None)) is not None:
        smaller.layer_types = [kinds[index] for index in kept]
    return smaller


def source_blocks(config: Any) -> list[int]:
    """For each block its number in the model that the run started from."""
    return list(getattr(config, "source_blocks", range(config.num_hidden_layers)))


def parameters(config: Any) -> int:
    """Elements of all weights of a dense model with this config, a tied head counted once."""
    return sum(math.prod(shape) for shape in shapes_of(config).values())
