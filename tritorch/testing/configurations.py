"""The tables of configurations that tritorch's own kernels choose from."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from tritorch.registry import OpSpec


def entries(spec: OpSpec, dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """(name of the choosing function, entry) for every configuration that the op may run in this
    dtype, as `launch.override` takes them.
    """
    for family in sorted({kernel.partition(".")[0] for kernel in spec.kernels}):
        found = tables(family)
        if importlib.util.find_spec(f"tritorch.kernels.{family}_configs"):
            found = found | tables(f"{family}_configs")
        for name, table in found.items():
            by_dtype = table.get(dtype.itemsize, ()) if isinstance(table, dict) else table
            for entry in by_dtype:
                yield name, entry


@functools.cache
def tables(file: str) -> dict[str, Any]:
    """The entries of each `<KERNEL>_CONFIGS` by the name of the function that chooses, of one file
    of `tritorch/kernels`.
    """
    module = importlib.import_module(f"tritorch.kernels.{file}")
    return {
        name: getattr(module, f"{name.upper()}S")
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.endswith("_config") and function.__module__ == module.__name__
    }
