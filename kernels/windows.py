"""Pooling windows: how many overlap a pixel, what they cover, what their sums are divided by."""

import triton
import triton.language as tl

# windows whose gradients and taps a backward kernel of max pooling may hold in registers
MAX_WINDOWS = 9
# (window, pixel of a cell) pairs that it may unroll
MAX_MEETINGS = 36
# taps whose loads are issued before the first of them is needed
MAX_UNROLL = 16


def unrolled_taps(*window):
    """Taps of a window that are unrolled: all, a row of a large window, one of a huge one."""
    taps = 1
    for extent in reversed(window):
        if taps * extent > MAX_UNROLL:
            break
        taps *= extent
    return taps


def windows_per_cell(kernel_size, stride, dilation):
    """Windows along one axis that reach into a stretch of `stride` pixels."""
    return ((kernel_size - 1) * dilation + stride) // stride


def holds_windows(r, s, stride_h, stride_w, dilation_h, dilation_w):
    """Whether few enough windows reach into a cell for `max_pool2d_backward_kernel`."""
    windows = windows_per_cell(r, stride_h, dilation_h) * windows_per_cell(s, stride_w, dilation_w)
    return are_held(windows, stride_h * stride_w)


def are_held(windows, pixels):
    """Whether so many windows over a cell of so many pixels fit into registers."""
    return windows <= MAX_WINDOWS and windows * pixels <= MAX_MEETINGS


@triton.jit
def adaptive_start(index, size, count):
    """Where the window number `index` of `count` starts; with both swapped, the first window that
    contains the pixel number `index`.
    """
    return index * size // count


@triton.jit
def adaptive_end(index, size, count):
    """One after the last pixel of that window, or after the last window of that pixel."""
    return (index * size + size + count - 1) // count


@triton.jit
def window_extent(start, size, extent, padding, COUNT_INCLUDE_PAD: tl.constexpr):
    """Pixels along one axis that count for the mean of the window at `start`."""
    # a window that reaches beyond the padding is cut off there in any case
    if COUNT_INCLUDE_PAD:
        return tl.minimum(extent, size + padding - start)
    return tl.minimum(start + extent, size) - tl.maximum(start, 0)


@triton.jit
def window_divisors(h, w, H, W, R, S, padding_h, padding_w, divisor,
                    COUNT_INCLUDE_PAD: tl.constexpr, HAS_DIVISOR: tl.constexpr):
    """What the sum over the window that starts at row h and column w is divided by."""
    if HAS_DIVISOR:
        return tl.zeros_like(h) + divisor
    rows = window_extent(h, H, R, padding_h, COUNT_INCLUDE_PAD)
    return rows * window_extent(w, W, S, padding_w, COUNT_INCLUDE_PAD)
