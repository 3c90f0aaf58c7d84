"""Negative log-likelihood of class indices: one element of each row, and its gradient."""

import triton
import triton.language as tl

from tritorch.kernels.cross_entropy import load_classes
from tritorch.kernels.tiles import strided_offsets

# rows per program: two per thread with 4 warps, since the elements that rows read are scattered
BLOCK = 256


@triton.jit
def nll_loss_forward_kernel(
    x_ptr, y_ptr, weight_ptr, denominator_ptr, loss_ptr,
    N, C, size_1, size_2, size_3, size_4,
    x_stride_c, x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    weight_stride, ignore_index,
    REDUCED: tl.constexpr, INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes the losses of BLOCK rows, or (REDUCED) their sum and the weights'.

    The denominator, if there is one, divides each loss.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    n = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    x_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    y, ignored, weight = load_classes(
        y_ptr, weight_ptr, y_rows, mask, C, ignore_index, weight_stride, ACC)
    offsets = x_rows + y.to(x_rows.dtype) * x_stride_c
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(ACC)
    loss = tl.where(ignored, 0.0, -weight * x)
    if REDUCED:
        tl.store(loss_ptr + pid, tl.sum(loss))
        tl.store(loss_ptr + tl.num_programs(0) + pid, tl.sum(weight))
    else:
        if denominator_ptr is not None:
            loss = tl.where(ignored, 0.0, loss / tl.load(denominator_ptr))
        tl.store(loss_ptr + n, loss.to(loss_ptr.dtype.element_ty), mask=mask)


@triton.jit
def nll_loss_backward_kernel(
    y_ptr, weight_ptr, grad_loss_ptr, denominator_ptr, grad_ptr,
    N, C, size_1, size_2, size_3, size_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    grad_loss_stride_0, grad_loss_stride_1, grad_loss_stride_2,
    grad_loss_stride_3, grad_loss_stride_4,
    grad_stride_c, grad_stride_0, grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4,
    weight_stride, ignore_index,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program writes the gradients of the target classes of BLOCK rows into zeros."""
    ACC: tl.constexpr = tl.float64 if grad_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    n = (pid.to(tl.int64) if INDEX_64 else pid) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    y_rows = strided_offsets(n, size_1, size_2, size_3, size_4,
                             y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    grad_loss_rows = strided_offsets(
        n, size_1, size_2, size_3, size_4, grad_loss_stride_0,
        grad_loss_stride_1, grad_loss_stride_2, grad_loss_stride_3, grad_loss_stride_4)
    grad_rows = strided_offsets(n, size_1, size_2, size_3, size_4, grad_stride_0,
                                grad_stride_1, grad_stride_2, grad_stride_3, grad_stride_4)
    y, ignored, weight = load_classes(
        y_ptr, weight_ptr, y_rows, mask, C, ignore_index, weight_stride, ACC)
    grad = -weight * tl.load(grad_loss_ptr + grad_loss_rows, mask=mask, other=0.0).to(ACC)
    if denominator_ptr is not None:
        grad = grad / tl.load(denominator_ptr)
    offsets = grad_rows + y.to(grad_rows.dtype) * grad_stride_c
    # the class that is ignored need not be one of the row's
    tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask=mask & (ignored == 0))
