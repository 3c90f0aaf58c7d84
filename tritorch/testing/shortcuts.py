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

# by the name of the element type and the lengths, the attributes of a block type: all types of the
# same lengths and element share one shape
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
# by the identity of a shape, which the entry keeps alive, the attributes of a tensor that follow
# from it alone
_tensors: dict[int, tuple[Any, dict[str, Any]]] = {}


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
    for module, owners in _REPLACEMENTS.items():
        for name, replacements in owners.items():
            owner = getattr(importlib.import_module(module), name, None)
            found += [(owner, *one) for one in replacements.items() if hasattr(owner, one[0])]
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
    key = (element_ty.name, *shape)
    known = _block_types.get(key)
    # of Python's tuples Triton makes no type
    if known is None or isinstance(shape, tuple):
        _originals["block_type.__init__"](self, element_ty, shape)
        known = _block_types[key] = dict(vars(self))
    # pointers of one name may differ in what they point to
    vars(self).update(known, element_ty=element_ty)


def _make_tensor(self: Any, handle: Any, type: Any) -> None:
    shape = type.shape if type.is_block() else None
    known = _tensors.get(id(shape))
    if known is None:
        _originals["tensor.__init__"](self, handle, type)
        own = ("handle", "type", "dtype")
        attributes = {name: value for name, value in vars(self).items() if name not in own}
        _tensors[id(shape)] = shape, attributes
    else:
        vars(self).update(known[1], handle=handle, type=type, dtype=type.scalar)


# by module and class of Triton
_REPLACEMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "triton.language.semantic": {
        "TritonSemantic": {
            "binary_op_sanitize_overflow_impl": _sanitize_overflow,
            "broadcast_impl_value": _broadcast,
        },
    },
    "triton.language.core": {
        "dtype": {"__eq__": _equal_types},
        "block_type": {"__init__": _make_block_type},
        "tensor": {"__init__": _make_tensor},
    },
}
