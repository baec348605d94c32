"""One GGUF file for llama.cpp: F16, Q8_0 and Q4_0, with the tokenizer inside.

Shapes: R outputs, C inputs. Blocks of 32 weights of a row share a float16 scale:

    Q4_0  scale, 16 bytes: code of weight i low, of weight i + 16 high; weight = (code - 8) * scale
    Q8_0  scale, 32 int8 codes; weight = code * scale

so symmetric int4 and int8 weights in groups of a multiple of 32, or by channel, keep their codes;
the scale of a larger group is repeated. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optpipe import model
from optpipe.artifact import Artifact, Stats
from optpipe.cache.static import number_after
from optpipe.checkpoint import Checkpoint, copy_side_files
from optpipe.errors import InputError
from optpipe.export import llamacpp
from optpipe.export.folder import DTYPES, check_dtype, parameters
from optpipe.linear import PER_TENSOR, Form, Layers, Quantized
from optpipe.stage import Progress, Stage

FILE = "model.gguf"
BLOCK = 32
"""Weights that share a scale."""


@dataclass(frozen=True, kw_only=True)
class Gguf(Stage):
    """Write the file; config and tokenizer lie beside it, for whoever else wants them."""

    produces: ClassVar[str] = "gguf"

    dtype: str = "float16"
    """Of matrices that are not quantized: float16 or bfloat16. Vectors are float32."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)

    def plan(self, layers: Layers) -> Layers:
        for name, form in layers.items():
            if name.endswith((".left", ".right")):
                layer = name.rpartition(".")[0]
                raise ValueError(f"llama.cpp has no layers of low rank; '{layer}' is two factors")
            if form.bits is not None:
                _check(name, form)
        return layers

    def inputs(self, model: Checkpoint) -> str:
        try:
            import gguf  # an extra: only who exports to llama.cpp needs it
        except ImportError as error:
            raise InputError(
                "export=gguf needs package 'gguf': pip install 'optpipe[gguf]'"
            ) from error
        llamacpp.check(model)
        return str(getattr(gguf, "__version__", ""))

    def follow(self, earlier: Sequence[Stage], model: Checkpoint) -> None:
        if number_after(earlier, model) is not None:
            raise InputError(
                "llama.cpp takes the type of its KV cache as an option; leave the cache stage out"
            )

    def run(self, source: Artifact, out: Path, progress: Progress) -> Stats:
        import gguf

        checkpoint = Checkpoint(source.path)
        self.follow([], checkpoint)
        arch = llamacpp.ARCHITECTURES[checkpoint.decoder.family]
        writer = gguf.GGUFWriter(out / FILE, arch, use_temp_file=True)
        bits = [form.bits for form in (checkpoint.forms or {}).values() if form.bits]
        plain = "F16" if self.dtype == "float16" else "BF16"
        kind = f"Q{min(bits)}_0" if bits else plain
        llamacpp.describe(checkpoint, writer, kind)
        names = parameters(checkpoint)
        for index, name in enumerate(names):
            progress(name, index, len(names))
            self._add(checkpoint, writer, name)
        for name, tensor in llamacpp.rotary_factors(checkpoint).items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        copy_side_files(source.path, out)
        return {"dtype": self.dtype, "architecture": arch}

    def _add(self, checkpoint: Checkpoint, writer: Any, name: str) -> None:
        """One parameter of the plain model."""
        import gguf

        decoder, target = checkpoint.decoder, llamacpp.tensor_name(checkpoint, name)
        layer, _, part = name.rpartition(".")
        rows = llamacpp.row_order(decoder, layer)
        linear = layer == decoder.head or any(layer in block.linears for block in decoder.blocks)
        module = model.layer(layer, checkpoint.forms or {}, checkpoint) if linear else None
        if isinstance(module, Quantized) and part == "weight":
            kind = f"Q{module.form.bits}_0"
            blocks = encode(module)
            stored = blocks if rows is None else blocks[rows.numpy()]
            writer.add_tensor(target, stored, raw_dtype=gguf.GGMLQuantizationType[kind])
            return
        tensor = checkpoint.get(name) if module is None else getattr(module, part)
        assert tensor is not None, name
        tensor = tensor if rows is None else tensor[rows]
        if tensor.dim() == 1:
            vector = tensor.float() + llamacpp.norm_offset(decoder, layer)
            writer.add_tensor(target, vector.numpy())
        elif self.dtype == "float16":
            writer.add_tensor(target, tensor.half().contiguous().numpy())
        else:
            raw = tensor.to(DTYPES[self.dtype]).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(target, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _check(name: str, form: Form) -> None:
    """Raise ValueError unless these weights are blocks of llama.cpp as they are."""
    if form.number != "int" or form.bits not in (4, 8) or not form.symmetric:
        kind = f"{form.bits}-bit {form.number}, symmetric={form.symmetric}"
        raise ValueError(f"GGUF keeps symmetric int4 and int8 as they are; '{name}' is {kind}")
    if form.inputs is not None:
        raise ValueError(f"llama.cpp rounds inputs its own way, not '{form.inputs}' ('{name}')")
    width = form.group_size if form.group_size > 0 else form.cols
    if width % BLOCK or form.group_size == PER_TENSOR:
        raise ValueError(
            f"blocks of {BLOCK} weights share a scale, which group_size={form.group_size} of "
            f"'{name}' with {form.cols} inputs does not allow; take a multiple of {BLOCK}"
        )


def encode(layer: Quantized) -> NDArray[np.uint8]:
    """The blocks of a layer, (R, bytes)."""
    form = layer.form
    count = form.cols // BLOCK
    scales = layer.scales.repeat_interleave(count // layer.scales.shape[1], dim=1)
    head = scales.contiguous().view(torch.uint8).reshape(form.rows, count, 2)
    codes = layer.codes.reshape(form.rows, count, BLOCK)
    signed = codes ^ 128  # code - 128 in two's complement
    low, high = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    body = low | (high << 4) if form.bits == 4 else signed
    blocks: Tensor = torch.cat([head, body], dim=-1).reshape(form.rows, -1)
    return np.asarray(blocks.numpy())


def read(folder: Path, layers: Layers) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the plain model, as the gguf package decodes it."""
    import gguf

    checkpoint = Checkpoint(folder)
    decoder = checkpoint.decoder
    names = {llamacpp.tensor_name(checkpoint, n): n for n in _candidates(checkpoint)}
    for stored in gguf.GGUFReader(folder / FILE).tensors:
        if stored.name == llamacpp.ROTARY_FACTORS:
            continue
        name = names.get(stored.name, stored.name)
        kind = stored.tensor_type
        if kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32):
            tensor = torch.from_numpy(np.array(stored.data))
        else:
            tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, kind))
            tensor = tensor.bfloat16() if kind == gguf.GGMLQuantizationType.BF16 else tensor
        layer = name.rpartition(".")[0]
        if (rows := llamacpp.row_order(decoder, layer)) is not None:
            tensor = tensor[rows.argsort()]
        if tensor.dim() == 1:
            tensor = tensor - llamacpp.norm_offset(decoder, layer)
        transposed = decoder.transposed and layer != decoder.head and layer in layers
        yield name, tensor.T if transposed and tensor.dim() == 2 else tensor


def _candidates(checkpoint: Checkpoint) -> list[str]:
    """Names of parameters that the file may hold: a tied head has one only where it has codes."""
    names, head = model.parameter_shapes(checkpoint), f"{checkpoint.decoder.head}.weight"
    return [*names, head] if head not in names and llamacpp.has_head(checkpoint) else [*names]
