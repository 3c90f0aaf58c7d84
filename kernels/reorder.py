"""Copies of images in another memory format: a transposition of channels and pixels.

C: channels, P: pixels of an image.
"""

import triton
import triton.language as tl

# both sides of a tile are whole lines of 16-bit numbers, whichever lies along memory
BLOCK_C = 64
BLOCK_P = 64


@triton.jit
def reorder_kernel(
    x_ptr, y_ptr,
    C, P,
    x_stride_n, x_stride_c, x_stride_p,
    y_stride_n, y_stride_c, y_stride_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, INDEX_64: tl.constexpr,
):
    """One program copies BLOCK_C channels of BLOCK_P pixels of one image."""
    index_type: tl.constexpr = tl.int64 if INDEX_64 else tl.int32
    pid = tl.program_id(0)
    num_c, num_p = tl.cdiv(C, BLOCK_C), tl.cdiv(P, BLOCK_P)
    n = (pid // (num_c * num_p)).to(tl.int64)
    c = (pid % num_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(index_type)[:, None]
    p = (pid // num_c % num_p * BLOCK_P + tl.arange(0, BLOCK_P)).to(index_type)[None, :]
    mask = (c < C) & (p < P)
    x = tl.load(x_ptr + n * x_stride_n + (c * x_stride_c + p * x_stride_p), mask=mask, other=0.0)
    tl.store(y_ptr + n * y_stride_n + (c * y_stride_c + p * y_stride_p), x, mask=mask)
