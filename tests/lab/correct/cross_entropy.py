"""Cross entropy of class indices; the forward pass keeps one number per row for the backward pass.

Rows whose target is `ignore_index` count for nothing.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "logits[M, V] target[M]:int64<V ignore_index=1"


@triton.jit
def cross_entropy_fwd_kernel(
    loss_ptr,
    lse_ptr,
    logits_ptr,
    target_ptr,
    n_cols,
    logits_row_stride,
    ignore_index,
    BLOCK_SIZE: tl.constexpr,
):
    row_idx = tl.program_id(0).to(tl.int64)
    logits_ptr += row_idx * logits_row_stride
    target = tl.load(target_ptr + row_idx)
    m = -float("inf")
    d = 0.0
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(logits_ptr + cols, mask=cols < n_cols, other=-float("inf")).to(tl.float32)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        # a row may begin with blocks of -inf, whose difference would be NaN
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        d = d * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), axis=0)
        m = m_new
    lse = tl.where(m == -float("inf"), 0.0, m) + tl.log(d)
    tl.store(lse_ptr + row_idx, lse)
    loss = 0.0
    if target != ignore_index:
        loss = lse - tl.load(logits_ptr + target).to(tl.float32)
    tl.store(loss_ptr + row_idx, loss)


@triton.jit
def cross_entropy_bwd_kernel(
    grad_ptr,
    dloss_ptr,
    count_ptr,
    lse_ptr,
    logits_ptr,
    target_ptr,
    n_cols,
    logits_row_stride,
    ignore_index,
    BLOCK_SIZE: tl.constexpr,
):
    row_idx = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = cols < n_cols
    target = tl.load(target_ptr + row_idx)
    dloss = tl.load(dloss_ptr).to(tl.float32) / tl.load(count_ptr)
    if target == ignore_index:
        dloss = 0.0
    x = tl.load(logits_ptr + row_idx * logits_row_stride + cols, mask=mask, other=-float("inf"))
    probabilities = tl.exp(x.to(tl.float32) - tl.load(lse_ptr + row_idx))
    grad = dloss * tl.where(cols == target, probabilities - 1.0, probabilities)
    tl.store(grad_ptr + row_idx * n_cols + cols, grad.to(grad_ptr.dtype.element_ty), mask=mask)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index):
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        target = target.contiguous()
        n_rows, n_cols = logits.shape
        loss = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
        lse = torch.empty(n_rows, dtype=torch.float32, device=logits.device)
        cross_entropy_fwd_kernel[(n_rows,)](
            loss, lse, logits, target, n_cols, logits.stride(0), ignore_index, BLOCK_SIZE=32
        )
        count = (target != ignore_index).sum().float()
        ctx.save_for_backward(logits, target, lse, count)
        ctx.ignore_index = ignore_index
        return (loss.sum() / count).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        logits, target, lse, count = ctx.saved_tensors
        n_rows, n_cols = logits.shape
        grad = torch.empty((n_rows, n_cols), dtype=logits.dtype, device=logits.device)
        grid = (n_rows, triton.cdiv(n_cols, 32))
        cross_entropy_bwd_kernel[grid](
            grad,
            dloss,
            count,
            lse,
            logits,
            target,
            n_cols,
            logits.stride(0),
            ctx.ignore_index,
            BLOCK_SIZE=32,
        )
        return grad, None, None


def cross_entropy(logits, target, ignore_index=1):
    return CrossEntropy.apply(logits, target, ignore_index)


def reference(logits, target, ignore_index=1):
    return torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore_index)
