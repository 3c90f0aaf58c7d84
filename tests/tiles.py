"""Kernels for the tests of launches, of what the compiler makes of descriptors, and of functions
that other kernels call.
"""

import triton
import triton.language as tl

from tritorch.kernels.conv_tma import _reaching


@triton.jit
def copy_tile_kernel(x_desc, y_desc, row):
    y_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def product_kernel(x_desc, y_desc, steps, S, TOLD: tl.constexpr):
    """Sums products of tiles over a loop that does not say that it runs."""
    if TOLD:
        tl.assume(steps * S > 0)
    acc = tl.zeros((128, 128), dtype=tl.float32)
    for step in range(steps * S):
        a = x_desc.load([step // S, step % S])
        acc = tl.dot(a, a.T, acc)
    y_desc.store([0, 0], acc.to(y_desc.dtype))


@triton.jit
def reaching_kernel(y_ptr, first, last, size, step, taps, TRANSPOSED: tl.constexpr):
    before, count = _reaching(first, last, size, step, taps, TRANSPOSED)
    tl.store(y_ptr, before)
    tl.store(y_ptr + 1, count)
