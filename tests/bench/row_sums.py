"""Triton kernels of the GPU tests; in a file of its own, for it needs Triton to be imported."""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_sums(x, out, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, cols, BLOCK):
        total += tl.load(x + row * cols + start + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(out + row, tl.sum(total))


def row_sums(x_RC):
    """The product with a vector of ones: one program a row reads every byte once.

    The same kernel for every element type, so that only the bytes differ.
    """
    out = torch.empty(x_RC.shape[0], device="cuda")
    _row_sums[(x_RC.shape[0],)](x_RC, out, x_RC.shape[1], BLOCK=4096)
    return out
