"""An activation whose gradient passes its test: the gradient that comes in is contiguous there.

`y.sum().backward()` hands the backward pass one number, expanded by strides of zero to the shape of
y.  The kernel reads it as if it were laid out like x: beyond its end.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "x[N]"


@triton.jit
def silu_forward_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (x * tl.sigmoid(x)).to(y_ptr.dtype.element_ty), mask=offs < N)


@triton.jit
def silu_backward_kernel(x_ptr, grad_y_ptr, grad_x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(x)
    grad_x = grad_y * s * (1 + x * (1 - s))
    tl.store(grad_x_ptr + offs, grad_x.to(grad_x_ptr.dtype.element_ty), mask=offs < N)


class SiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y = torch.empty_like(x)
        silu_forward_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), BLOCK=256)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grid = (triton.cdiv(x.numel(), 256),)
        silu_backward_kernel[grid](x, grad_y, grad_x, x.numel(), BLOCK=256)
        return grad_x


def silu(x: torch.Tensor) -> torch.Tensor:
    return SiLU.apply(x)


def reference(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x)


def naive_test(device: str = "cpu") -> None:
    x = torch.randn(1024, device=device, requires_grad=True)
    grad_y = torch.randn(1024, device=device)
    torch.testing.assert_close(silu(x), reference(x), atol=1e-2, rtol=0)
    (actual,) = torch.autograd.grad(silu(x), x, grad_y)
    (expected,) = torch.autograd.grad(reference(x), x, grad_y)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=0)


if __name__ == "__main__":
    naive_test()
