"""Puts the detectors' functions in the place of Triton's own while `detecting` is entered.

Each calls what it replaces, which the corrections may have replaced before, and tells the active
detector of it: of launches and of memory without values those here, of loads and stores those in
`accesses.py`, of arithmetic those in `marks.py`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from tritorch import launch
from tritorch.testing import accesses, corrections, marks, patches, places
from tritorch.testing.detector import Detector
from tritorch.testing.places import Place

_patches: list[patches.Patch] = []
_marks_patches: list[patches.Patch] = []
_entered: list[Detector] = []


def enter(detector: Detector) -> None:
    """Makes the detector the active one; raises RuntimeError where Triton lacks a part."""
    if not _entered:
        if not _patches:
            _load()
        patches.put(_marks_patches, marks.originals)
        patches.put(_patches, accesses.originals)
    _entered.append(detector)
    launch.detectors = len(_entered)
    accesses.active = detector


def leave() -> None:
    """Makes the detector active again that was before, or leaves Triton as it was."""
    _entered.pop()
    launch.detectors = len(_entered)
    accesses.active = _entered[-1] if _entered else None
    if not _entered:
        patches.restore(_patches, accesses.originals)
        patches.restore(_marks_patches, marks.originals)


def _load() -> None:
    lib = importlib.import_module("triton.runtime.interpreter")
    for path in _USED:
        patches.require(lib, path, "detectors.detecting")
    accesses.lib, accesses.tl = lib, lib.tl
    below = _found(lib, marks.REPLACEMENTS, ("marks", "extent"))
    above = _found(lib, _REPLACEMENTS, ())
    marks.flag_dtype, marks.found = lib.tl.int1, accesses.report_mark
    _marks_patches.extend(below)
    _patches.extend(above)
    _patches.append((corrections, "refuse_tile", _refuse_tile))
    _patches.append((torch.Tensor, "data_ptr", _data_ptr))
    for owner, names in ((torch, _ALLOCATING), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        _patches.extend((owner, name, _allocating(owner, name)) for name in names)


def _found(
    lib: Any, replacements: dict[str, dict[str, Any]], new: tuple[str, ...]
) -> list[patches.Patch]:
    found = []
    for path, by_name in replacements.items():
        # 3.9 has no block pointers, and the ones before no loads and stores that are atomic
        if path in _OPTIONAL and not hasattr(lib, path):
            continue
        owner = patches.require(lib, path, "detectors.detecting") if path else lib
        for name, replacement in by_name.items():
            if name in _OPTIONAL and not hasattr(owner, name):
                continue
            if name not in new:
                patches.require(owner, name, "detectors.detecting")
            found.append((owner, name, replacement))
    return found


# memory without values


def _allocating(owner: Any, name: str) -> Callable[..., Any]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        path = f"{getattr(owner, '__name__', '')}.{name}"
        tensor = accesses.originals[path](*args, **kwargs)
        if kwargs.get("out") is None and not torch.compiler.is_compiling():
            accesses.active.memory.adopt(tensor)
        return tensor

    return replacement


def _data_ptr(self: Any) -> Any:
    # the caller may put the address into a table
    accesses.active.memory.note(self)
    return accesses.originals["data_ptr"](self)


# launches


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    detector: Detector = accesses.active
    grid = self.grid
    code = self.fn.__code__
    detector.begin_launch(
        self.fn.__name__, Place(code.co_filename, code.co_firstlineno), self.constexprs
    )
    self.grid = lambda bound: detector.begin_grid(grid(bound) if callable(grid) else grid, bound)
    try:
        return accesses.originals["__call__"](self, *args, **kwargs)
    except Exception:
        if detector.gave_up is not None:
            raise detector.gave_up from None
        raise
    finally:
        self.grid = grid
        detector.end_launch()


def _init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
    args_hst, kwargs_hst = accesses.originals["_init_args_hst"](self, args_dev, kwargs)
    for name, given, host in zip(self.arg_names, args_dev, args_hst, strict=False):
        accesses.active.bind(name, given, host)
    for name, host in kwargs_hst.items():
        accesses.active.bind(name, kwargs[name], host)
    return args_hst, kwargs_hst


def _implicit_cvt(arg: Any) -> Any:
    result = accesses.originals["_implicit_cvt"](arg)
    if hasattr(arg, "data_ptr"):
        result.handle.extent = accesses.active.extent_of(arg)
    return result


def _set_grid_dim(self: Any, *sizes: int) -> None:
    # the interpreter goes through the programs that run, a kernel asks for all
    accesses.originals["set_grid_dim"](self, *accesses.active.grid)


def _set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
    accesses.originals["set_grid_idx"](self, *accesses.active.begin_program(x))


def _refuse_tile(message: str) -> None:
    accesses.active.report("tile", places.here(), lambda: message)


_ALLOCATING = ("empty", "empty_like", "empty_strided", "empty_permuted")

# private parts that are used but not replaced
_USED = (
    "TensorHandle",
    "_get_np_dtype",
    "_interpreter.load",
    "_ir.ATOMIC_OP.XCHG",
    "_ir.MEM_SEMANTIC.ACQUIRE",
    "_ir.MEM_SEMANTIC.ACQUIRE_RELEASE",
    "_ir.MEM_SEMANTIC.RELEASE",
)

# what not every version of Triton has
_OPTIONAL = (
    "BlockPointerHandle",
    "create_advance",
    "create_atomic_load",
    "create_atomic_poll",
    "create_atomic_store",
)

# by the path of their owner below triton.runtime.interpreter
_REPLACEMENTS: dict[str, dict[str, Any]] = {
    "": {"_implicit_cvt": _implicit_cvt},
    "GridExecutor": {"__call__": _launch, "_init_args_hst": _init_args_hst},
    "InterpreterBuilder": {
        "create_atomic_cas": accesses.create_atomic_cas,
        "create_atomic_load": accesses.ordered("create_atomic_load"),
        "create_atomic_poll": accesses.ordered("create_atomic_poll"),
        "create_atomic_rmw": accesses.create_atomic_rmw,
        "create_atomic_store": accesses.ordered("create_atomic_store"),
        "create_masked_load": accesses.create_masked_load,
        "create_masked_store": accesses.create_masked_store,
        "set_grid_dim": _set_grid_dim,
        "set_grid_idx": _set_grid_idx,
    },
}
