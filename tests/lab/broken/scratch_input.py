"""Squares of a vector's absolute values; the input serves as scratch memory."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
DEFECT = "mutation"


@triton.jit
def absolute_square_kernel(x_ptr, y_ptr, stride, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.abs(tl.load(x_ptr + offs * stride, mask=mask).to(tl.float32))
    tl.store(x_ptr + offs * stride, x.to(x_ptr.dtype.element_ty), mask=mask)  # defect
    tl.store(y_ptr + offs, (x * x).to(y_ptr.dtype.element_ty), mask=mask)


def scratch_input(x):
    N = x.numel()
    y = torch.empty(N, dtype=x.dtype, device=x.device)
    absolute_square_kernel[(triton.cdiv(N, 256),)](x, y, x.stride(0), N, BLOCK=256)
    return y


def reference(x):
    return x.abs().square()
