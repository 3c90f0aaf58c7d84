"""Descriptors of tensors for the tensor memory accelerator: of which there are any, and how."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class View(NamedTuple):
    """What a descriptor says of a tensor but where it is, outermost dimension first."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    # of one copy
    block: tuple[int, ...]
    # whether the last two dimensions are not in the kernel's order
    transposed: bool = False

    def at(self, tensor: Tensor) -> Any:
        """The descriptor of what begins where the tensor does."""
        return descriptor(tensor, self.shape, self.strides, self.block)

    def is_describable(self, itemsize: int) -> bool:
        """Whether there is one, of elements of so many bytes that begin on 16."""
        # an expanded tensor has a stride of 0, which the hardware does not take
        return all(self.strides) and describable(0, self.shape, self.strides, itemsize)


def descriptor(
    base: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> Any:
    """A `TensorDescriptor` of what begins where `base` does, in elements, outermost first.

    The caller has made sure of what a launch requires (`describable`), because Triton's own checks
    take longer than the launch.
    """
    described = object.__new__(_descriptor_class())
    described.base = base
    # tuples, as keys of what is remembered
    described.shape = tuple(shape)
    described.strides = tuple(strides)
    described.block_shape = tuple(block)
    described.padding = "zero"
    return described


@functools.cache
def _descriptor_class() -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor


def describable(address: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Whether the tensor memory accelerator takes a tensor at this address: 1 to 5 dimensions,
    none empty and none of 2**32 elements or more, the last one contiguous, everything else on 16
    bytes and below 2**40.
    """
    return (
        0 < len(shape) <= 5
        and address % 16 == 0
        and strides[-1] == 1
        and all(0 < size < 2**32 for size in shape)
        and all(
            stride * itemsize % 16 == 0 and 0 <= stride * itemsize < 2**40
            for stride in strides[:-1]
        )
    )
