"""Scales rows that are said to begin on multiples of 16 elements, whatever their length."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N] factor=3.0"
DEFECT = "promise"


def reference(x, factor):
    return x * factor


@triton.jit
def scale_kernel(x_ptr, y_ptr, N, factor, BLOCK: tl.constexpr):
    start = tl.multiple_of(tl.program_id(0) * N, 16)  # defect
    for first in range(0, N, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        mask = columns < N
        x = tl.load(x_ptr + start + columns, mask=mask, other=0.0)
        tl.store(y_ptr + start + columns, factor * x, mask=mask)


def false_hint(x, factor):
    x = x.contiguous()
    y = torch.empty_like(x)
    scale_kernel[(x.shape[0],)](x, y, x.shape[1], factor, BLOCK=64)
    return y
