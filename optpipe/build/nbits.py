"""Integer weights in the layout of com.microsoft.MatMulNBits.

There a weight is (N, blocks, block_size * bits / 8) bytes, low bits first along K, unsigned; scales
are (N, blocks); zero points, packed likewise, may be left out when they are 2 ** (bits - 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

SIGNED = (TensorProto.INT4, TensorProto.INT8)
TYPES = (*SIGNED, TensorProto.UINT4, TensorProto.UINT8)
NARROW = (TensorProto.INT4, TensorProto.UINT4)
CHANNEL_BLOCK = 128  # a scale per channel is repeated for each block of this many inputs


@dataclass(frozen=True)
class Codes:
    """One weight of N outputs and ``inputs`` inputs, ready for the operator."""

    bits: int
    block_size: int
    inputs: int
    blocks: NDArray[np.uint8]
    scales: np.ndarray
    zeros: NDArray[np.uint8] | None


def block_codes(
    data: np.ndarray, proto: TensorProto, scales: np.ndarray, zeros: np.ndarray | None, size: int
) -> Codes:
    """From a canonical (K, N) weight; ``size`` is its block along K, 0 for one scale a channel."""
    inputs, outputs = proto.dims
    bits = 4 if proto.data_type in NARROW else 8
    weight = _unsigned(data, proto.data_type, inputs * outputs).reshape(inputs, outputs).T
    block_size = size or CHANNEL_BLOCK
    blocks = -(-inputs // block_size)
    shape = (scales.size // outputs, outputs)
    padded = np.full((outputs, blocks * block_size), 2 ** (bits - 1), np.uint8)
    padded[:, :inputs] = weight
    return Codes(
        bits=bits,
        block_size=block_size,
        inputs=inputs,
        blocks=_pack(padded, bits).reshape(outputs, blocks, -1),
        scales=_per_block(scales, outputs, blocks),
        zeros=None if zeros is None else _zeros(zeros, proto.data_type, shape, blocks),
    )


def concatenate(parts: list[Codes]) -> Codes:
    """Weights of the same inputs and grid, one below the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return Codes(
        bits=first.bits,
        block_size=first.block_size,
        inputs=first.inputs,
        blocks=np.concatenate([p.blocks for p in parts]),
        scales=np.concatenate([p.scales for p in parts]),
        zeros=np.concatenate(zeros) if zeros else None,
    )


def _unsigned(data: np.ndarray, dtype: int, count: int) -> NDArray[np.uint8]:
    """Codes from 0 on, one a byte; flipping the sign bit of a code adds half the range."""
    if dtype in NARROW:
        packed = data.view(np.uint8).reshape(-1)
        both = np.stack((packed & 15, packed >> 4), axis=-1).reshape(-1)[:count]
        return both ^ np.uint8(8 if dtype in SIGNED else 0)
    return data.view(np.uint8).reshape(-1) ^ np.uint8(128 if dtype in SIGNED else 0)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return codes
    packed: NDArray[np.uint8] = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def _per_block(scales: np.ndarray, outputs: int, blocks: int) -> np.ndarray:
    if scales.ndim == 1:
        return np.repeat(scales[:, None], blocks, axis=1)
    return np.ascontiguousarray(scales.T).reshape(outputs, blocks)


def _zeros(zeros: np.ndarray, dtype: int, shape: tuple[int, int], blocks: int) -> NDArray[np.uint8]:
    """(G, N) zero points as packed rows, one for each block of each output."""
    groups, outputs = shape
    per_group = _unsigned(zeros, dtype, groups * outputs).reshape(groups, outputs)
    per_row = np.repeat(per_group.T, blocks // groups, axis=1)
    if dtype in NARROW and blocks % 2:
        per_row = np.pad(per_row, ((0, 0), (0, 1)))
    return np.ascontiguousarray(_pack(per_row, 4 if dtype in NARROW else 8))
