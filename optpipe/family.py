"""Everything that knows one model family from another: how Hugging Face lays each of them out.

To add a family, write one function from its config to a :class:`Decoder` and name it in FAMILIES.
The exporters walk that description; they never test a model type themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from optpipe.errors import InputError

HEAD = "lm_head"
"""Name of the output projection in every family so far."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that read the same inputs, by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """One decoder block: the names of its parts, and what its attention sees."""

    name: str
    qkv: tuple[str, ...]
    """q, k and v projections, or the one that holds all three, in that order."""
    attn_out: str
    mlp_in: tuple[str, ...]
    """gate and up projections, the one that holds both in that order, or up alone."""
    mlp_out: str
    attn_norm: str
    mlp_norm: str
    attn_out_norm: str | None = None
    """Norm of the attention output before it is added to the residual (Gemma)."""
    mlp_out_norm: str | None = None
    qk_norm: tuple[str, str] | None = None
    """Norms of each head of q and of k before the rotation (Qwen3, Gemma-3)."""
    window: int | None = None
    """Tokens a query sees, itself included; None: all."""
    layer_type: str | None = None
    """Which rotary table it uses, where a model has several."""

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.attn_out, *self.mlp_in, self.mlp_out)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A causal LM as the exporters see it. Sizes are in elements."""

    family: str
    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    """Longest sequence the model was made for, tokens."""
    blocks: tuple[Block, ...]
    embed: str
    final_norm: str
    tied: bool
    head: str = HEAD
    """Name of the output projection; its weight is that of ``embed`` if ``tied``."""
    transposed: bool = False
    """Whether the weights of the blocks are stored (in, out) instead of (out, in)."""
    positions: str | None = None
    """Learned position embeddings; None: rotary."""
    rotary: str | None = "model.rotary_emb"
    norm: str = "rms"
    """'rms' or 'layer'."""
    norm_offset: float = 0.0
    """Added to every RMSNorm weight (Gemma: 1)."""
    eps: float = 1e-6
    activation: str = "silu"
    """'silu' or 'gelu_tanh'."""
    gated: bool = True
    attn_scale: float = 1.0
    attn_softcap: float = 0.0
    """Scores become cap * tanh(scores / cap); 0: off (Gemma-2)."""
    logit_softcap: float = 0.0
    embed_scale: float = 1.0


