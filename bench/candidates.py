"""The configurations that `tritorch tune` times for a question, beside the kernel's own choice."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from tritorch import kernels, launch, tuned
from tritorch.testing import configurations

# whose configurations may say the axes of a tile of pixels in place of the kernel
_TILED, _PIXELS = "conv2d_tma_config", ("BLOCK_N", "BLOCK_P", "BLOCK_Q")
# files without such a function whose kernels another file's function chooses for
_BESIDE = {"batch_norm": ("batch_norm_stats",)}
# how many times the fewest tiles another shape of them may need
_MOST_TILES = 1.25


def own(function: str, sizes: tuple[int, ...]) -> Any:
    """What the kernel itself chooses, None where another kernel is launched."""
    return getattr(family(function), function)(*sizes)


def like(function: str, sizes: tuple[int, ...]) -> Any:
    """A configuration with the numbers that the kernel takes: its own choice, else an entry."""
    found = own(function, sizes)
    return launch.entry_of(getattr(family(function), function)) if found is None else found


def kernels_of(function: str) -> frozenset[str]:
    """The names of the kernels that a function chooses for: of its own file, or of that which its
    file has the configurations of.
    """
    stem = family(function).__name__.rpartition(".")[2].removesuffix("_configs")
    stems = (stem, *_BESIDE.get(stem, ()))
    files = (importlib.import_module(f"tritorch.kernels.{one}") for one in stems)
    return frozenset(name for file in files for name in vars(file) if name.endswith("_kernel"))


def family(function: str) -> ModuleType:
    """The file of `tritorch/kernels` in which a choosing function is."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if function in configurations.tables(module.name):
            return importlib.import_module(f"tritorch.kernels.{module.name}")
    raise ValueError(f"tune: no kernel has {function}")


def candidates(function: str, sizes: tuple[int, ...], itemsize: int) -> list[Any]:
    """The entries of the kernel's table, then what the shipped tables found for other sizes, each
    with the kernel's own tile of pixels and with others; in no order of merit.

    `itemsize`: bytes of the numbers, for which a table may have entries of their own.
    """
    table = getattr(family(function), f"{function.upper()}S")
    entries = list(table.get(itemsize, ()) if isinstance(table, Mapping) else table)
    if not entries:
        return []
    numbers = entries[0].kwargs.keys()
    entries += [one for one in _shipped().get(function, ()) if one.kwargs.keys() == numbers]
    found: dict[str, Any] = {}
    for entry in entries:
        for one in (entry, *_with_pixels(function, entry, sizes)):
            found.setdefault(str(one), one)
    return list(found.values())


@functools.cache
def _shipped() -> dict[str, list[Any]]:
    """The configurations of all rows, without their tiles of pixels, which are of the sizes."""
    found: dict[str, list[Any]] = {}
    for file in sorted(tuned.shipped("any").parent.glob("*.json")):
        for (function, _), config in tuned.read(file).items():
            if config is None:
                continue
            numbers = dict(config.kwargs)
            if function == _TILED:
                numbers = {name: numbers[name] for name in numbers if name not in _PIXELS}
            found.setdefault(function, []).append(_copy(config, numbers))
    return found


def _with_pixels(function: str, config: Any, sizes: tuple[int, ...]) -> Iterator[Any]:
    if function != _TILED:
        return
    n, p, q, _, _, _, stride, *_ = sizes
    # with a stride a tile is the kernel's own, which depends on more than the sizes
    if stride == 1:
        for tile in _pixels(n, p, q, config.kwargs["BLOCK_NPQ"]):
            yield _copy(config, config.kwargs | dict(zip(_PIXELS, tile, strict=True)))


def _pixels(n: int, p: int, q: int, block: int) -> list[tuple[int, int, int]]:
    """Images, rows and columns of `block` pixels, where the kernel's own are others: of each number
    of tiles that is not much more than the fewest, the fewest images, then the squarest.
    """
    best: dict[int, tuple[int, ...]] = {}
    for log_q in range(block.bit_length()):
        for log_p in range(block.bit_length() - log_q):
            rows, columns = 1 << log_p, 1 << log_q
            images = block // (rows * columns)
            tiles = math.ceil(n / images) * math.ceil(p / rows) * math.ceil(q / columns)
            one = (images, abs(log_p - log_q), rows, columns)
            best[tiles] = min(best.get(tiles, one), one)
    kept = {(one[0], one[2], one[3]) for t, one in best.items() if t <= _MOST_TILES * min(best)}
    return sorted(kept - {family(_TILED).tile_of_pixels(n, p, q, block)})


def _copy(config: Any, numbers: Mapping[str, Any]) -> Any:
    return type(config)(
        dict(numbers),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )
