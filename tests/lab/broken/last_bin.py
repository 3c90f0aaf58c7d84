"""Counts values in [0, 1] in eight bins; the value 1 opens a ninth."""

import torch
import triton
import triton.language as tl

INPUTS = "x[N]"
NON_FINITE = ()
BINS = 8
DEFECT = "out-of-bounds atomic"


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, stride, N, BINS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < N, other=0.0).to(tl.float32)
    bins = (tl.clamp(x, 0.0, 1.0) * BINS).to(tl.int32)
    ones = tl.full((BLOCK,), 1, tl.int32)
    tl.atomic_add(counts_ptr + bins, ones, mask=offs < N)  # defect


def last_bin(x):
    N = x.numel()
    counts = torch.zeros(BINS, dtype=torch.int32, device=x.device)
    histogram_kernel[(triton.cdiv(N, 128),)](x, counts, x.stride(0), N, BINS, BLOCK=128)
    return counts


def reference(x):
    bins = (x.clamp(0, 1) * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(bins, minlength=BINS).to(torch.int32)
