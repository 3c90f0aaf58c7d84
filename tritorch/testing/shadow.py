"""What the detectors know of memory: which bytes belong to which argument, and who touched them.

`Extent` is the memory that one argument of a launch may use.  `Storage` is the shadow of one torch
storage: per element the last program that wrote it and the last that read it.
"""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tritorch.testing.places import Place

Array = npt.NDArray[Any]

# a membership map of a strided view is a byte per element: beyond this, bounds alone are checked
_LARGEST_MAP = 2**27
# fresh memory beyond this is not filled, so that nothing is known of it
_LARGEST_FRESH = 2**28
# numpy asks for memory that the machine may not have beyond this
_LARGEST_ALLOCATION = 2**27

# what fresh memory holds, by the width of an element in bytes: NaN in every floating-point type,
# and a large odd number in every integer type
_CANARIES = {
    1: np.uint8(0x7F),
    2: np.uint16(0x7FC5),
    4: np.uint32(0x7FC5A5C5),
    8: np.uint64(0x7FF8A5C5A5C5A5C5),
}


class Extent:
    """The bytes that belong to one tensor: those of its view, or all of its storage.

    `name`: the argument's.  `shape`: of the view.  `gaps`: whether bytes between its first and its
    last element belong to no element.
    """

    def __init__(self, name: str, tensor: Tensor, *, whole_storage: bool = False) -> None:
        storage = tensor.untyped_storage()
        self.name = name
        self.shape = tuple(tensor.shape)
        self.itemsize = tensor.element_size()
        # of an inference tensor torch does not count the changes
        self.version = None if tensor.is_inference() else tensor._version
        self.storage_key = storage._cdata
        self._dims: list[tuple[int, int]] = []
        self._map: Array | None = None
        if whole_storage:
            self.base, self.nbytes = storage.data_ptr(), storage.nbytes()
            self.gaps = False
        else:
            self.base = tensor.data_ptr()
            self._dims = _merged(self.shape, tensor.stride())
            reach = 1 + sum((size - 1) * stride for stride, size in self._dims)
            self.nbytes = reach * self.itemsize if tensor.numel() else 0
            self.gaps = self.nbytes > 0 and self._has_gaps(reach)

    def outside(self, addresses: Array, size: int) -> Array:
        """For each address whether `size` bytes there are not all the tensor's."""
        offsets = addresses - np.uint64(self.base)
        # an address before the base wraps around to a large offset
        bad: Array = offsets > np.uint64(max(self.nbytes - size, 0))
        if self.nbytes < size:
            bad = np.ones_like(bad)
        if self.gaps:
            kept = ~bad
            first = offsets[kept].astype(np.int64)
            known = self._members(first // self.itemsize)
            if size > self.itemsize or (first % self.itemsize).any():
                known &= self._members((first + size - 1) // self.itemsize)
            bad[kept] = ~known
        return bad

    def _has_gaps(self, reach: int) -> bool:
        if not self._dims or (len(self._dims) == 1 and self._dims[0][0] == 1):
            return False
        lower = 1
        nested = True
        for stride, size in self._dims:
            nested &= stride >= lower
            lower += (size - 1) * stride
        if nested:
            return True
        self._dims.reverse()
        if reach > _LARGEST_MAP:
            return False
        # elements overlap: no arithmetic tells which offsets are taken
        self._map = np.zeros(reach, np.bool_)
        strides, sizes = zip(*self._dims, strict=True)
        np.lib.stride_tricks.as_strided(self._map, sizes, strides)[...] = True
        return not self._map.all()

    def _members(self, elements: Array) -> Array:
        if self._map is not None:
            return self._map[elements]
        known = np.ones(elements.shape, np.bool_)
        for stride, size in reversed(self._dims):
            index = elements // stride
            known &= index < size
            elements = elements - index * stride
        known &= elements == 0
        return known


def _merged(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(stride, size) of the axes that matter, ascending, with those merged that follow up."""
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size <= 1 or stride == 0:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return merged


class Storage:
    """The shadow of one torch storage.

    `writer` and `reader` hold per element a code of the last access, zero for none, and are made
    when the first access comes; the codes are the detectors', and ascend with time.  `canary`: what
    memory is filled with that torch gave without values; None for other memory.
    """

    def __init__(
        self, storage: torch.UntypedStorage, itemsize: int, canary: Array | None = None
    ) -> None:
        self.weak = StorageWeakRef(storage)
        self.start = storage.data_ptr()
        self.nbytes = storage.nbytes()
        # the width in bytes of what the shadow calls an element
        self.granule = itemsize
        self._canary = canary
        self.writer: Array | None = None
        self.reader: Array | None = None
        # the latest codes of all, so that most accesses need no look at the elements
        self.last_write = 0
        self.last_read = 0
        # (kernel, argument) of the launches that got it, and the line of one that stores to it, or
        # else of the kernel
        self.passed: dict[tuple[str, str], None] = {}
        self.stored: Place | None = None
        # by the line of a store: (kernel, argument)
        self.stores: dict[Place, tuple[str, str]] = {}
        if canary is not None:
            self.memory()[...] = canary

    def memory(self) -> Array:
        """The elements' bits."""
        return np.asarray(_Bits(self.start, self.nbytes // self.granule, self.granule))

    def elements(self, addresses: Array, size: int) -> Array:
        """The indices of the elements at the addresses; they are inside."""
        if size < self.granule:
            self._refine(size)
        offsets = addresses - np.uint64(self.start)
        index: Array = (offsets >> np.uint64(self.granule.bit_length() - 1)).astype(np.int64)
        if size > self.granule:
            index = (index.reshape(-1, 1) + np.arange(size // self.granule)).ravel()
        return index

    def _refine(self, granule: int) -> None:
        times = self.granule // granule
        self.granule = granule
        if self._canary is not None:
            self._canary = self._canary.view(f"u{granule}")
        if self.writer is not None:
            self.writer = np.repeat(self.writer, times)
        if self.reader is not None:
            self.reader = np.repeat(self.reader, times)

    def made_writer(self) -> Array:
        """`writer`, made if need be."""
        if self.writer is None:
            self.writer = _zeros(self.nbytes // self.granule)
        return self.writer

    def made_reader(self) -> Array:
        """`reader`, made if need be."""
        if self.reader is None:
            self.reader = _zeros(self.nbytes // self.granule)
        return self.reader

    def unwritten(self, index: Array, version: int | None) -> Array | None:
        """Which of the elements neither a kernel nor torch has written; None if there are none.

        `version`: torch's count of changes; None where it keeps none.
        """
        # a byte may well hold the canary by chance
        if self._canary is None or (self.granule == 1 and version != 0):
            return None
        nothing: Array = self.memory()[index] == self._canary[index % len(self._canary)]
        if self.writer is not None:
            nothing &= self.writer[index] == 0
        return nothing if nothing.any() else None


class _Bits:
    """Memory as numpy's array protocol describes it."""

    def __init__(self, start: int, count: int, itemsize: int) -> None:
        self.__array_interface__ = {
            "data": (start, False),
            "shape": (count,),
            "typestr": f"<u{itemsize}",
            "version": 3,
        }


def _zeros(count: int) -> Array:
    if count <= _LARGEST_ALLOCATION:
        return np.zeros(count, np.int64)
    return np.frombuffer(_reserve(8 * count), np.int64)


def _reserve(nbytes: int) -> mmap.mmap:
    """Zeros that take no memory until they are written."""
    # Python knows the name since 3.11
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


def virtual_tensor(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """A CPU tensor of zeros that may reach over terabytes: only what is written takes memory.

    `stride` is in elements, as torch's.  Raises OSError where the system does not give so large a
    range of addresses.
    """
    itemsize = torch.empty((), dtype=dtype, device="meta").element_size()
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    memory = torch.frombuffer(_reserve(max(reach, 1) * itemsize), dtype=dtype)
    return memory.as_strided(shape, stride)


class Memory:
    """All storages that launches have seen, and those that torch gave without values."""

    def __init__(self) -> None:
        self._storages: dict[int, Storage] = {}
        # of tensors whose address was asked for
        self._others: dict[int, tuple[Extent, Storage]] = {}

    def adopt(self, tensor: Tensor) -> None:
        """Notes that torch has just made the tensor without values, and makes that visible."""
        if not is_plain(tensor) or tensor.numel() == 0:
            return
        storage = tensor.untyped_storage()
        itemsize = tensor.element_size()
        if storage.nbytes() > _LARGEST_FRESH or itemsize not in _CANARIES:
            return
        canary = np.array([1 if tensor.dtype == torch.bool else _CANARIES[itemsize]])
        canary = canary.astype(f"u{itemsize}")
        self._storages[storage._cdata] = Storage(storage, itemsize, canary)

    def storage_of(self, tensor: Tensor) -> Storage:
        """The shadow of the tensor's storage."""
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        if known is None or known.weak.expired() or known.nbytes != storage.nbytes():
            known = Storage(storage, tensor.element_size())
            self._storages[storage._cdata] = known
        return known

    def begin_launch(self) -> None:
        """Forgets storages that are gone."""
        self._storages = {k: s for k, s in self._storages.items() if not s.weak.expired()}
        self._others = {k: p for k, p in self._others.items() if not p[1].weak.expired()}

    def note(self, tensor: Tensor) -> bool:
        """Notes memory that a table of pointers may lead to; whether it is news."""
        if type(tensor) not in _PLAIN or not is_plain(tensor) or tensor.numel() == 0:
            return False
        key = tensor.untyped_storage()._cdata
        if key in self._others and not self._others[key][1].weak.expired():
            return False
        self._others[key] = Extent("", tensor, whole_storage=True), self.storage_of(tensor)
        return True

    def other_extents(self) -> Iterator[tuple[Extent, Storage]]:
        """Every live storage of a CPU tensor: a table of pointers may lead to it.

        First those noted: where a table was made before there was a detector, all the tensors that
        Python knows.
        """
        yield from list(self._others.values())
        for candidate in gc.get_objects():
            if type(candidate) in _PLAIN and self.note(candidate):
                yield self._others[candidate.untyped_storage()._cdata]


# of subclasses memory is what they make of it
_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory of its own kind: no fake, no wrapper, on the CPU."""
    return (
        type(tensor) in _PLAIN
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
