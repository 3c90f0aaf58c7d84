"""Lanes whose value is no offset: it wrapped around, or nothing defines it.

A mark sits on the handle of an integer tile and travels with it through arithmetic and reshaping to
the address of a load or a store, where the detectors look.  The tensor that a pointer was derived
from travels in the same way.  Values that only get mixed (hashes, random numbers) lose their marks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tritorch.testing.places import Place, here

Array = npt.NDArray[Any]


@dataclass(eq=False, frozen=True)
class Cause:
    """Why lanes are marked.

    `kind`: of the finding once such a lane is an address; empty if there is a finding already.
    """

    kind: str
    place: Place
    message: str = ""
    argument: str = ""
    # an unsigned number wraps around by design, so a remainder of it is a fine address
    unsigned: bool = False


Marks = dict[Cause, Array]

# what arithmetic calls so that it wraps
_WRAPPING: dict[Any, str] = {
    np.add: "sum",
    np.subtract: "difference",
    np.multiply: "product",
    np.left_shift: "shift",
}
_KEEPING = (*_WRAPPING, np.maximum, np.minimum, np.fmod)

originals: dict[str, Any] = {}
# set by `watch`: tl.int1, and what is called for a tile whose offset is marked
flag_dtype: Any = None
found: Any = None
_causes: dict[tuple[str, Place], Cause] = {}


def cause(kind: str, place: Place, make: Callable[[], Cause]) -> Cause:
    """The one cause of a kind and a place: a loop comes by often."""
    known = _causes.get((kind, place))
    if known is None:
        known = _causes[kind, place] = make()
    return known


def forget() -> None:
    """Starts anew: messages are of one launch."""
    _causes.clear()


def merge(shape: tuple[int, ...], *sources: Marks | None) -> Marks | None:
    """The marks of a result from those of its operands, which broadcast to its shape."""
    merged: Marks = {}
    for marks in sources:
        for why, lanes in (marks or {}).items():
            wide = np.broadcast_to(lanes, shape)
            merged[why] = merged[why] | wide if why in merged else wide
    return merged or None


def _binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    result = originals["binary_op"](self, lhs, rhs, op)
    if lhs.marks is not None or rhs.marks is not None:
        if op is np.fmod:
            # of a signed remainder alone: hashes are unsigned
            signed = lhs.data.dtype.kind == "i"
            kept = {why: at for why, at in (lhs.marks or {}).items() if signed and not why.unsigned}
            result.marks = merge(result.data.shape, kept)
        elif op in _KEEPING and result.data.dtype.kind in "iu":
            result.marks = merge(result.data.shape, lhs.marks, rhs.marks)
    if op in _WRAPPING and lhs.data.dtype.itemsize == 4 and result.data.dtype.kind in "iu":
        _mark_wrapped(result, lhs.data, rhs.data, op)
    return result


def _mark_wrapped(result: Any, lhs: Array, rhs: Array, op: Any) -> None:
    if lhs.size == 1 and rhs.size == 1:
        # python's integers are quicker than arrays of one
        left, right = lhs.item(), rhs.item()
        if op is np.multiply:
            exact = left * right
        elif op is np.add:
            exact = left + right
        elif op is np.subtract:
            exact = left - right
        else:
            exact = left << (right & 31)
        if exact == result.data.item():
            return
        wrapped, first = np.ones(result.data.shape, np.bool_), exact
    else:
        wide = op(lhs, rhs, dtype=np.int64, casting="unsafe")
        wrapped = wide != result.data
        if not wrapped.any():
            return
        first = int(wide[wrapped].flat[0])
    if result.marks is not None:
        # what is undefined already may be anything
        wrapped = wrapped & ~np.logical_or.reduce([*result.marks.values()])
        if not wrapped.any():
            return
    _mark(result, wrapped, _WRAPPING[op], first)


def _mark(result: Any, wrapped: Array, what: str, exact: int) -> None:
    unsigned = result.data.dtype.kind == "u"
    got = int(result.data[wrapped].flat[0])
    place = here()
    why = cause(
        "int32 overflow",
        place,
        lambda: Cause(
            "int32 overflow",
            place,
            f"a 32-bit {what} of {exact} wraps around to {got}, and is",
            unsigned=unsigned,
        ),
    )
    result.marks = merge(result.data.shape, result.marks, {why: wrapped})


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    result = originals["cast_impl"](self, src, dst_type)
    if result.data.dtype.kind not in "iu" or src.data.dtype.kind not in "iu":
        return result
    result.marks = src.marks
    narrows = src.data.dtype == np.int64 and result.data.dtype == np.int32
    if narrows and (lost := result.data != src.data).any():
        _mark(result, lost, "cast", int(src.data[lost].flat[0]))
    return result


def _create_idiv(self: Any, lhs: Any, rhs: Any) -> Any:
    result = originals["create_idiv"](self, lhs, rhs)
    if lhs.marks is not None:
        result.marks = merge(result.data.shape, lhs.marks)
    return result


def _ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
    result = originals["ternary_op"](self, lhs, rhs, other, op)
    if op is np.where:
        if rhs.extent is other.extent:
            result.extent = rhs.extent
        if rhs.marks is not None or other.marks is not None:
            shape, taken = result.data.shape, lhs.data.astype(np.bool_)
            left = {why: at & taken for why, at in (rhs.marks or {}).items()}
            right = {why: at & ~taken for why, at in (other.marks or {}).items()}
            both = merge(shape, left, right) or {}
            result.marks = {why: lanes for why, lanes in both.items() if lanes.any()} or None
    return result


def _create_addptr(self: Any, ptr: Any, offset: Any) -> Any:
    result = originals["create_addptr"](self, ptr, offset)
    result.extent = ptr.extent
    if ptr.marks is not None or offset.marks is not None:
        result.marks = merge(result.data.shape, ptr.marks, offset.marks)
    return result


def _reinterpreting(name: str) -> Callable[..., Any]:
    def replacement(self: Any, src: Any, *rest: Any) -> Any:
        result = originals[name](self, src, *rest)
        result.extent = src.extent
        if result.data.shape == src.data.shape:
            result.marks = src.marks
        return result

    return replacement


def _reshaping(name: str, position: int = 0) -> Callable[..., Any]:
    """Of an operation that moves lanes about: it moves the marks in the same way."""

    def replacement(self: Any, *args: Any) -> Any:
        result = originals[name](self, *args)
        src = args[position]
        result.extent = src.extent
        if src.marks is not None:
            result.marks = {
                why: originals[name](
                    self, *args[:position], _flags(src, lanes), *args[position + 1 :]
                ).data
                for why, lanes in src.marks.items()
            }
        return result

    return replacement


def _flags(handle: Any, lanes: Array) -> Any:
    return type(handle)(np.ascontiguousarray(lanes), flag_dtype)


def _joining(name: str) -> Callable[..., Any]:
    def replacement(self: Any, lhs: Any, rhs: Any) -> Any:
        result = originals[name](self, lhs, rhs)
        if lhs.extent is rhs.extent:
            result.extent = lhs.extent
        causes = {*(lhs.marks or ()), *(rhs.marks or ())}
        if causes:
            none = np.zeros(lhs.data.shape, np.bool_)
            result.marks = {
                why: originals[name](
                    self,
                    _flags(lhs, (lhs.marks or {}).get(why, none)),
                    _flags(rhs, (rhs.marks or {}).get(why, none)),
                ).data
                for why in causes
            }
        return result

    return replacement


def _create_split(self: Any, val: Any) -> Any:
    results = originals["create_split"](self, val)
    for half, result in enumerate(results):
        result.extent = val.extent
        if val.marks is not None:
            result.marks = {why: lanes[..., half] for why, lanes in val.marks.items()}
    return results


def _clone(self: Any) -> Any:
    result = originals["clone"](self)
    result.extent, result.marks = self.extent, self.marks
    return result


def _create_advance(self: Any, ptr: Any, offsets: Any) -> Any:
    result = originals["create_advance"](self, ptr, offsets)
    for moved, step in zip(result.offsets, offsets, strict=True):
        moved.marks = merge(moved.data.shape, moved.marks, step.marks)
    return result


def _materializing(owner: str) -> Callable[..., Any]:
    def replacement(self: Any, given: Any) -> Any:
        ptrs, masks = originals[f"{owner}.materialize_pointers"](self, given)
        ptrs.extent = self.base.extent
        # a block pointer has its offsets, a descriptor is given them
        offsets = self.offsets if owner == "BlockPointerHandle" else given
        for offset in offsets:
            for why, lanes in (offset.marks or {}).items():
                # the offset decides what is masked off, so that the mask excuses nothing
                whole = np.broadcast_to(lanes.any(), ptrs.data.shape)
                found(why, ptrs.extent, whole)
                ptrs.marks = merge(ptrs.data.shape, ptrs.marks, {Cause("", why.place): whole})
        return ptrs, masks

    return replacement


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    originals["_patch_lang_tensor"](tensor, scope)
    transposed = tensor.T.fget

    def transpose(self: Any) -> Any:
        result = transposed(self)
        result.handle.extent = self.handle.extent
        if self.handle.marks is not None:
            result.handle.marks = {why: lanes.T for why, lanes in self.handle.marks.items()}
        return result

    scope.set_attr(tensor, "T", property(transpose))


# by the path of their owner below triton.runtime.interpreter
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "": {"_patch_lang_tensor": _patch_lang_tensor},
    # None for most handles, so that a look costs little
    "TensorHandle": {"marks": None, "extent": None, "clone": _clone},
    "BlockPointerHandle": {"materialize_pointers": _materializing("BlockPointerHandle")},
    "TensorDescHandle": {"materialize_pointers": _materializing("TensorDescHandle")},
    "InterpreterBuilder": {
        "binary_op": _binary_op,
        "cast_impl": _cast_impl,
        "create_addptr": _create_addptr,
        "create_advance": _create_advance,
        "create_bitcast": _reinterpreting("create_bitcast"),
        "create_broadcast": _reshaping("create_broadcast"),
        "create_cat": _joining("create_cat"),
        "create_expand_dims": _reshaping("create_expand_dims"),
        "create_idiv": _create_idiv,
        "create_int_to_ptr": _reinterpreting("create_int_to_ptr"),
        "create_join": _joining("create_join"),
        "create_ptr_to_int": _reinterpreting("create_ptr_to_int"),
        "create_reshape": _reshaping("create_reshape"),
        "create_splat": _reshaping("create_splat", 1),
        "create_split": _create_split,
        "create_trans": _reshaping("create_trans"),
        "create_unsplat": _reshaping("create_unsplat"),
        "ternary_op": _ternary_op,
    },
}
