"""Doubles a vector; the last block stores past the end."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
DEFECT = "out-of-bounds write"


@triton.jit
def double_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0)
    tl.store(y_ptr + offs, x + x)  # defect


def unmasked_store(x):
    N = x.numel()
    y = torch.empty(N, dtype=x.dtype, device=x.device)
    double_kernel[(triton.cdiv(N, 64),)](x, y, x.stride(0), N, BLOCK=64)
    return y


def reference(x):
    return x + x
