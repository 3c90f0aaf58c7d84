"""Space-to-depth of images with few channels: two by two pixels become one that descriptors take.

Letters are those of conv.py.
"""

import triton
import triton.language as tl

from tritorch.kernels.pixels import inside

# channels of a packed pixel: two rows, two columns, four channels
PACKED = 16
# packed pixels per program
BLOCK = 256


@triton.jit
def pack_pixels_kernel(
    x_ptr, y_ptr,
    NUMEL, C, H, W, ROWS, COLUMNS, padding_h, padding_w,
    stride_n, stride_c, stride_h, stride_w,
    INDEX_64: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program packs BLOCK of the NUMEL pixels (n, ROWS, COLUMNS): row i holds the rows
    2 * i - padding_h and the one after it, zeros where the image has none.
    """
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, PACKED)
    n = pixel // (ROWS * COLUMNS)
    h = (2 * (pixel // COLUMNS % ROWS) - padding_h)[:, None] + (channel // 8)[None, :]
    w = (2 * (pixel % COLUMNS) - padding_w)[:, None] + (channel // 4 % 2)[None, :]
    c = (channel % 4)[None, :]
    image = x_ptr + n.to(tl.int64) * stride_n
    mask = inside(h, H) & inside(w, W) & (c < C) & (pixel < NUMEL)[:, None]
    if INDEX_64:
        h = h.to(tl.int64)
        w = w.to(tl.int64)
        c = c.to(tl.int64)
    x = tl.load(image[:, None] + (h * stride_h + w * stride_w + c * stride_c), mask=mask, other=0.0)
    rows = pixel.to(tl.int64)[:, None] * PACKED
    tl.store(y_ptr + (rows + channel[None, :]), x, mask=(pixel < NUMEL)[:, None])
