"""Triton kernels of the GPU tests; in a file of its own, for it needs Triton to be imported."""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_sums(x, out, cols, SUM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), SUM)
    for start in range(0, cols, BLOCK):
        total += tl.load(x + row * cols + start + tl.arange(0, BLOCK)).to(SUM)
    tl.store(out + row, tl.sum(total).to(tl.float32))


def row_sums(x_RC):
    """The product with a vector of ones: one program a row reads every byte once.

    The same kernel for every element type, so that only the bytes differ. Integers are summed as
    such: an H200 turns 16 of them a clock and multiprocessor into floats, and reads more.
    """
    out = torch.empty(x_RC.shape[0], device="cuda")
    total = tl.float32 if x_RC.is_floating_point() else tl.int32
    _row_sums[(x_RC.shape[0],)](x_RC, out, x_RC.shape[1], SUM=total, BLOCK=4096)
    return out
