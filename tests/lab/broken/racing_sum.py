"""Column sums: every program reads the sum so far, adds its rows and writes it back."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
DEFECT = "race"


@triton.jit
def column_sum_kernel(
    x_ptr, y_ptr, stride_m, stride_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = tl.arange(0, BLOCK_N).to(tl.int64)
    x_ptrs = x_ptr + rows[:, None] * stride_m + cols[None, :] * stride_n
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + cols, mask=cols < N, other=0.0)  # defect
    tl.store(y_ptr + cols, y + tl.sum(x, axis=0), mask=cols < N)


def racing_sum(x):
    M, N = x.shape
    y = torch.zeros(N, dtype=torch.float32, device=x.device)
    block = max(triton.next_power_of_2(N), 1)
    column_sum_kernel[(triton.cdiv(M, 16),)](x, y, *x.stride(), M, N, BLOCK_M=16, BLOCK_N=block)
    return y.to(x.dtype)


def reference(x):
    return x.sum(0)
