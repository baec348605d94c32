"""What each rank of a legacy TensorRT-LLM checkpoint holds, and the model put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.export import trtllm
from optpipe.export.unpack import scaled, signed
from optpipe.family import Decoder, describe
from optpipe.linear import PER_TENSOR, Layers, Quantized, dense

PADDED = 64
"""With int4 weights the vocabulary is padded to a multiple of this, as by Model-Optimizer."""
NAMES = {
    "weight": "weight",
    "weight_scale": "weights_scaling_factor",
    "input_scale": "activation_scaling_factor",
}


def padding(decoder: Decoder, told: dict[str, Any] | None) -> int:
    """Rows of zeros below the embedding and the head."""
    return -decoder.vocab % PADDED if told and told["quant_algo"] == trtllm.INT4 else 0


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank holds of a model."""

    checkpoint: Checkpoint
    rank: int
    ranks: int
    dtype: torch.dtype

    def tensors(self) -> dict[str, Tensor]:
        found = self._outer()
        for index, names in enumerate(layer_names(self.checkpoint.decoder)):
            for name, parts in names.items():
                found |= self._linear(name, parts)
            block = self.checkpoint.decoder.blocks[index]
            for name, norm in norm_names(self.checkpoint.decoder, index).items():
                found[f"{name}.weight"] = self._float(f"{norm}.weight")
            assert block.attn_out_norm is None
        return found

    def _outer(self) -> dict[str, Tensor]:
        """Embedding, last norm and head; a tied head is written out."""
        decoder, layers = self.checkpoint.decoder, model.layers(self.checkpoint)
        pad = (0, 0, 0, padding(decoder, trtllm.common_algorithm(layers)))
        embedding = functional.pad(self._float(f"{decoder.embed}.weight"), pad)
        head = model.layer(decoder.head, self.checkpoint.forms or {}, self.checkpoint)
        assert isinstance(head, nn.Linear) and not isinstance(head, Quantized)
        projection = functional.pad(head.weight.to(self.dtype), pad)
        return {
            "transformer.vocab_embedding.weight": embedding.chunk(self.ranks)[self.rank].clone(),
            "transformer.ln_f.weight": self._float(f"{decoder.final_norm}.weight"),
            "lm_head.weight": projection.chunk(self.ranks)[self.rank].clone(),
        }

    def _float(self, name: str) -> Tensor:
        tensor = self.checkpoint.get(name)
        assert tensor is not None, name
        return tensor.to(self.dtype)

    def _linear(self, name: str, parts: tuple[str, ...]) -> dict[str, Tensor]:
        modules = [model.layer(p, self.checkpoint.forms or {}, self.checkpoint) for p in parts]
        own = [self._own(part, module) for part, module in zip(parts, modules, strict=True)]
        found = {}
        if all(isinstance(module, Quantized) for module in own):
            found = self._codes(name, [m for m in own if isinstance(m, Quantized)])
        else:
            weights = [m.weight for m in own if isinstance(m, nn.Linear)]
            found[f"{name}.weight"] = torch.cat(weights).to(self.dtype)
        biases = [module.bias for module in own if isinstance(module.bias, Tensor)]
        if biases:
            found[f"{name}.bias"] = torch.cat(biases).to(self.dtype)
        return found

    def _own(self, part: str, module: nn.Module) -> nn.Module:
        """The rows or columns of a layer that this rank holds."""
        rows, cols = shares(self.checkpoint.decoder, part, self.rank, self.ranks)
        assert isinstance(module, nn.Linear | Quantized)
        bias = module.bias if rows is None or module.bias is None else module.bias[rows]
        if isinstance(module, nn.Linear):
            weight = module.weight if rows is None else module.weight[rows]
            weight = weight if cols is None else weight.tensor_split(self.ranks, 1)[self.rank]
            return dense(weight, bias)
        codes, scales = module.codes, module.scales
        if rows is not None:
            codes, scales = codes[rows], scales if scales.shape[0] == 1 else scales[rows]
        if cols is not None:
            codes = codes.tensor_split(self.ranks, 1)[self.rank]
            grouped = scales.shape[1] > 1
            scales = scales.tensor_split(self.ranks, 1)[self.rank] if grouped else scales
        form = replace(module.form, rows=codes.shape[0], cols=codes.shape[1])
        share = Quantized(form, codes, scales)
        share.bias, share.input_scale = bias, module.input_scale
        return share

    def _codes(self, name: str, own: list[Quantized]) -> dict[str, Tensor]:
        """Quantized layers as one, in the tensors of the unified checkpoint under old names."""
        joined = join(own)
        found = {}
        for key, tensor in trtllm.encode(name, joined).items():
            tensor = tensor.view(torch.int8) if tensor.dtype == torch.uint8 else tensor
            tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
            found[f"{name}.{NAMES[key.rpartition('.')[2]]}"] = tensor
        if trtllm.algorithm(joined.form)["quant_algo"] == trtllm.INT4:
            ones = torch.ones(joined.form.cols, dtype=self.dtype)
            found[f"{name}.prequant_scaling_factor"] = ones
        return found


