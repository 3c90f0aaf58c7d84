"""Kernels on descriptors, for the tests of launches and of what the compiler makes of them."""

import triton
import triton.language as tl


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
