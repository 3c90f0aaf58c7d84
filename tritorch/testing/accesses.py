"""Loads, stores and atomics of an interpreted kernel, each checked before it happens.

These functions replace the interpreter's own; `watch` puts them in their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tritorch.testing import corrections, marks, places
from tritorch.testing.marks import Cause
from tritorch.testing.places import Place
from tritorch.testing.races import Conflict
from tritorch.testing.shadow import Extent, Storage

Array = npt.NDArray[Any]

# the part of an access that lies in one storage: its lanes
Part = tuple[Extent, Storage, Array]

# a tile of more atomics than this is no synchronisation: locks and counters have few lanes
_MOST_LOCKS = 64
# no tensor lies below this address
_NULL_PAGE = 4096

# set by `watch`: triton.runtime.interpreter and triton.language, what the functions here replace,
# and the detector that is told
lib: Any = None
tl: Any = None
originals: dict[str, Any] = {}
active: Any = None

# of an atomic load or store that Triton makes of plain ones
_ordering: Any = None


def create_masked_load(
    self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any
) -> Any:
    place = places.here()
    lanes, size = _lanes(mask), _size(ptrs)
    undefined = None
    if other is None and not lanes.all():
        undefined = ~lanes
        active.note_undefined(place, ptrs.extent, undefined)
    bad, parts = _check(ptrs, lanes, size, "read", place)
    volatile = named.get("is_volatile", rest[-1] if rest else False)
    for part in parts:
        _on_read(part, ptrs.data, size, place, volatile)
    if bad is not None:
        mask = _flags(lanes & ~bad)
    element = ptrs.get_element_ty()
    poison = None
    if bad is not None or undefined is not None:
        dtype = lib._get_np_dtype(element)
        poison = active.poison(ptrs.data.shape, dtype, place)
        if other is None:
            other = lib.TensorHandle(poison, element)
    result = originals["create_masked_load"](self, ptrs, mask, other, *rest, **named)
    if poison is None:
        pass
    elif bad is not None:
        result.data = np.where(bad, poison, result.data)
    if result.data.dtype.kind in "iu":
        _mark_poison(result, bad, undefined, ptrs, place)
    if ptrs.data.size == 1:
        address = int(ptrs.data.item())
        key = place, address, result.data.item()
        active.note_scalar(key, place, ptrs.extent, address, waits=volatile)
    else:
        active.note_tile()
    return result


def _mark_poison(
    result: Any, bad: Array | None, undefined: Array | None, ptrs: Any, place: Place
) -> None:
    if undefined is not None:
        name = "" if ptrs.extent is None else ptrs.extent.name
        message = "lanes that are masked off without `other` are used as"
        why = marks.cause("masked lane", place, lambda: Cause("masked lane", place, message, name))
        result.marks = marks.merge(result.data.shape, result.marks, {why: undefined})
    if bad is not None:
        why = marks.cause("", place, lambda: Cause("", place))
        result.marks = marks.merge(result.data.shape, result.marks, {why: bad})


def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
    place = places.here()
    lanes, size = _lanes(mask), _size(ptrs)
    bad, parts = _check(ptrs, lanes, size, "write", place)
    if bad is not None:
        mask = _flags(lanes & ~bad)
    for part in parts:
        _on_write(part, ptrs, value, size, place)
    active.note_change()
    return originals["create_masked_store"](self, ptrs, value, mask, *rest)


def create_atomic_rmw(self: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
    place = places.here()
    lanes, size = np.broadcast_to(_lanes(mask), ptr.data.shape), _size(ptr)
    bad, parts = _check(ptr, lanes, size, "atomic", place)
    if bad is not None:
        mask = _flags(lanes & ~bad)
    reads = op != lib._ir.ATOMIC_OP.XCHG
    for part in parts:
        _on_atomic(part, ptr.data, size, place, rest[0], reads)
    before = _single(ptr, bad)
    result = originals["create_atomic_rmw"](self, op, ptr, val, mask, *rest)
    return _after_atomic(result, ptr, bad, before, (place, val.data.tobytes()))


def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
    place = places.here()
    lanes, size = np.ones(ptr.data.shape, np.bool_), _size(ptr)
    bad, parts = _check(ptr, lanes, size, "atomic", place)
    for part in parts:
        _on_atomic(part, ptr.data, size, place, rest[0], reads=True)
    before = _single(ptr, bad)
    original = originals["create_atomic_cas"]
    if bad is None:
        result = original(self, ptr, cmp, val, *rest)
    else:
        # it takes no mask
        result = lib.TensorHandle(np.zeros(ptr.data.shape, val.data.dtype), val.dtype.scalar)
        if not bad.all():
            some = [_subset(handle, ~bad) for handle in (ptr, cmp, val)]
            result.data[~bad] = original(self, *some, *rest).data
    return _after_atomic(result, ptr, bad, before, (place, cmp.data.tobytes(), val.data.tobytes()))


def _subset(handle: Any, lanes: Array) -> Any:
    return lib.TensorHandle(np.broadcast_to(handle.data, lanes.shape)[lanes], handle.dtype)


def _single(ptr: Any, bad: Array | None) -> bytes | None:
    """The bits that a scalar atomic is about to change; None for a tile."""
    return _bits_at(ptr.data, _size(ptr)).tobytes() if ptr.data.size == 1 and bad is None else None


def _after_atomic(
    result: Any, ptr: Any, bad: Array | None, before: bytes | None, asked: tuple[Any, ...]
) -> Any:
    place = asked[0]
    if bad is not None:
        poison = active.poison(result.data.shape, result.data.dtype, place)
        result.data = np.where(bad, poison, result.data)
        if result.data.dtype.kind in "iu":
            _mark_poison(result, bad, None, ptr, place)
    if before is not None and before == _single(ptr, None):
        address = int(ptr.data.item())
        active.note_scalar((*asked, address), place, ptr.extent, address, waits=True)
    else:
        active.note_change()
    return result


def ordered(name: str) -> Callable[..., Any]:
    """Of an atomic load or store, which the interpreter makes of plain ones."""

    def replacement(self: Any, *args: Any) -> Any:
        global _ordering
        before, _ordering = _ordering, args[-2]
        try:
            return originals[name](self, *args)
        finally:
            _ordering = before

    return replacement


def _lanes(mask: Any) -> Array:
    # block pointers of 3.6 make the mask an array
    lanes: Array = mask if isinstance(mask, np.ndarray) else mask.data
    # the interpreter may hold flags as integers
    return lanes if lanes.dtype == np.bool_ else lanes.astype(np.bool_)


def _flags(lanes: Array) -> Any:
    return lib.TensorHandle(lanes, tl.int1)


def _size(ptrs: Any) -> int:
    """Bytes of what the pointers point at."""
    return max(int(ptrs.get_element_ty().primitive_bitwidth) // 8, 1)


def _bits_at(addresses: Array, size: int) -> Array:
    dtype = np.dtype(f"u{size}")
    bits: Array = lib._interpreter.load(
        addresses, np.ones(addresses.shape, np.bool_), np.zeros(addresses.shape, dtype), dtype
    )
    return bits


_VERBS = {"read": "loads", "write": "stores", "atomic": "updates"}


def _check(
    ptrs: Any, lanes: Array, size: int, access: str, place: Place
) -> tuple[Array | None, list[Part]]:
    """Reports lanes that are out of bounds, and says which storages the others lie in."""
    bad, parts = _resolve(ptrs, lanes, size)
    explained = None
    for why, marked in (ptrs.marks or {}).items():
        hit = marked & lanes
        if not hit.any():
            continue
        explained = hit if explained is None else explained | hit
        report_mark(why, ptrs.extent, hit)
    if bad is not None:
        unexplained = bad if explained is None else bad & ~explained
        if unexplained.any():
            extent = ptrs.extent or active.nearest(ptrs.data[unexplained])
            active.report(
                f"out-of-bounds {access}",
                place,
                lambda: _outside(extent, ptrs.data[unexplained], size, access),
                argument="" if extent is None else extent.name,
                lanes=unexplained,
            )
    return bad, parts


def report_mark(why: Cause, extent: Extent | None, lanes: Array) -> None:
    """Of lanes whose value is no offset, and that are used as one."""
    if why.kind:
        line = places.here().line
        active.report(
            why.kind,
            why.place,
            lambda: f"{why.message} an address at line {line}",
            argument=why.argument or ("" if extent is None else extent.name),
            lanes=lanes,
        )


def _resolve(ptrs: Any, lanes: Array, size: int) -> tuple[Array | None, list[Part]]:
    if ptrs.extent is not None:
        bad = ptrs.extent.outside(ptrs.data, size)
        bad &= lanes
        if not bad.any():
            return None, [(ptrs.extent, active.storage_of(ptrs.extent), lanes)]
        return bad, [(ptrs.extent, active.storage_of(ptrs.extent), lanes & ~bad)]
    # its tensor is not known: any will do
    left, parts = lanes.copy(), []
    for extent, storage in itertools.chain(active.extents(), active.memory.other_extents()):
        if not left.any():
            break
        inside = left & ~extent.outside(ptrs.data, size)
        if inside.any():
            parts.append((extent, storage, inside))
            left &= ~inside
    return (left if left.any() else None), parts


def _outside(extent: Extent | None, addresses: Array, size: int, access: str) -> str:
    verb, count = _VERBS[access], len(addresses)
    if (addresses < _NULL_PAGE).all():
        return f"{verb} through a null pointer"
    if extent is None:
        return f"{verb} {count} elements that belong to no tensor"
    offsets = addresses.astype(np.int64) - extent.base
    if (offsets + size > extent.nbytes).all():
        where = "past the end of"
    elif (offsets < 0).all():
        where = "before the start of"
    elif ((offsets >= 0) & (offsets + size <= extent.nbytes)).all():
        where = "between the elements of"
    else:
        where = "outside of"
    first, last = int(offsets.min()) // extent.itemsize, int(offsets.max()) // extent.itemsize
    at = f"offset {first}" if first == last else f"offsets {first} to {last}"
    elements = "element" if count == 1 else "elements"
    total = int(np.prod(extent.shape, dtype=np.int64))
    return (
        f"{verb} {count} {elements} {where} `{extent.name}` "
        f"({total} elements, shape {extent.shape}), at {at}"
    )


def _on_read(part: Part, addresses: Array, size: int, place: Place, volatile: bool) -> None:
    extent, storage, lanes = part
    here = addresses[lanes]
    index = storage.elements(here, size)
    # a program that polls acquires what was released there
    polls = _ordering is not None or (volatile and addresses.size <= _MOST_LOCKS)
    _report_unwritten(storage, index, extent, lanes, place)
    conflict = active.races.read(storage, index, place, atomic=polls)
    if conflict is not None:
        _report_race(conflict, extent, lanes, place, "reads")
    if polls:
        active.races.acquire(here.tolist())


def _on_write(part: Part, ptrs: Any, value: Any, size: int, place: Place) -> None:
    extent, storage, lanes = part
    here = ptrs.data[lanes]
    index = storage.elements(here, size)
    if storage.last_write == 0:
        storage.stored = place
    storage.stores[place] = active.kernel, extent.name
    if _ordering is not None:
        active.races.atomic(storage, index, place)
        active.races.release(here.tolist())
        return
    for conflict in active.races.write(storage, index, place):
        if conflict.did == "wrote":
            # the same bits again change nothing
            bits = np.broadcast_to(corrections.to_bits(value).data, lanes.shape)[lanes]
            same = _bits_at(here, size) == bits.view(f"u{bits.dtype.itemsize}").astype(f"u{size}")
            differs = conflict.lanes & ~np.repeat(same, len(index) // max(len(here), 1))
            conflict = conflict._replace(lanes=differs)
        if conflict.lanes.any():
            _report_race(conflict, extent, lanes, place, "writes")


def _on_atomic(
    part: Part, addresses: Array, size: int, place: Place, semantics: Any, reads: bool
) -> None:
    extent, storage, lanes = part
    here = addresses[lanes]
    index = storage.elements(here, size)
    if reads:
        _report_unwritten(storage, index, extent, lanes, place)
    if storage.last_write == 0:
        storage.stored = place
    storage.stores[place] = active.kernel, extent.name
    for conflict in active.races.atomic(storage, index, place):
        _report_race(conflict, extent, lanes, place, "updates")
    if addresses.size <= _MOST_LOCKS:
        kinds = lib._ir.MEM_SEMANTIC
        if semantics in (kinds.ACQUIRE, kinds.ACQUIRE_RELEASE):
            active.races.acquire(here.tolist())
        if semantics in (kinds.RELEASE, kinds.ACQUIRE_RELEASE):
            active.races.release(here.tolist())


def _report_unwritten(
    storage: Storage, index: Array, extent: Extent, lanes: Array, place: Place
) -> None:
    unwritten = storage.unwritten(index, extent.version)
    if unwritten is not None:
        active.report(
            "uninitialised read",
            place,
            lambda: f"loads elements of `{extent.name}` that nothing has written",
            argument=extent.name,
            lanes=_spread(unwritten, lanes),
        )


def _report_race(conflict: Conflict, extent: Extent, lanes: Array, place: Place, does: str) -> None:
    other = active.races.place(conflict.other)
    program = active.program_at(active.races.position(conflict.other))

    def say() -> str:
        who = "another program" if program == active.program else f"program {program}"
        return (
            f"program {active.program} {does} elements of `{extent.name}` that {who} "
            f"{conflict.did} at line {other.line}, and nothing orders the two"
        )

    active.report("race", place, say, argument=extent.name, lanes=_spread(conflict.lanes, lanes))


def _spread(elements: Array, lanes: Array) -> Array:
    """The lanes of the tile whose elements are meant; a lane may have several."""
    spread = np.zeros(lanes.shape, np.bool_)
    spread[lanes] = elements.reshape(np.count_nonzero(lanes), -1).any(1)
    return spread
