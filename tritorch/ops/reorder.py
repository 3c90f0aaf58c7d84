"""Copies of images and matrices into the memory format that a kernel is fast with.

Kernels are several times as fast where the channels of a pixel are contiguous as where they gather
them; with enough products for each number a copy costs less than that.  In float32, Hopper's tensor
cores need operands that are contiguous along the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tritorch import launch
from tritorch.ops.strided import Layout, is_wide

kernels = launch.kernels("reorder")

# products for each number copied for a copy to pay: a 3x3 filter of 16 channels has just enough.
# Gradients of filters in TF32 need more, since the portable kernel computes them in either order
MIN_PRODUCTS = 64
MIN_OF_FILTERS = 512


def channels_last(images: Layout) -> Layout:
    """Itself where the channels of a pixel are beside each other, else a dense copy's layout."""
    if images.stride(1) == 1:
        return images
    c, *axes = images.shape[1:]
    steps = [math.prod(axes[dim + 1 :]) * c for dim in range(len(axes))]
    return Layout(tuple(images.shape), (math.prod(axes) * c, 1, *steps), images.itemsize)


def pays(products: int, precision: str, *images: Layout, least: int = MIN_PRODUCTS) -> bool:
    """Whether some of the images are to be copied, for so many products: where the kernel finds a
    pixel after the other, and products are those of tensor cores, of 16-bit numbers or TF32's.
    """
    copied = [one for one in images if one.stride(1) != 1]
    return (
        bool(copied)
        and all(_over_pixels(one) is not None for one in copied)
        and (copied[0].itemsize == 2 or (copied[0].itemsize == 4 and precision == "tf32"))
        and products > least * sum(math.prod(one.shape) for one in copied)
    )


def _over_pixels(images: Layout) -> int | None:
    """The stride from a pixel to the next one, of all axes as one; None if they are not."""
    stride, expected = 1, None
    for size, step in zip(images.shape[:1:-1], images.strides[:1:-1], strict=True):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = size * step
    return stride


def convolve(run: Callable[..., None], x: Tensor, *given: Any) -> None:
    """`results` of a kernel that takes x in channels_last alone, too."""
    results(run, _copied(x), *given)


def results(
    run: Callable[..., None],
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    moments: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """`run` of a residual in channels_last into such memory, and from there into y and
    `preactivation`.
    """
    into = _like(y)
    kept = None if preactivation is None else _like(preactivation)
    added = None if residual is None else _copied(residual)
    run(x, weight, into, bias, activation, kept, moments, added)
    for target, written in ((y, into), (preactivation, kept)):
        if target is not None and written is not None and target is not written:
            _copy(written, target)


def grad_weight(
    run: Callable[..., Tensor | None], grad_output: Tensor, input: Tensor, output: Tensor
) -> Tensor | None:
    """`run` of channels_last images, with copies of those that are not."""
    return of_grads(run, grad_output, _copied(input), output)


def of_grads(
    run: Callable[..., Tensor | None], grad_output: Tensor, input: Tensor, output: Tensor
) -> Tensor | None:
    """The same of a kernel that takes its input in any order."""
    return run(_copied(grad_output), input, output)


def _like(images: Tensor) -> Tensor:
    """Itself where it is in the order, else memory for it."""
    if images.stride(1) == 1:
        return images
    _, strides, _ = channels_last(Layout.of(images))
    return images.new_empty_strided(images.shape, strides)


def columns_first(matrices: Tensor) -> Tensor:
    """A copy of a matrix, or of a batch of them, in which a column's elements are neighbours."""
    copy = matrices.new_empty((*matrices.shape[:-2], *matrices.shape[:-3:-1])).mT
    batches = (matrices, copy) if matrices.dim() > 2 else (matrices[None], copy[None])
    _copy(*batches)
    return copy


def _copied(images: Tensor) -> Tensor:
    copy = _like(images)
    if copy is not images:
        _copy(images, copy)
    return copy


def _copy(x: Tensor, y: Tensor) -> None:
    _plan(Layout.of(x), Layout.of(y))(x, x, y)


@launch.planned
def _plan(x: Layout, y: Layout) -> launch.Prepared:
    n, c, *axes = x.shape
    pixels = math.prod(axes)
    strides: Any = [(one.strides[0], one.strides[1], _over_pixels(one)) for one in (x, y)]
    return launch.Prepared(
        kernels.reorder_kernel,
        (n * math.ceil(c / kernels.BLOCK_C) * math.ceil(pixels / kernels.BLOCK_P),),
        (c, pixels, *strides[0], *strides[1]),
        BLOCK_C=kernels.BLOCK_C,
        BLOCK_P=kernels.BLOCK_P,
        # the last tiles pass the end
        INDEX_64=any(
            is_wide((c + kernels.BLOCK_C, pixels + kernels.BLOCK_P), along[1:]) for along in strides
        ),
    )
