"""Stream-K: tiles of a matrix product that programs share, where that pays, and their addition.

As many programs as the GPU has room for get equal shares of all slices of all tiles.  A program's
share of a tile is a part, and a second launch adds up the parts of each tile in their order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from tritorch import launch
from tritorch.descriptors import View

kernels = launch.kernels("matmul_tma")
configs = launch.kernels("matmul_tma_configs")

# columns of a tile whose parts one program adds up: lines of 128 bytes
COLUMNS = 32


class StreamK(NamedTuple):
    """The launch that adds up the parts of tiles that programs share."""

    y: View
    residual: View | None
    grid: tuple[int]
    # the kernel's integers but the last
    numbers: tuple[int, ...]
    constants: dict[str, Any]
    # by epilogue, filled on demand
    launches: dict[tuple[Any, ...], launch.Prepared]

    def with_epilogue(self, activation: str | None, bias_stride: int) -> launch.Prepared:
        """The launch with this epilogue."""
        key = activation, bias_stride
        prepared = self.launches.get(key)
        if prepared is None:
            prepared = self.launches[key] = launch.Prepared(
                kernels.matmul_tma_parts_kernel,
                self.grid,
                (*self.numbers, bias_stride),
                ACTIVATION=activation,
                COLUMNS=COLUMNS,
                # four have no registers for erf
                num_warps=8,
                **self.constants,
            )
        return prepared


def choose(sizes: tuple[Any, ...]) -> Any:
    """The configuration of programs that share tiles, or None."""
    shares, whole = configs.matmul_tma_stream_k_config, configs.matmul_tma_config
    # an estimate replaces nothing that was measured or is forced
    if launch.is_decided(whole, *sizes) and not launch.is_decided(shares, *sizes):
        return None
    config = launch.config(shares, *sizes)
    return config if config is not None and _fills(config, *sizes) else None


def _fills(config: Any, m: int, n: int, k: int, batch: int, _: bool, itemsize: int) -> bool:
    """Whether there is a slice for every program, and the kernel can count them."""
    programs = num_programs(config, itemsize)
    if programs == 0:
        # a configuration from a table or a caller may not fit on any multiprocessor
        return False
    slices = configs.num_tiles(config, m, n) * batch * math.ceil(k / config.kwargs["BLOCK_K"])
    return bool(programs <= slices < 2**31 // programs)


def num_programs(config: Any, itemsize: int) -> int:
    """Programs that share all tiles: as many on every GPU that has room for them at once, so that
    sums have the same parts.
    """
    return int(configs.MULTIPROCESSORS * configs.residents(config, itemsize))


def view_of_parts(config: Any, most: int) -> View:
    """Whole tiles one after the other, stored as those of a result are."""
    rows, columns, pieces = (config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "PIECES"))
    block = 1, rows, columns // pieces
    return View((most, rows, columns), (rows * columns, columns, 1), block, False)


def plan(
    config: Any,
    y: View,
    residual: View | None,
    tiles: int,
    numbers: tuple[int, ...],
    batch_first: bool,
) -> StreamK:
    """For so many tiles that go to y; `numbers` are the kernel's integers but the last."""
    constants = {name: config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "GROUP_M")}
    constants["BATCH_FIRST"] = batch_first
    grid = tiles * config.kwargs["BLOCK_N"] // COLUMNS
    return StreamK(y, residual, (grid,), numbers, constants, {})


def add_up(
    shared: StreamK,
    parts: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    preactivation: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Writes activation(sum of the parts + bias + residual) into y, and what the activation is of
    into `preactivation`.
    """
    kept = None if preactivation is None else shared.y.at(preactivation)
    added = None
    if residual is not None and shared.residual is not None:
        added = shared.residual.at(residual)
    run = shared.with_epilogue(activation, 1 if bias is None else bias.stride(0))
    run(y, parts, bias, shared.y.at(y), kept, added)
