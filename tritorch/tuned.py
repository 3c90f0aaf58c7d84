"""Configurations that were measured on a GPU, which launches take before a kernel's own choice.

A table is a JSON file: `rows` of `function` (that chooses, such as "matmul_config"), `sizes` (what
it was asked with), and the configuration as `kwargs`, `num_warps`, `num_stages` and `maxnreg`, or
`kwargs` alone and null where the kernel's own choice was best, which is none; what else a row holds
is said in `tritorch.bench.tuned_table`.  `path` says which file of the user's a GPU has, and
`installed` which of ours, whose rows count where the user's has none.  A process with GPUs of
several kinds takes none.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritorch import backend
from tritorch.testing import dry

# function and sizes
Key = tuple[str, tuple[int, ...]]

# that of `using`
forced: Mapping[Key, Any] | None = None


def path(gpu: str | None = None) -> Path:
    """The table of a GPU, by default the current one's: the file that TRITORCH_TUNED names, else
    one in the user's cache folder.
    """
    if named := os.environ.get("TRITORCH_TUNED"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches, "tritorch", "tuned", _file_of(gpu))


def shipped(gpu: str | None = None) -> Path:
    """The table that is installed for a GPU, by default the current one; there need not be one."""
    return Path(__file__).resolve().parent / "data" / "tuned" / _file_of(gpu)


def installed(gpu: str, capability: str | None, multiprocessors: int | None) -> list[Path]:
    """The tables that are installed for GPUs with the same multiprocessors, the GPU's own last.

    An H200 is an H100 with other memory: what was measured on the one is nearer to the other than
    what a kernel chooses without a measurement.  `capability`: as "9.0".
    """
    own = shipped(gpu)
    others = (file for file in sorted(own.parent.glob("*.json")) if file != own)
    return [*(file for file in others if _gpus(file) == {(capability, multiprocessors)}), own]


def _gpus(file: Path) -> set[tuple[str, int]]:
    """Compute capabilities and multiprocessors that an installed table was measured with."""
    seen = json.loads(file.read_text(encoding="utf-8"))["environments"]
    return {(each["capability"], each["multiprocessors"]) for each in seen}


def of(gpu: str, capability: str | None, multiprocessors: int | None) -> Mapping[Key, Any]:
    """The rows that a GPU's launches take: the user's, and where there is none the installed."""
    rows: dict[Key, Any] = {}
    for file in installed(gpu, capability, multiprocessors):
        rows |= read(file)
    return {**rows, **_of_user(path(gpu))}


def _file_of(gpu: str | None) -> str:
    name = gpu if gpu is not None else torch.cuda.get_device_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def find(function: str, sizes: Sequence[int], like: Any, warns: bool = True) -> Any:
    """The measured `triton.Config` for these sizes, or None; `like` is a configuration of today.

    Where no GPU runs the kernel, in the interpreter or ahead of time, there is none.  Warns of one
    that lacks what `like` has, which another version of the kernel was measured with.
    """
    table = forced if forced is not None else _of_this_machine()
    found = table.get((function, tuple(sizes))) if table else None
    if lacks := missing(found, like):
        if not warns:
            return None
        warnings.warn(
            f"tuned: the row of {function}{tuple(sizes)} has no {', '.join(lacks)} and is not"
            " taken: another version wrote it, and tritorch tune writes it anew",
            UserWarning,
            stacklevel=3,
        )
        return None
    return found


def missing(found: Any, like: Any) -> list[str]:
    """The numbers that a measured configuration lacks of those that one of today has."""
    if found is None or like is None:
        return []
    return sorted(like.kwargs.keys() - found.kwargs.keys())


@contextlib.contextmanager
def using(table: Mapping[Key, Any]) -> Iterator[None]:
    """Inside the block this table is everybody's, and no other is read."""
    global forced
    previous, forced = forced, table
    try:
        yield
    finally:
        forced = previous


def read(file: Path) -> dict[Key, Any]:
    """The table in a file, without rows if there is no such file; None stands for the kernel's own
    choice.

    Raises:
        ValueError: the file is no such table.
    """
    from triton import Config

    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return {
            (row["function"], tuple(row["sizes"])): None
            if row["kwargs"] is None
            else Config(
                row["kwargs"],
                num_warps=row["num_warps"],
                num_stages=row["num_stages"],
                maxnreg=row["maxnreg"],
            )
            for row in rows
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"tuned: {file} holds no table: {error!r}") from error


def row(function: str, sizes: Sequence[int], config: Any, **more: Any) -> dict[str, Any]:
    """A row of a table."""
    asked = {"function": function, "sizes": list(sizes)}
    if config is None:
        return {**asked, "kwargs": None, **more}
    return {
        **asked,
        "kwargs": dict(config.kwargs),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.maxnreg,
        **more,
    }


def _of_this_machine() -> Mapping[Key, Any] | None:
    # who launches on a GPU has touched it
    if backend.INTERPRETING or dry.active() is not None or not torch.cuda.is_initialized():
        return None
    return _of_visible_gpus(os.environ.get("TRITORCH_TUNED"))


@functools.cache
def _of_visible_gpus(named: str | None) -> Mapping[Key, Any]:
    """Of the file that TRITORCH_TUNED names, if any, read once: some plans ask in every call."""
    if reason := several_kinds():
        warnings.warn(f"tuned: {reason}", UserWarning, stacklevel=2)
        return {}
    [kind] = _kinds()
    return of(*kind)


def several_kinds() -> str | None:
    """Why no table is taken in this process, if it has GPUs of several kinds: one plan serves all
    of them, and a tile of one may not fit into another.
    """
    kinds = _kinds()
    if len(kinds) < 2:
        return None
    names = ", ".join(f"{name} with {count} multiprocessors" for name, _, count in kinds)
    return (
        f"GPUs of several kinds ({names}): no measured configuration is taken; "
        "CUDA_VISIBLE_DEVICES leaves those of one kind"
    )


def _kinds() -> list[tuple[str, str, int]]:
    """Name, capability and multiprocessors of the GPUs of this process; of those that are older
    than the kernels, which a screen may need, only if there are no others.
    """
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [gpu for gpu in gpus if gpu.major >= 8] or gpus
    found = {(gpu.name, f"{gpu.major}.{gpu.minor}", gpu.multi_processor_count) for gpu in gpus}
    return sorted(found)


def _of_user(file: Path) -> Mapping[Key, Any]:
    try:
        return read(file)
    except ValueError as error:
        # a training run is not to end for it
        warnings.warn(f"{error}; no row of it is taken", UserWarning, stacklevel=2)
        return {}