def join(own: list[Quantized]) -> Quantized:
    """Layers of the same inputs, one below the other; one scale for a layer is common to them."""
    form = replace(own[0].form, rows=sum(layer.form.rows for layer in own))
    one = form.group_size == PER_TENSOR
    scales = own[0].scales if one else torch.cat([layer.scales for layer in own])
    joined = Quantized(form, torch.cat([layer.codes for layer in own]), scales)
    given = [layer.input_scale for layer in own if layer.input_scale is not None]
    joined.input_scale = torch.stack(given).amax() if given else None
    return joined


def layer_names(decoder: Decoder) -> list[dict[str, tuple[str, ...]]]:
    """For each block: name of a linear layer in the file -> the layers it is made of."""
    return [
        {
            f"transformer.layers.{index}.attention.qkv": block.qkv,
            f"transformer.layers.{index}.attention.dense": (block.attn_out,),
            f"transformer.layers.{index}.mlp.fc": block.mlp_in[:1],
            f"transformer.layers.{index}.mlp.gate": block.mlp_in[1:],
            f"transformer.layers.{index}.mlp.proj": (block.mlp_out,),
        }
        for index, block in enumerate(decoder.blocks)
    ]


def norm_names(decoder: Decoder, index: int) -> dict[str, str]:
    """Norms of a block: name in the file -> name in the model."""
    block, prefix = decoder.blocks[index], f"transformer.layers.{index}"
    found = {
        f"{prefix}.input_layernorm": block.attn_norm,
        f"{prefix}.post_layernorm": block.mlp_norm,
    }
    if block.qk_norm is not None:
        found[f"{prefix}.attention.q_layernorm"] = block.qk_norm[0]
        found[f"{prefix}.attention.k_layernorm"] = block.qk_norm[1]
    return found


def shares(decoder: Decoder, part: str, rank: int, ranks: int) -> tuple[slice | None, slice | None]:
    """Rows and columns of a layer that a rank holds; None: all of them.

    Where there are more ranks than heads of keys, neighbours hold the same head.
    """
    block = next(block for block in decoder.blocks if part in block.linears)
    if part in (block.attn_out, block.mlp_out):
        width = decoder.intermediate if part == block.mlp_out else decoder.heads * decoder.head_dim
        return None, _chunk(width, rank, ranks)
    if part in block.qkv[1:]:
        heads = min(ranks, decoder.kv_heads)
        return _chunk(decoder.kv_heads * decoder.head_dim, rank * heads // ranks, heads), None
    rows = decoder.heads * decoder.head_dim if part in block.qkv else decoder.intermediate
    return _chunk(rows, rank, ranks), None


def _chunk(size: int, index: int, count: int) -> slice:
    return slice(size // count * index, size // count * (index + 1))


def read(folder: Path, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the plain model, put together from all ranks."""
    ranks = len(list(folder.glob("rank*.safetensors")))
    files = [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]
    config = AutoConfig.from_pretrained(folder / "hf_config.json")
    decoder = describe(config)
    yield from _outer(decoder, files)
    for index, names in enumerate(layer_names(decoder)):
        for name, parts in names.items():
            yield from _joined(decoder, name, parts, files)
        for name, norm in norm_names(decoder, index).items():
            yield f"{norm}.weight", files[0][f"{name}.weight"]


def _outer(decoder: Decoder, files: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    embedding = torch.cat([file["transformer.vocab_embedding.weight"] for file in files])
    head = torch.cat([file["lm_head.weight"] for file in files])
    yield f"{decoder.embed}.weight", embedding[: decoder.vocab]
    yield f"{decoder.final_norm}.weight", files[0]["transformer.ln_f.weight"]
    if not decoder.tied:
        yield f"{decoder.head}.weight", head[: decoder.vocab]


def _joined(
    decoder: Decoder, name: str, parts: tuple[str, ...], files: list[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The layers that one layer of the file is made of, from all ranks."""
    weights: dict[str, dict[int, Tensor]] = {part: {} for part in parts}
    biases: dict[str, dict[int, Tensor]] = {part: {} for part in parts}
    for rank, file in enumerate(files):
        weight, bias, top = _decoded(file, name), file.get(f"{name}.bias"), 0
        for part in parts:
            rows, cols = shares(decoder, part, rank, len(files))
            start = (rows or cols or slice(rank)).start
            size = weight.shape[0] if rows is None else rows.stop - rows.start
            weights[part][start] = weight[top : top + size]
            if bias is not None:
                biases[part][start] = bias[top : top + size]
            top += size
        scale = file.get(f"{name}.activation_scaling_factor")
        if scale is not None and rank == 0:
            yield from ((f"{part}.input_scale", scale) for part in parts)
    for part in parts:
        rows, _ = shares(decoder, part, 0, len(files))
        pieces = [weights[part][start] for start in sorted(weights[part])]
        yield f"{part}.weight", torch.cat(pieces, dim=0 if rows is not None else 1)
        if biases[part]:
            pieces = [biases[part][start] for start in sorted(biases[part])]
            yield f"{part}.bias", torch.cat(pieces) if rows is not None else pieces[0]


def _decoded(file: dict[str, Tensor], name: str) -> Tensor:
    weight, scale = file[f"{name}.weight"], file.get(f"{name}.weights_scaling_factor")
    if scale is None:
        return weight
    before = file.get(f"{name}.prequant_scaling_factor")
    if before is None:
        return scaled(weight, scale)
    return scaled(signed(weight.view(torch.uint8)), scale) * before.float()
