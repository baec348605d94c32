"""The parts of a graph that hold weights: linear layers in each form, norms, constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, nn

from optpipe import model
from optpipe.checkpoint import Checkpoint
from optpipe.export.graph import Graph
from optpipe.linear import BLOCKS, LARGEST, PER_TENSOR, Corrected, Form, LowRank, Quantized, pack
from optpipe.microscaling import BLOCK

ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
NUMBERS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
TRT = "trt"
"""Domain of TensorRT's own operators: ONNX has neither e8m0 scales that TensorRT reads nor scales
that are found as inputs come."""
BUFFER = 1 << 15
"""Elements converted at a time: few enough to stay in the cache and for one thread of torch."""


class Weights:
    """Reads weights from a checkpoint and puts them into a graph, floats as ``dtype``."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.graph, self.checkpoint, self.dtype = graph, checkpoint, dtype
        self.onnx_dtype = ONNX_DTYPES[dtype]
        self._buffer = torch.empty(BUFFER, dtype=dtype)
        self._rounded: dict[tuple[str, str, float | None], str] = {}

    def linear(self, x: str, name: str, output: str | None = None) -> str:
        """y = x @ W.T + b for the layer ``name``, whatever its form."""
        forms = self.checkpoint.forms or {}
        module = model.layer(name, forms, self.checkpoint, self.checkpoint.dtype)
        return self._layer(x, name, module, output)

    def _layer(self, x: str, name: str, module: nn.Module, output: str | None) -> str:
        if isinstance(module, LowRank):
            x = self._layer(x, f"{name}.right", module.right, None)
            return self._layer(x, f"{name}.left", module.left, output)
        if isinstance(module, Corrected):
            y = self._layer(x, name, module.base, f"{name}.base")
            z = self._layer(x, f"{name}.residual", module.residual, None)
            return self.graph.node("Add", [y, z], output or name)
        assert isinstance(module, nn.Linear | Quantized)
        if isinstance(module, Quantized):
            weight = self._codes(name, module)
            x = self._round(x, name, module)
        else:
            weight = self.tensor(f"{name}.weight", module.weight.T)
        output = output or name
        if module.bias is None:
            return self.graph.node("MatMul", [x, weight], output)
        y = self.graph.node("MatMul", [x, weight], f"{output}/matmul")
        return self.graph.node("Add", [y, self.tensor(f"{name}.bias", module.bias)], output)

    def _codes(self, name: str, module: Quantized) -> str:
        """DequantizeLinear of a (K, N) weight, in blocks along K, per channel or per tensor.

        Symmetric codes become signed integers without a zero point, which is all that TensorRT
        takes; fewer than 4 bits travel in 4-bit integers.
        """
        form, g = module.form, self.graph
        if form.number in BLOCKS:
            return self._blocks(name, module)
        assert form.bits is not None
        symmetric = module.zeros is None
        if form.number == "fp8":
            shape = (form.cols, form.rows)
            bytes_CR = module.codes.T.contiguous().numpy()
            codes = g.raw(f"{name}.codes", NUMBERS["fp8"], shape, [bytes_CR])
        else:
            zero = 2 ** (form.bits - 1) if symmetric else 0
            codes = self._integers(f"{name}.codes", module.codes, form.bits, zero)
        inputs = [codes, self.tensor(f"{name}.scales", self._by_column(form, module.scales))]
        if module.zeros is not None:
            inputs.append(self._integers(f"{name}.zeros", module.zeros, form.bits, 0))
        where: dict[str, Any] = {}
        if form.group_size != PER_TENSOR:
            blocks = {"axis": 0, "block_size": form.group_size}
            where = {"axis": 1} if form.groups == 1 else blocks
        return g.node("DequantizeLinear", inputs, f"{name}.dequantized", **where)

    def _blocks(self, name: str, module: Quantized) -> str:
        """A (K, N) weight in blocks along K whose scales are 8-bit floats, as TensorRT reads it."""
        form, g = module.form, self.graph
        scales_GR = module.scales.view(torch.uint8).T.contiguous()
        shape = (form.groups, form.rows)
        where: dict[str, Any] = {"axis": 0, "block_size": form.group_size}
        if form.number == "mxfp8":
            bytes_CR = module.codes.T.contiguous().numpy()
            shape_CR = (form.cols, form.rows)
            codes = g.raw(f"{name}.codes", TensorProto.FLOAT8E4M3FN, shape_CR, [bytes_CR])
            exponents = g.raw(f"{name}.scales", TensorProto.UINT8, shape, [scales_GR.numpy()])
            return self._dequantize_mx(codes, exponents, f"{name}.dequantized", where)
        assert module.global_scale is not None
        codes = self._nibbles(f"{name}.codes", TensorProto.FLOAT4E2M1, module.codes)
        stored = g.raw(f"{name}.scales", TensorProto.FLOAT8E4M3FN, shape, [scales_GR.numpy()])
        whole = self._global(f"{name}.global_scale", module.global_scale)
        steps = self._steps(stored, whole, f"{name}.steps")
        return g.node("DequantizeLinear", [codes, steps], f"{name}.dequantized", **where)

    def _global(self, name: str, scale: Tensor) -> str:
        """A global scale, which is float32 in any graph."""
        return self.graph.constant(name, scale.float().reshape(()).numpy())

    def _steps(self, scales: str, whole: str, output: str) -> str:
        """Scales in e4m3 times their global one."""
        dtype = self.onnx_dtype
        return self.graph.node("DequantizeLinear", [scales, whole], output, output_dtype=dtype)

    def _dequantize_mx(self, codes: str, exponents: str, output: str, where: dict[str, Any]) -> str:
        return self.graph.node("TRT_MXFP8DequantizeLinear", [codes, exponents], output,
                               domain=TRT, **where, output_dtype=self.onnx_dtype)  # fmt: skip

    def _round_blocks(self, x: str, name: str, number: str, whole: Tensor | None) -> str:
        """Inputs as codes and back, with scales of blocks found as they come."""
        g = self.graph
        where: dict[str, Any] = {"axis": -1, "block_size": BLOCK[number]}
        made = [f"{name}.codes_in", f"{name}.scales_in"]
        if whole is None:
            g.add("TRT_MXFP8DynamicQuantize", [x], made, domain=TRT, **where,
                  output_dtype=TensorProto.FLOAT8E4M3FN)  # fmt: skip
            return self._dequantize_mx(made[0], made[1], f"{name}.rounded_in", where)
        scale = self._global(f"{name}.input_scale", whole)
        g.add("TRT_FP4DynamicQuantize", [x, scale], made, domain=TRT, **where,
              scale_type=TensorProto.FLOAT8E4M3FN)  # fmt: skip
        steps = self._steps(made[1], scale, f"{name}.steps_in")
        return g.node("DequantizeLinear", [made[0], steps], f"{name}.rounded_in", **where)

    def _round(self, x: str, name: str, module: Quantized) -> str:
        """Quantize and DequantizeLinear of the inputs, once for layers that share them."""
        form, g = module.form, self.graph
        if form.inputs is None:
            return x
        static = module.input_scale
        key = (x, form.inputs, None if static is None else float(static))
        if key in self._rounded:
            return self._rounded[key]
        number, _, per = form.inputs.partition("_")
        where: dict[str, Any] = {}
        if per == "block":
            self._rounded[key] = self._round_blocks(x, name, number, static)
            return self._rounded[key]
        if static is None:  # a block is all of a token, and so is the last axis
            scale = self._token_scale(x, name, LARGEST[number])
            where = {"axis": -1, "block_size": form.cols}
            g.node("QuantizeLinear", [x, scale], f"{name}.codes_in", **where,
                   output_dtype=NUMBERS[number])  # fmt: skip
            inputs = [f"{name}.codes_in", scale]
        else:
            scale = self.tensor(f"{name}.input_scale", static)
            zero = g.raw(f"zero.{number}", NUMBERS[number], (), [np.zeros(1, np.uint8)])
            inputs = [g.node("QuantizeLinear", [x, scale, zero], f"{name}.codes_in"), scale, zero]
        rounded = g.node("DequantizeLinear", inputs, f"{name}.rounded_in", **where)
        self._rounded[key] = rounded
        return rounded

    def _token_scale(self, x: str, name: str, largest: float) -> str:
        """The largest magnitude of each token over ``largest``, (B, S, 1)."""
        g = self.graph
        axes = g.constant("last_axis", np.array([-1], np.int64))
        y = g.node("Abs", [x], f"{name}.magnitudes_in")
        y = g.node("ReduceMax", [y, axes], f"{name}.largest_in", keepdims=1)
        y = g.node("Div", [y, self.scalar(f"{largest:g}", largest)], f"{name}.steps_in")
        # a token of zeros stays one
        least = self.scalar("least_scale", 2.0 ** (-24 if self.dtype == torch.float16 else -126))
        return g.node("Max", [y, least], f"{name}.scale_in")

    def _integers(self, name: str, codes_RC: Tensor, bits: int, zero: int) -> str:
        """``codes - zero``, transposed, as (U)INT4 or (U)INT8; unsigned when ``zero`` is 0."""
        rows, cols = codes_RC.shape
        shape = (cols, rows) if cols > 1 else (rows,)
        shifted = codes_RC - zero  # wraps around to two's complement
        if bits == 8:
            dtype = TensorProto.INT8 if zero else TensorProto.UINT8
            return self.graph.raw(name, dtype, shape, [shifted.T.contiguous().numpy()])
        return self._nibbles(name, TensorProto.INT4 if zero else TensorProto.UINT4, shifted)

    def _nibbles(self, name: str, dtype: int, codes_RC: Tensor) -> str:
        """The low four bits of codes, transposed, two a byte."""
        rows, cols = codes_RC.shape
        shape = (cols, rows) if cols > 1 else (rows,)
        if rows % 2:  # two codes a byte straddle the columns
            nibbles = pack((codes_RC & 15).T.reshape(1, -1), 4)
            return self.graph.raw(name, dtype, shape, [nibbles.numpy()])
        pairs = (codes_RC[0::2] & 15) | (codes_RC[1::2] << 4)
        return self.graph.raw(name, dtype, shape, [pairs.T.contiguous().numpy()])

    @staticmethod
    def _by_column(form: Form, grouped_RG: Tensor) -> Tensor:
        """(R, G) to (G, R), or to (R) for one group, or to a scalar."""
        if form.group_size == PER_TENSOR:
            return grouped_RG.reshape(())
        return grouped_RG[:, 0] if grouped_RG.shape[1] == 1 else grouped_RG.T

    def norm(self, x: str, name: str) -> str:
        d = self.checkpoint.decoder
        if d.norm == "layer":
            inputs = [x, self.stored(f"{name}.weight"), self.stored(f"{name}.bias")]
            return self.graph.node("LayerNormalization", inputs, name, axis=-1, epsilon=d.eps)
        weight = self.checkpoint.get(f"{name}.weight")
        assert weight is not None
        gamma = self.tensor(f"{name}.weight", weight.float() + d.norm_offset)
        return self.graph.node("RMSNormalization", [x, gamma], name, axis=-1, epsilon=d.eps)

    def split(self, x: str, sizes: list[int]) -> list[str]:
        """Cut the last axis into parts of these sizes."""
        lengths = self.graph.constant(f"{x}/sizes", np.array(sizes, np.int64))
        outputs = [f"{x}/part{i}" for i in range(len(sizes))]
        self.graph.add("Split", [x, lengths], outputs, axis=-1)
        return outputs

    def softcap(self, x: str, cap: float, output: str) -> str:
        """cap * tanh(x / cap)"""
        value = self.scalar(f"{output}/cap", cap)
        x = self.graph.node("Div", [x, value], f"{output}/scaled")
        x = self.graph.node("Tanh", [x], f"{output}/tanh")
        return self.graph.node("Mul", [x, value], output)

    def stored(self, name: str) -> str:
        """A stored floating-point tensor under its own name."""
        if name in self.graph.initializers:
            return name
        stored = self.checkpoint.get(name)
        assert stored is not None, name
        return self.tensor(name, stored)

    def scalar(self, name: str, value: float) -> str:
        return self.tensor(name, torch.tensor(value))

    def tensor(self, name: str, value: Tensor) -> str:
        return self.graph.raw(name, self.onnx_dtype, tuple(value.shape), self._converted(value))

    def _converted(self, value: Tensor) -> Iterator[np.ndarray]:
        """The elements as ``dtype``, through one buffer that stays in the cache.

        A fresh tensor for every weight costs a page fault for every 4 kB, more than the rest.
        """
        flat = value.contiguous().view(-1)  # transposed while it is still small
        if flat.dtype == self.dtype:
            yield _bytes(flat)
            return
        for part in flat.split(BUFFER):
            yield _bytes(self._buffer[: len(part)].copy_(part))


def _bytes(flat: Tensor) -> np.ndarray:
    array: np.ndarray = flat.view(torch.uint8).numpy()  # numpy has no bfloat16
    return array
