"""Hugging Face folders whose linear layers hold codes: what vLLM and TensorRT-LLM load.

All that is no linear layer keeps its name and becomes ``dtype``; each runtime has its own way to
store a layer. Shapes: R outputs, C inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optpipe import model
from optpipe.blockwise import one_scale
from optpipe.checkpoint import Checkpoint, Writer
from optpipe.errors import InputError
from optpipe.family import joined
from optpipe.linear import Form, Layers, Quantized
from optpipe.stage import Progress

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
OLD_TOKENIZER = "PreTrainedTokenizerFast"

Encode = Callable[[str, Quantized], dict[str, Tensor]]
"""Name and layer -> its tensors by their full names, the bias aside."""


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless ``dtype`` is one that GPUs multiply."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {[*DTYPES]}, got '{dtype}'")


def check_head(layers: Layers) -> None:
    """Raise ValueError if the output projection is quantized: TensorRT-LLM's takes no scales."""
    for name, form in layers.items():
        if name.endswith("lm_head") and form.bits is not None:
            raise ValueError(f"TensorRT-LLM reads no quantized '{name}'; quantize with head=false")


def check_layers(
    layers: Layers, runtime: str, scheme: Callable[[Form], object], sparse: bool = False
) -> None:
    """Raise ValueError for layers that ``runtime`` cannot load.

    ``scheme`` says how the runtime stores a quantized form, and raises ValueError if it cannot;
    ``sparse``, whether it has kernels for N:M patterns.
    """
    for name, form in layers.items():
        if name.endswith((".left", ".right")):
            layer = name.rpartition(".")[0]
            raise ValueError(f"{runtime} has no layers of low rank; '{layer}' is two factors")
        if form.pattern not in (None, "row") and not sparse:
            raise ValueError(
                f"layer '{name}' is {form.pattern} sparse, for which {runtime} has no kernels any "
                "more: it would be stored and multiplied as dense; drop the prune stage, or end "
                "in ONNX or TensorRT"
            )
        try:
            _ = None if form.bits is None else scheme(form)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}") from error
    for name, *others in joined(layers):
        for other in others:
            if _kind(layers[other]) != _kind(layers[name]):
                raise ValueError(
                    f"{runtime} multiplies '{name}' and '{other}' as one layer, but they are "
                    "stored in different forms; give them the same"
                )


def _kind(form: Form) -> tuple[object, ...]:
    return (form.bits, form.number, form.group_size, form.symmetric, form.inputs)


KEY, VALUE = "k_scale", "v_scale"


def cache_scales(checkpoint: Checkpoint) -> dict[tuple[str, str], float]:
    """(attention of a block, KEY or VALUE) -> scale of its cache; empty without an 8-bit cache."""
    if checkpoint.cache is None:
        return {}
    owners = [block.qkv[0].rpartition(".")[0] for block in checkpoint.decoder.blocks]
    kinds = {KEY: checkpoint.cache.key, VALUE: checkpoint.cache.value}
    return {
        (owner, part): scales[index]
        for index, owner in enumerate(owners)
        for part, scales in kinds.items()
    }


def check_cache(number: str | None, runtime: str) -> None:
    """Raise InputError for a KV cache in int8, which ``runtime`` has not."""
    if number not in (None, "fp8"):
        raise InputError(f"{runtime} has a KV cache in fp8, none in {number}; set cache.number=fp8")


def check_scales(checkpoint: Checkpoint, layers: Layers) -> None:
    """Raise InputError if layers that runtimes multiply as one have different scales of a layer.

    One stage that rounds all of them gives them the same.
    """
    spanned = [name for name, form in layers.items() if one_scale(form)]
    for name, *others in joined(spanned):
        own = _scale_of(checkpoint, name, layers[name])
        for other in others:
            if not torch.equal(_scale_of(checkpoint, other, layers[other]), own):
                raise InputError(
                    f"'{name}' and '{other}' are multiplied as one layer, with one scale, but have "
                    "two; quantize them in one stage"
                )


def _scale_of(checkpoint: Checkpoint, name: str, form: Form) -> Tensor:
    scale = checkpoint.get(f"{name}.{'global_scale' if form.number == 'nvfp4' else 'scales'}")
    assert scale is not None, name
    return scale


