"""Scales columns by the softplus of a weight, which is computed once for each shape and kept."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N] weight[N]"
NON_FINITE = ()
DEFECT = "history"


@triton.jit
def scale_columns_kernel(x_ptr, w_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, N, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        mask = cols < N
        x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=mask).to(tl.float32)
        w = tl.load(w_ptr + cols, mask=mask)
        tl.store(y_ptr + row * N + cols, (x * w).to(y_ptr.dtype.element_ty), mask=mask)


_scales: dict[tuple[int, torch.dtype], torch.Tensor] = {}


def stale_cache(x, weight):
    M, N = x.shape
    key = N, x.dtype  # defect
    if key not in _scales:
        _scales[key] = torch.nn.functional.softplus(weight.float()).contiguous()
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    scale_columns_kernel[(M,)](x, _scales[key], y, *x.stride(), N, BLOCK=128)
    return y


def reference(x, weight):
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) * torch.nn.functional.softplus(weight.to(wide))).to(x.dtype)
