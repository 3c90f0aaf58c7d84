"""Replaces attributes of other libraries for a while; replacements stack like `with` blocks."""

from __future__ import annotations

import sys
from typing import Any

# an owner (a module, a class, an object), the attribute's name, and what replaces it
Patch = tuple[Any, str, Any]

_MISSING = object()


def put(patches: list[Patch], originals: dict[str, Any]) -> None:
    """Replaces every attribute, and keeps what was there in `originals`.

    What was there may itself be a replacement: the new one calls it.  Its key is its name, and
    "Owner.name" for names that several owners have.
    """
    for owner, name, replacement in patches:
        originals[name] = originals[_path(owner, name)] = getattr(owner, name, _MISSING)
        # an inherited attribute comes back by deleting the owner's
        originals[f"own {_path(owner, name)}"] = name in vars(owner)
        setattr(owner, name, replacement)


def restore(patches: list[Patch], originals: dict[str, Any]) -> None:
    """Puts back what `put` replaced."""
    for owner, name, _ in reversed(patches):
        if originals[f"own {_path(owner, name)}"]:
            setattr(owner, name, originals[_path(owner, name)])
        else:
            delattr(owner, name)


def _path(owner: Any, name: str) -> str:
    return f"{getattr(owner, '__name__', type(owner).__name__)}.{name}"


def require(owner: Any, path: str, caller: str) -> Any:
    """The attribute at the dotted `path` below `owner`; RuntimeError names it where it lacks."""
    for name in path.split("."):
        if not hasattr(owner, name):
            raise RuntimeError(
                f"{caller}: triton {sys.modules['triton'].__version__} has no "
                f"{getattr(owner, '__name__', owner)}.{name}, which it needs "
                "(it knows 3.6.0, 3.7.1 and 3.9.0)"
            )
        owner = getattr(owner, name)
    return owner
