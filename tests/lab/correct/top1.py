"""The largest value of each row and where it comes first; NaN is larger than any number."""

import torch
import triton
import triton.language as tl

INPUTS = "x[M, N]"


@triton.jit
def top1_kernel(
    x_ptr,
    value_ptr,
    index_ptr,
    stride_m,
    stride_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    mask_m = rows < M
    best = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    best_index = tl.zeros((BLOCK_M,), tl.int64)
    found_nan = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, N, BLOCK_N):
        cols = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = mask_m[:, None] & (cols < N)[None, :]
        x_ptrs = x_ptr + rows[:, None] * stride_m + cols[None, :] * stride_n
        x = tl.load(x_ptrs, mask=mask, other=-float("inf")).to(tl.float32)
        # of NaN the first one counts, and nothing after it
        is_nan = (x != x).to(tl.int32)
        any_nan = tl.max(is_nan, axis=1)
        first_nan = start + tl.argmax(is_nan, axis=1, tie_break_left=True).to(tl.int64)
        number = tl.where(x != x, -float("inf"), x)
        largest = tl.max(number, axis=1)
        first = start + tl.argmax(number, axis=1, tie_break_left=True).to(tl.int64)
        new_nan = (found_nan == 0) & (any_nan == 1)
        larger = (found_nan == 0) & (any_nan == 0) & (largest > best)
        best_index = tl.where(new_nan, first_nan, tl.where(larger, first, best_index))
        best = tl.maximum(best, largest)
        found_nan |= any_nan
    best = tl.where(found_nan == 1, float("nan"), best)
    tl.store(value_ptr + rows, best.to(value_ptr.dtype.element_ty), mask=mask_m)
    tl.store(index_ptr + rows, best_index, mask=mask_m)


def top1(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    M, N = x.shape
    if N == 0:
        raise IndexError("top1: expects rows with at least one element")
    values = torch.empty(M, dtype=x.dtype, device=x.device)
    indices = torch.empty(M, dtype=torch.int64, device=x.device)
    top1_kernel[(triton.cdiv(M, 8),)](x, values, indices, *x.stride(), M, N, BLOCK_M=8, BLOCK_N=128)
    return values, indices


def reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = torch.max(x, dim=-1)
    return values, indices
