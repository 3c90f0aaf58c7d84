"""What Triton's interpreter computes for nothing, left out: the same values, several times faster.

An operation on a tile costs the interpreter the same whatever the tile's size: Python that makes
the type of the result, and a second computation of each integer result in 64 bits that no one
reads.  What is here replaces parts of Triton inside `interpreter.corrected`.  Where the installed
Triton lacks such a part nothing is replaced, since no result depends on it.
"""

from __future__ import annotations

import importlib
from typing import Any

from tritorch.testing import patches

_patches: list[patches.Patch] = []
# what the patches replaced, by its name
_originals: dict[str, Any] = {}

# by its lengths the shape of every block type that has them, and by the name of its element besides
# the attributes of the type itself
_shapes: dict[tuple[int, ...], Any] = {}
_block_types: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
# by the identity of one of these shapes, or of None for a scalar, the attributes of a tensor that
# follow from it alone, once there was one
_tensors: dict[int, dict[str, Any] | None] = {id(None): None}


def patch() -> None:
    """Puts the shortcuts in place."""
    if not _patches:
        _patches.extend(_found())
    patches.put(_patches, _originals)


def restore() -> None:
    """Puts back what `patch` replaced."""
    patches.restore(_patches, _originals)


def _found() -> list[patches.Patch]:
    """The patches of the parts that the installed Triton has."""
    found = []
    for path, replacements in _REPLACEMENTS.items():
        owner: Any = importlib.import_module("triton.language")
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if owner is not None:
            found += [(owner, *one) for one in replacements.items() if one[0] in vars(owner)]
    return found


def _sanitize_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    # the sum in 64 bits is for an assertion, which is dropped without this option: without it the
    # interpreter lets integers wrap around, as a GPU does, and the detectors look for that
    if self.builder.options.debug:
        _originals["binary_op_sanitize_overflow_impl"](self, lhs, rhs, binary_op)


def _broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    blocks = lhs.type.is_block(), rhs.type.is_block()
    if not any(blocks) or (all(blocks) and lhs.type.shape is rhs.type.shape):
        return lhs, rhs
    return _originals["broadcast_impl_value"](self, lhs, rhs)


def _equal_types(self: Any, other: Any) -> Any:
    return self is other or _originals["dtype.__eq__"](self, other)


def _make_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    lengths = _lengths(shape)
    if lengths is None or not hasattr(element_ty, "name"):
        _originals["block_type.__init__"](self, element_ty, shape)
        return
    known = _block_types.get((element_ty.name, lengths))
    if known is None:
        _originals["block_type.__init__"](self, element_ty, shape)
        if lengths not in _shapes:
            _shapes[lengths] = self.shape
            _tensors[id(self.shape)] = None
        self.shape = _shapes[lengths]
        if vars(self).keys() == {"element_ty", "shape", "numel", "name"}:
            known = {"shape": self.shape, "numel": self.numel, "name": self.name}
            _block_types[element_ty.name, lengths] = known
    else:
        # of two pointers of one name each keeps its own address space
        vars(self).update(known, element_ty=element_ty)


def _lengths(shape: Any) -> tuple[int, ...] | None:
    """Those of what Triton takes for a shape; None for others, which it refuses or converts."""
    # its `tuple` is a class of its own
    values = shape if type(shape) is list else getattr(shape, "values", None)
    if type(values) is not list or any(type(length) is not int for length in values):
        return None
    return tuple(values)


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    shape = type.shape if type.is_block() else None
    known = _tensors.get(id(shape))
    if known is None:
        _originals["tensor.__init__"](self, handle, type)
        if id(shape) in _tensors and vars(self).keys() == {"numel", "shape", *_OWN}:
            _tensors[id(shape)] = {"numel": self.numel, "shape": self.shape}
    else:
        vars(self).update(known, handle=handle, type=type, dtype=type.scalar)


# the attributes of a tensor that do not follow from its shape
_OWN = ("handle", "type", "dtype")

# by the path of their owner below triton.language
_REPLACEMENTS: dict[str, dict[str, Any]] = {
    "semantic.TritonSemantic": {
        "binary_op_sanitize_overflow_impl": _sanitize_overflow,
        "broadcast_impl_value": _broadcast,
    },
    "core.dtype": {"__eq__": _equal_types},
    "core.block_type": {"__init__": _make_block_type},
    "core.tensor": {"__init__": _make_tensor},
}
