"""Variance of rows, divided by N where torch divides by N - 1."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"
NON_FINITE = ()
DEFECT = "values"


@triton.jit
def variance_kernel(x_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=cols < N, other=0.0).to(tl.float32)
    centred = tl.where(cols < N, x - tl.sum(x, axis=0) / N, 0.0)
    variance = tl.sum(centred * centred, axis=0) / N
    tl.store(y_ptr + row, variance.to(y_ptr.dtype.element_ty))  # defect


def biased_variance(x):
    M, N = x.shape
    y = torch.empty(M, dtype=x.dtype, device=x.device)
    variance_kernel[(M,)](x, y, *x.stride(), N, BLOCK=max(triton.next_power_of_2(N), 1))
    return y


def reference(x):
    wide = x if x.dtype == torch.float64 else x.float()
    squares = (wide - wide.mean(1, keepdim=True)).square().sum(1)
    return (squares / (x.shape[1] - 1)).to(x.dtype)
