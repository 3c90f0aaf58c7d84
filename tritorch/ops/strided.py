"""Views an elementwise call as one loop nest: merged dimensions, and strides of every tensor along
them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# dimensions that `strided_offsets` of kernels/tiles.py walks
RANK = 5
_INT32_MAX = 2**31 - 1


class Layout(NamedTuple):
    """What a launch needs to know of a tensor besides its address; hashable."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        # without the arguments of a constructor, which take longer than the rest
        return tuple.__new__(cls, (tensor.shape, tensor.stride(), tensor.itemsize))

    def stride(self, dim: int) -> int:
        """As a tensor's method of that name."""
        return self.strides[dim]


def dense(tensor: Layout) -> Layout:
    """The layout of a contiguous tensor of this shape."""
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
    return Layout(tensor.shape, tuple(strides), tensor.itemsize)


def are_alike(one: Layout, other: Layout) -> bool:
    """Whether every element lies as far from the first one in both; of one shape."""
    return all(
        size == 1 or stride == expected
        for size, stride, expected in zip(one.shape, one.strides, other.strides, strict=True)
    )


class Nest(NamedTuple):
    """Sizes and strides (elements) of tensors of one shape, outermost first; padded with size 1 at
    the end.
    """

    numel: int
    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    # an index or an offset passes int32
    wide: bool


def declined(input: Tensor, inplace: bool) -> str | None:
    """Why the kernels of an elementwise op do not take this input, which they may have to write."""
    if input.dim() > RANK:
        return f"{input.dim()} dimensions"
    # torch writes no negated view through a library op; a compiled program copies the result to it
    if inplace and not torch.compiler.is_compiling() and input.is_neg():
        return "a negated view in place"
    return None


def nest(op: str, *tensors: Tensor) -> Nest:
    """The loop nest over tensors of one shape; ordered and merged so that the first one is walked
    along memory.

    Raises:
        NotImplementedError: more than `RANK` dimensions are left after merging.
    """
    return nest_of(op, tensors[0].shape, *(tensor.stride() for tensor in tensors))


@functools.lru_cache(maxsize=4096)
def nest_of(op: str, shape: tuple[int, ...], *along: tuple[int, ...]) -> Nest:
    """The same of one shape and the strides of each tensor."""
    # outermost = largest stride of the tensors, in their order: the last ones are written, and
    # decide ties
    order = sorted(
        (dim for dim, size in enumerate(shape) if size != 1),
        key=lambda dim: tuple(-stride[dim] for stride in reversed(along)),
    )
    return _merged(op, shape, order, along)


@functools.lru_cache(maxsize=4096)
def nest_in_order(op: str, shape: tuple[int, ...], *along: tuple[int, ...]) -> Nest:
    """The same with the dimensions in their own order: its indices count elements of the shape."""
    order = [dim for dim, size in enumerate(shape) if size != 1]
    return _merged(op, shape, order, along)


def _merged(
    op: str, shape: tuple[int, ...], order: Sequence[int], along: Sequence[tuple[int, ...]]
) -> Nest:
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in along]
    for dim in order:
        size = shape[dim]
        here = [stride[dim] for stride in along]
        if sizes and all(
            merged[-1] == stride * size for merged, stride in zip(strides, here, strict=True)
        ):
            sizes[-1] *= size
            for merged, stride in zip(strides, here, strict=True):
                merged[-1] = stride
        else:
            sizes.append(size)
            for merged, stride in zip(strides, here, strict=True):
                merged.append(stride)
    if len(sizes) > RANK:
        raise NotImplementedError(
            f"{op}: tensors of shape {tuple(shape)} walk {len(sizes)} separate strides, "
            f"the kernels take {RANK}"
        )
    numel = math.prod(shape)
    wide = numel > _INT32_MAX or any(is_wide(sizes, merged) for merged in strides)
    padding = RANK - len(sizes)
    return Nest(
        numel,
        tuple(sizes) + (1,) * padding,
        tuple(tuple(merged) + (0,) * padding for merged in strides),
        wide,
    )


def is_wide(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the last element's offset passes int32."""
    extent = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return extent > _INT32_MAX


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialised result of an elementwise op: dense, in the tensor's order of dimensions, as
    torch makes it.
    """
    return torch.empty_like(tensor, memory_format=torch.preserve_format)
