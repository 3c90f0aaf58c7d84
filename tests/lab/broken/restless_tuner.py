"""Row sums that try another block size on every call, to see which is faster."""

import itertools

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DTYPES = (torch.float32,)
DEFECT = "repeatability"


@triton.jit
def row_sum_kernel(x_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, N, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x_ptrs = x_ptr + row * stride_m + cols * stride_n
        total += tl.sum(tl.load(x_ptrs, mask=cols < N, other=0.0), axis=0)
    tl.store(y_ptr + row, total)


_trials = itertools.cycle((16, 64))


def restless_tuner(x):
    M, N = x.shape
    y = torch.empty(M, dtype=x.dtype, device=x.device)
    row_sum_kernel[(M,)](x, y, *x.stride(), N, BLOCK=next(_trials))  # defect
    return y


def reference(x):
    return x.sum(1)
