"""Copies a strided matrix; offsets become 64-bit only after the product that overflows."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "int32 overflow"


@triton.jit
def copy_kernel(x_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_offset = (row * stride_m).to(tl.int64)  # defect
    x = tl.load(x_ptr + row_offset + cols * stride_n, mask=cols < N)
    tl.store(y_ptr + row.to(tl.int64) * N + cols, x, mask=cols < N)


def late_cast(x):
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    copy_kernel[(M, triton.cdiv(N, 128))](x, y, *x.stride(), N, BLOCK=128)
    return y


def reference(x):
    return x.clone(memory_format=torch.contiguous_format)
