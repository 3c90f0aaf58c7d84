"""A product of matrices in any number of configurations, for the tests of limits of GPUs."""

from __future__ import annotations

import inspect

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def square_kernel(
    a_ptr, b_ptr, c_ptr, K, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, P: tl.constexpr
):
    offs, offs_k = tl.arange(0, SIZE), tl.arange(0, BLOCK_K)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs[:, None] * K + (k + offs_k)[None, :])
        b = tl.load(b_ptr + (k + offs_k)[:, None] * SIZE + offs[None, :])
        acc = product(a, b, acc, P)
    tl.store(c_ptr + offs[:, None] * SIZE + offs[None, :], acc.to(c_ptr.dtype.element_ty))


def autotuned(*configs):
    """`square_kernel` tuned over (SIZE, BLOCK_K, num_warps, num_stages)."""
    listed = [
        triton.Config({"SIZE": size, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for size, k, warps, stages in configs
    ]
    return triton.autotune(listed, key=["K"])(square_kernel)


def square(kernel=square_kernel, dtype=torch.float16, precision="ieee", **options):
    a, b, c = (torch.empty(1 << 16, dtype=dtype, device="cuda") for _ in range(3))
    kernel[(1,)](a, b, c, 256, P=precision, **options)
    return c


def line_of(function, text):
    lines, first = inspect.getsourcelines(getattr(function, "fn", function))
    return next(first + number for number, line in enumerate(lines) if text in line)
