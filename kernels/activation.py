"""Elementwise activations, forward and backward, over dense or strided tensors."""

import triton
import triton.language as tl

from tritorch.kernels.tiles import strided_offsets

# elements per program: 8 per thread with 4 warps, one 128-bit access of a 16-bit type
BLOCK = 1024


@triton.jit
def relu_forward_kernel(
    x_ptr, y_ptr,
    NUMEL,
    size_1, size_2, size_3, size_4,
    x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK consecutive elements of the loop nest over x and y."""
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    x_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                x_stride_0, x_stride_1, x_stride_2, x_stride_3, x_stride_4)
    y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0)
    # false for NaN and for -0.0: both pass, as in torch; a maximum would drop NaN on a GPU
    y = tl.where(x < 0, tl.zeros_like(x), x)
    tl.store(y_ptr + y_offsets, y, mask=mask)


@triton.jit
def relu_backward_kernel(
    grad_y_ptr, y_ptr, grad_x_ptr,
    NUMEL,
    size_1, size_2, size_3, size_4,
    grad_y_stride_0, grad_y_stride_1, grad_y_stride_2, grad_y_stride_3, grad_y_stride_4,
    y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4,
    grad_x_stride_0, grad_x_stride_1, grad_x_stride_2, grad_x_stride_3, grad_x_stride_4,
    INDEX_64: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program computes BLOCK consecutive elements of the gradient from the output y of the
    forward pass.
    """
    pid = tl.program_id(0)
    if INDEX_64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    mask = index < NUMEL
    grad_y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                     grad_y_stride_0, grad_y_stride_1, grad_y_stride_2,
                                     grad_y_stride_3, grad_y_stride_4)
    y_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                y_stride_0, y_stride_1, y_stride_2, y_stride_3, y_stride_4)
    grad_x_offsets = strided_offsets(index, size_1, size_2, size_3, size_4,
                                     grad_x_stride_0, grad_x_stride_1, grad_x_stride_2,
                                     grad_x_stride_3, grad_x_stride_4)
    grad_y = tl.load(grad_y_ptr + grad_y_offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + y_offsets, mask=mask, other=0.0)
    # torch passes the gradient where y is NaN
    grad_x = tl.where(y <= 0, tl.zeros_like(grad_y), grad_y)
    tl.store(grad_x_ptr + grad_x_offsets, grad_x, mask=mask)
