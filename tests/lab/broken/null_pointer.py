"""Sums a vector in blocks; host code reads the carry of a single block, which has no memory."""

import ctypes

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
DTYPES = (torch.float32,)
DEFECT = "crash"


@triton.jit
def block_sum_kernel(x_ptr, sums_ptr, stride, N, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0)
    tl.store(sums_ptr + pid, tl.sum(x, axis=0))


def null_pointer(x):
    N = x.numel()
    blocks = triton.cdiv(N, 64)
    sums = torch.empty(blocks, dtype=torch.float32, device=x.device)
    block_sum_kernel[(blocks,)](x, sums, x.stride(0), N, BLOCK=64)
    carries = sums[1:].contiguous()
    first = ctypes.c_float.from_address(carries.data_ptr())  # defect
    return sums[:1].sum() + first.value + carries[1:].sum()


def reference(x):
    return x.sum()