def parameters(checkpoint: Checkpoint) -> list[str]:
    """Names of the parameters of the plain model; the head if it has a weight of its own."""
    names = [*model.parameter_shapes(checkpoint)]
    if checkpoint.decoder.tied and not checkpoint.head_is_embedding:
        names.append(f"{checkpoint.decoder.head}.weight")
    return names


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder that is being written from a checkpoint."""

    checkpoint: Checkpoint
    out: Path
    dtype: str
    """Of all that is not quantized: 'float16' or 'bfloat16'."""
    cache: Callable[[str, str, float], dict[str, Tensor]]
    """Attention, KEY or VALUE, scale of an 8-bit cache -> the tensor that says so."""

    def write(
        self, encode: Encode, quantization: dict[str, Any] | None, progress: Progress
    ) -> None:
        """All tensors, one file for each block; config with ``quantization_config``; tokenizer."""
        writer, parts = Writer(self.out, self.checkpoint), self._parts()
        for index, (part, names) in enumerate(parts.items()):
            progress(part, index, len(parts))
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= self._tensors(name, encode)
            tensors |= self._cache_scales(part)
            writer.add(part, {key: value.contiguous() for key, value in tensors.items()})
        writer.seal()
        self._config(quantization)
        self._tokenizer()
        progress("saving", len(parts), len(parts))

    def _parts(self) -> dict[str, list[str]]:
        """Names of parameters of the plain model, by the file they go to."""
        blocks = [block.name for block in self.checkpoint.decoder.blocks]
        parts: dict[str, list[str]] = {}
        for name in parameters(self.checkpoint):
            part = next((block for block in blocks if name.startswith(f"{block}.")), "rest")
            parts.setdefault(part, []).append(name)
        return parts

    def _tensors(self, name: str, encode: Encode) -> dict[str, Tensor]:
        """What a parameter of the plain model becomes."""
        layer, _, part = name.rpartition(".")
        module = self._linear(layer)
        if module is None:
            tensor = self.checkpoint.get(name)
        elif part == "weight" and isinstance(module, Quantized):
            return encode(layer, module)
        else:
            tensor = getattr(module, part)
            if part == "weight" and self._transposed(layer):
                tensor = tensor.T
        assert tensor is not None, name
        return {name: tensor.to(DTYPES[self.dtype])}

    def _cache_scales(self, block: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for (owner, part), scale in cache_scales(self.checkpoint).items():
            if owner.startswith(f"{block}."):
                found |= self.cache(owner, part, scale)
        return found

    def _linear(self, name: str) -> nn.Module | None:
        decoder, forms = self.checkpoint.decoder, self.checkpoint.forms or {}
        if name != decoder.head and not any(name in block.linears for block in decoder.blocks):
            return None
        return model.layer(name, forms, self.checkpoint)

    def _transposed(self, layer: str) -> bool:
        return self.checkpoint.decoder.transposed and layer != self.checkpoint.decoder.head

    def _config(self, quantization: dict[str, Any] | None) -> None:
        file = self.out / "config.json"
        config = json.loads(file.read_text())
        config |= {"dtype": self.dtype, "torch_dtype": self.dtype, **old_rope(config)}
        config["tie_word_embeddings"] = self.checkpoint.head_is_embedding
        if not config.get("architectures"):
            config["architectures"] = [type(model.empty(self.checkpoint.config)).__name__]
        if quantization is not None:
            config["quantization_config"] = quantization
        write_json(file, config)

    def _tokenizer(self) -> None:
        """transformers 4, which some releases of these runtimes pin, knows no newer class."""
        file = self.out / "tokenizer_config.json"
        if file.is_file():
            config = json.loads(file.read_text())
            if config.get("tokenizer_class") == "TokenizersBackend":
                write_json(file, {**config, "tokenizer_class": OLD_TOKENIZER})


def old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings in the keys of transformers 4, beside those of transformers 5.

    Whoever only knows the old keys would silently rotate by a base of 10000.
    """
    rope = config.get("rope_parameters")
    if not rope:
        return {}
    local = rope.get("sliding_attention")
    full = rope.get("full_attention", rope)
    found: dict[str, Any] = {"rope_theta": full["rope_theta"]}
    if local is not None:
        found["rope_local_base_freq"] = local["rope_theta"]
    if "partial_rotary_factor" in full:
        found["partial_rotary_factor"] = full["partial_rotary_factor"]
    own = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return {**found, "rope_scaling": None if own.get("rope_type") == "default" else own}


def write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
