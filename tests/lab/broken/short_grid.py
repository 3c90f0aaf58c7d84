"""Scales a vector with a grid that is rounded down."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N] scale=0.5"
DEFECT = "unwritten output"


@triton.jit
def scale_kernel(x_ptr, y_ptr, stride, scale, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N).to(tl.float32)
    tl.store(y_ptr + offs, (x * scale).to(y_ptr.dtype.element_ty), mask=offs < N)  # defect


def short_grid(x, scale=0.5):
    N = x.numel()
    y = torch.empty(N, dtype=x.dtype, device=x.device)
    scale_kernel[(max(N // 64, 1),)](x, y, x.stride(0), scale, N, BLOCK=64)
    return y


def reference(x, scale=0.5):
    return x * scale
