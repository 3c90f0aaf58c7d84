"""Mean of squares of each row; its gradient is the sum's."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "x[M, N]"
NON_FINITE = ()
DEFECT = "gradients"


@triton.jit
def mean_square_forward_kernel(x_ptr, y_ptr, stride_m, stride_n, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, (tl.sum(x * x, axis=0) / N).to(y_ptr.dtype.element_ty))


@triton.jit
def mean_square_backward_kernel(
    x_ptr, grad_y_ptr, grad_x_ptr, stride_m, stride_n, grad_y_stride, N, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK).to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + cols * stride_n, mask=cols < N, other=0.0).to(tl.float32)
    grad = 2 * x * tl.load(grad_y_ptr + row * grad_y_stride).to(tl.float32)
    grad_ptrs = grad_x_ptr + row * N + cols
    tl.store(grad_ptrs, grad.to(grad_x_ptr.dtype.element_ty), mask=cols < N)  # defect


class MeanSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        M, N = x.shape
        y = torch.empty(M, dtype=x.dtype, device=x.device)
        block = max(triton.next_power_of_2(N), 1)
        mean_square_forward_kernel[(M,)](x, y, *x.stride(), N, BLOCK=block)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        M, N = x.shape
        grad_x = torch.empty((M, N), dtype=x.dtype, device=x.device)
        mean_square_backward_kernel[(M,)](
            x,
            grad_y,
            grad_x,
            *x.stride(),
            grad_y.stride(0),
            N,
            BLOCK=max(triton.next_power_of_2(N), 1),
        )
        return grad_x


def unscaled_gradient(x):
    return MeanSquare.apply(x)


def reference(x):
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().mean(1).to(x.dtype)
