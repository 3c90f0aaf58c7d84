"""Root-mean-square normalisation; each program of the backward pass sums its rows' weight gradient
into a row of its own, and torch adds these up.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "x[M, N] weight[N] eps=1e-6"


@triton.jit
def _rms_norm_forward_kernel(
    Y_ptr, X_ptr, X_row_stride, W_ptr, RSTD_ptr, n_cols, eps, BLOCK_SIZE: tl.constexpr
):
    row_idx = tl.program_id(0).to(tl.int64)
    col_offsets = tl.arange(0, BLOCK_SIZE)
    mask = col_offsets < n_cols
    x = tl.load(X_ptr + row_idx * X_row_stride + col_offsets, mask=mask, other=0).to(tl.float32)
    w = tl.load(W_ptr + col_offsets, mask=mask, other=0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n_cols + eps)
    tl.store(RSTD_ptr + row_idx, rstd)
    y = x * rstd * w
    tl.store(Y_ptr + row_idx * n_cols + col_offsets, y.to(Y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    dY_ptr,
    dX_ptr,
    X_ptr,
    X_row_stride,
    W_ptr,
    RSTD_ptr,
    dW_ptr,
    n_rows,
    n_cols,
    rows_per_program,
    BLOCK_SIZE: tl.constexpr,
):
    row_block = tl.program_id(0).to(tl.int64)
    row_start = row_block * rows_per_program
    row_end = tl.minimum(row_start + rows_per_program, n_rows)
    col_offsets = tl.arange(0, BLOCK_SIZE)
    mask = col_offsets < n_cols
    w = tl.load(W_ptr + col_offsets, mask=mask, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_SIZE,), dtype=tl.float32)
    for row in range(row_start, row_end):
        row_idx = tl.cast(row, tl.int64)
        dy = tl.load(dY_ptr + row_idx * n_cols + col_offsets, mask=mask, other=0.0)
        x = tl.load(X_ptr + row_idx * X_row_stride + col_offsets, mask=mask, other=0.0)
        dy, x = dy.to(tl.float32), x.to(tl.float32)
        rstd = tl.load(RSTD_ptr + row_idx)
        m = dy * w
        dot = tl.sum(m * x, axis=0)
        dx = rstd * m - rstd * rstd * rstd * (dot / n_cols) * x
        dw += dy * x * rstd
        dx_ptrs = dX_ptr + row_idx * n_cols + col_offsets
        tl.store(dx_ptrs, dx.to(dX_ptr.dtype.element_ty), mask=mask)
    tl.store(dW_ptr + row_block * n_cols + col_offsets, dw, mask=mask)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        x = x if x.stride(-1) == 1 else x.contiguous()
        weight = weight.contiguous()
        n_rows, n_cols = x.shape
        y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
        rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
        if y.numel():
            _rms_norm_forward_kernel[(n_rows,)](
                y,
                x,
                x.stride(0),
                weight,
                rstd,
                n_cols,
                eps,
                BLOCK_SIZE=triton.next_power_of_2(n_cols),
            )
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        dy = dy.contiguous()
        n_rows, n_cols = x.shape
        dx = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
        if not dx.numel():
            return dx, torch.zeros_like(weight), None
        rows_per_program = triton.cdiv(n_rows, 3)
        num_programs = triton.cdiv(n_rows, rows_per_program)
        dw = torch.empty((num_programs, n_cols), dtype=torch.float32, device=x.device)
        _rms_norm_backward_kernel[(num_programs,)](
            dy,
            dx,
            x,
            x.stride(0),
            weight,
            rstd,
            dw,
            n_rows,
            n_cols,
            rows_per_program,
            BLOCK_SIZE=triton.next_power_of_2(n_cols),
        )
        return dx, dw.sum(dim=0).to(weight.dtype), None


def rms_norm(x, weight, eps=1e-6):
    return RMSNorm.apply(x, weight, eps)


def reference(x, weight, eps=1e-6):
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)