def joined(layers: Iterable[str]) -> list[tuple[str, ...]]:
    """Of these layers, those that read the same inputs: runtimes multiply them as one."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in layers:
        owner, _, own = name.rpartition(".")
        for index, parts in enumerate(FUSED):
            if own in parts:
                found.setdefault((owner, index), []).append(name)
    return [tuple(names) for names in found.values() if len(names) > 1]


def describe(config: Any) -> Decoder:
    """The decoder behind a transformers config. Raises InputError for a family not known here."""
    family = config.model_type
    if family not in FAMILIES:
        raise InputError(
            f"model family '{family}' is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[family](config)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise InputError(f"activation '{name}' is not supported; supported are {[*ACTIVATIONS]}")
    return ACTIVATIONS[name]


def _window(config: Any, index: int) -> int | None:
    kinds = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        return None
    return window if kinds is None or kinds[index] == "sliding_attention" else None


def _llama(config: Any) -> Decoder:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Decoder(
        family=config.model_type,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate=config.intermediate_size,
        context=config.max_position_embeddings,
        blocks=tuple(_llama_block(config, i) for i in range(config.num_hidden_layers)),
        embed="model.embed_tokens",
        final_norm="model.norm",
        tied=bool(config.tie_word_embeddings),
        eps=config.rms_norm_eps,
        activation=_activation(getattr(config, "hidden_activation", None) or config.hidden_act),
        attn_scale=head_dim**-0.5,
    )


def _llama_block(config: Any, index: int) -> Block:
    name = f"model.layers.{index}"
    return Block(
        name=name,
        qkv=tuple(f"{name}.self_attn.{part}_proj" for part in "qkv"),
        attn_out=f"{name}.self_attn.o_proj",
        mlp_in=(f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"),
        mlp_out=f"{name}.mlp.down_proj",
        attn_norm=f"{name}.input_layernorm",
        mlp_norm=f"{name}.post_attention_layernorm",
        window=_window(config, index),
    )


def _with_blocks(decoder: Decoder, change: Callable[[Block], Block]) -> Decoder:
    return replace(decoder, blocks=tuple(map(change, decoder.blocks)))


def _qk_norm(block: Block) -> Block:
    norms = (f"{block.name}.self_attn.q_norm", f"{block.name}.self_attn.k_norm")
    return replace(block, qk_norm=norms)


def _qwen3(config: Any) -> Decoder:
    return _with_blocks(_llama(config), _qk_norm)


def _phi3(config: Any) -> Decoder:
    return _with_blocks(
        _llama(config),
        lambda block: replace(
            block,
            qkv=(f"{block.name}.self_attn.qkv_proj",),
            mlp_in=(f"{block.name}.mlp.gate_up_proj",),
        ),
    )


def _sandwich(block: Block) -> Block:
    return replace(
        block,
        attn_out_norm=f"{block.name}.post_attention_layernorm",
        mlp_norm=f"{block.name}.pre_feedforward_layernorm",
        mlp_out_norm=f"{block.name}.post_feedforward_layernorm",
    )


def _gemma2(config: Any) -> Decoder:
    return replace(
        _with_blocks(_llama(config), _sandwich),
        norm_offset=1.0,
        attn_scale=config.query_pre_attn_scalar**-0.5,
        attn_softcap=config.attn_logit_softcapping or 0.0,
        logit_softcap=config.final_logit_softcapping or 0.0,
        embed_scale=math.sqrt(config.hidden_size),
    )


def _gemma3(config: Any) -> Decoder:
    if getattr(config, "use_bidirectional_attention", False):
        raise InputError("Gemma-3 with use_bidirectional_attention=true is not supported")
    decoder = _with_blocks(_gemma2(config), _qk_norm)
    kinds = config.layer_types
    blocks = tuple(replace(b, layer_type=kinds[i]) for i, b in enumerate(decoder.blocks))
    return replace(decoder, blocks=blocks)


UNSUPPORTED_GPT2 = (
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention",
)  # fmt: skip


def _gpt2(config: Any) -> Decoder:
    for flag in UNSUPPORTED_GPT2:
        if getattr(config, flag, False):
            raise InputError(f"GPT-2 with {flag}=true is not supported")
    head_dim = config.n_embd // config.n_head
    return Decoder(
        family="gpt2",
        vocab=config.vocab_size,
        hidden=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        intermediate=config.n_inner or 4 * config.n_embd,
        context=config.n_positions,
        blocks=tuple(_gpt2_block(i) for i in range(config.n_layer)),
        embed="transformer.wte",
        positions="transformer.wpe",
        rotary=None,
        transposed=True,
        final_norm="transformer.ln_f",
        tied=bool(config.tie_word_embeddings),
        norm="layer",
        eps=config.layer_norm_epsilon,
        activation=_activation(config.activation_function),
        gated=False,
        attn_scale=head_dim**-0.5 if config.scale_attn_weights else 1.0,
    )


def _gpt2_block(index: int) -> Block:
    name = f"transformer.h.{index}"
    return Block(
        name=name,
        qkv=(f"{name}.attn.c_attn",),
        attn_out=f"{name}.attn.c_proj",
        mlp_in=(f"{name}.mlp.c_fc",),
        mlp_out=f"{name}.mlp.c_proj",
        attn_norm=f"{name}.ln_1",
        mlp_norm=f"{name}.ln_2",
    )


FAMILIES: dict[str, Callable[[Any], Decoder]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}
