"""Adds rows by group into memory that nobody has set to zero."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, D] group[M]:int64<G weight[G]"
DEFECT = "uninitialised read"


@triton.jit
def segment_sum_kernel(x_ptr, group_ptr, y_ptr, stride_m, stride_d, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.load(group_ptr + row)
    for start in range(0, D, BLOCK):
        cols = (start + tl.arange(0, BLOCK)).to(tl.int64)
        x_ptrs = x_ptr + row * stride_m + cols * stride_d
        x = tl.load(x_ptrs, mask=cols < D, other=0.0).to(tl.float32)
        tl.atomic_add(y_ptr + group * D + cols, x, mask=cols < D)  # defect


def empty_sum(x, group, weight):
    (M, D), G = x.shape, weight.numel()
    y = torch.empty((G, D), dtype=torch.float32, device=x.device)
    segment_sum_kernel[(M,)](x, group.contiguous(), y, *x.stride(), D, BLOCK=32)
    return (y * weight.detach().float()[:, None]).to(x.dtype)


def reference(x, group, weight):
    wide = x if x.dtype == torch.float64 else x.float()
    sums = torch.zeros(weight.numel(), x.shape[1], dtype=wide.dtype).index_add(0, group, wide)
    return (sums * weight.to(wide.dtype)[:, None]).to(x.dtype)
