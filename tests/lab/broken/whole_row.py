"""Reverses rows in blocks as long as a row, which must be a power of two."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "error"


@triton.jit
def reverse_kernel(x_ptr, y_ptr, stride_m, stride_n, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, N).to(tl.int64)  # defect
    x = tl.load(x_ptr + row * stride_m + cols * stride_n)
    tl.store(y_ptr + row * N + N - 1 - cols, x)


def whole_row(x):
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    reverse_kernel[(M,)](x, y, *x.stride(), N=N)
    return y


def reference(x):
    return x.flip(1)
