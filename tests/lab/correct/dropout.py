"""Dropout that keeps no mask: the backward pass draws the same random numbers again."""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

INPUTS = "x[N] p=0.5 seed=1234"


@triton.jit
def seeded_dropout_kernel(x_ptr, output_ptr, n_elements, p, seed, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    keep = tl.rand(seed, offsets) > p
    output = tl.where(keep, x / (1 - p), 0.0)
    tl.store(output_ptr + offsets, output.to(x.dtype), mask=mask)


def apply_dropout(x, p, seed):
    x = x.contiguous()
    output = torch.empty_like(x)
    n = x.numel()
    seeded_dropout_kernel[(triton.cdiv(n, 256),)](x, output, n, p, seed, BLOCK_SIZE=256)
    return output


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return apply_dropout(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return apply_dropout(grad_output, ctx.p, ctx.seed), None, None


def dropout(x, p=0.5, seed=1234):
    return Dropout.apply(x, p, seed)


def philox(seed: int, offsets: torch.Tensor) -> torch.Tensor:
    """The first 32 bits of Philox-4x32-10 for each counter, Salmon et al., SC 2011."""
    low = 0xFFFFFFFF
    c = [offsets & low, offsets >> 32, torch.zeros_like(offsets), torch.zeros_like(offsets)]
    k0, k1 = seed & low, seed >> 32 & low

    def product(x, factor):
        # in halves: int64 holds no product of two 32-bit numbers
        lower, upper = x * (factor & 0xFFFF), x * (factor >> 16)
        middle = upper + (lower >> 16)
        return middle >> 16, (middle << 16 | lower & 0xFFFF) & low

    for _ in range(10):
        high0, low0 = product(c[0], 0xD2511F53)
        high2, low2 = product(c[2], 0xCD9E8D57)
        c = [high2 ^ c[1] ^ k0, low2, high0 ^ c[3] ^ k1, low0]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c[0]


def reference(x, p=0.5, seed=1234):
    bits = philox(seed, torch.arange(x.numel(), device=x.device))
    signed = torch.where(bits >= 2**31, bits - 2**32, bits)
    uniform = torch.where(signed < 0, -signed - 1, signed).float() * 4.6566127342e-10
    return torch.where(uniform > p, x / (1 - p), torch.zeros_like(x))
