"""Plans and launches matrix products on GPUs with a tensor memory accelerator.

Every operand is (batch, rows, inner axis) and the result (batch, rows, columns), so that the kernel
multiplies by the transpose of its second operand.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import hardware, launch
from tritorch.descriptors import View
from tritorch.ops import stream_k
from tritorch.ops.matmul_entries import Entries
from tritorch.ops.reduce import accumulator_dtype, many_splits_sum, split_sum
from tritorch.ops.stream_k import StreamK
from tritorch.ops.strided import Layout, are_alike, dense

kernels = launch.kernels("matmul_tma")
configs = launch.kernels("matmul_tma_configs")

_DTYPES = (torch.float16, torch.bfloat16)
# a smaller product takes no longer than its launch
_MIN_PRODUCTS = 1 << 25
# so few rows, which waste half of wgmma's smallest tile, become columns of the transposed problem
_FEW_ROWS = 32
# from so many splits on, partial sums are added by a kernel that reads several at once
_MANY_SPLITS = 8


class Fill(NamedTuple):
    """The result is every `step`-th entry of the first `row` of 2 * row entries, and the others are
    zero: an image of which a convolution with a stride of 2 reads a quarter.
    """

    step: int
    row: int


_DENSE = Fill(1, 0)


class Plan(NamedTuple):
    """A launch for operands of known layouts."""

    grid: tuple[int]
    a: View
    b: View
    y: View
    residual: View | None
    # the kernel's integers but the last
    numbers: tuple[int, ...]
    splits: int
    # tiles of rows whose column moments a launch can write; 0 if it cannot
    parts: int
    # whether a launch also sums the rows of a
    sums: bool
    # the second launch of stream-K, where this one writes parts of tiles
    stream_k: StreamK | None
    config: Any
    constants: dict[str, Any]
    # by epilogue, filled on demand
    launches: dict[tuple[Any, ...], launch.Prepared]

    def with_epilogue(
        self,
        activation: str | None,
        bias_stride: int | None,
        moments: bool = False,
        sums: bool = False,
    ) -> launch.Prepared:
        """The launch with this epilogue."""
        key = activation, bias_stride, moments, sums
        prepared = self.launches.get(key)
        if prepared is None:
            rows = self.y.shape[1] if moments or sums else None
            numbers = (*self.numbers, 1 if bias_stride is None else bias_stride, rows)
            prepared = self.launches[key] = launch.Prepared(
                kernels.matmul_tma_kernel,
                self.grid,
                numbers,
                self.config,
                ACTIVATION=activation,
                **self.constants,
            )
        return prepared


def processors(precision: str, *operands: Tensor) -> int:
    """Multiprocessors of the operands' GPU, or 0 where these kernels do not take them: another GPU,
    different dtypes, a dtype other than 16 bits or float32 with the precision "tf32", or memory not
    aligned to 16 bytes.
    """
    first = operands[0]
    dtype = first.dtype
    if dtype not in _DTYPES and not (dtype == torch.float32 and precision == "tf32"):
        return 0
    if not 90 <= hardware.capability(first) < 100:
        return 0
    for operand in operands:
        if operand.dtype != dtype or operand.data_ptr() % 16:
            return 0
    # compiled or interpreted without a GPU, a kernel is for the GPU that it was written for
    return _device_processors(first.get_device()) if first.is_cuda else configs.MULTIPROCESSORS


@functools.cache
def _device_processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def plan_matmul(a: Layout, b: Layout, count: int, residual: Layout | None) -> Plan | None:
    """For a @ b of matrices, or of equally long batches, to a contiguous result on `count`
    multiprocessors; None leaves it to the portable kernel.
    """
    y = dense(Layout((*a.shape[:-1], b.shape[-1]), (), a.itemsize))
    added = None if residual is None else _entries(residual)
    given = _entries(a), _entries(b).transposed, _entries(y)
    return plan(*given, y.itemsize, count, residual=added, shares=True)


def plan_with_sums(a: Layout, b: Layout, count: int) -> Plan | None:
    """For a @ b of matrices and the sums of the rows of a in one launch; None where summing them
    separately is better.
    """
    y = dense(Layout((a.shape[0], b.shape[1]), (), a.itemsize))
    given = _entries(a), _entries(b).transposed, _entries(y)
    return plan(*given, y.itemsize, count, sums=True)


def _entries(matrix: Layout) -> Entries:
    batch, over_batch = (1, 0) if len(matrix.shape) == 2 else (matrix.shape[0], matrix.strides[0])
    (rows, columns), (over_rows, over_columns) = matrix.shape[-2:], matrix.strides[-2:]
    return Entries((batch, rows, columns), (over_batch, over_rows, over_columns))


def plan(
    a: Entries,
    b: Entries,
    y: Entries,
    itemsize: int,
    count: int,
    sums_batch: bool = False,
    fill: Fill = _DENSE,
    moments: bool = False,
    residual: Entries | None = None,
    sums: bool = False,
    shares: bool = False,
) -> Plan | None:
    """How to multiply on `count` multiprocessors, or None if the kernel does not take it.

    An `itemsize` of 4 means float32, multiplied as TF32.  b may have one entry for all of a.
    `sums_batch`: the products of all entries are added.  `moments`: those of the columns are
    wanted, if the kernel can write them.  `sums`: the sums of the rows of a, of one entry, are
    wanted; None also where that does not pay.  `shares`: programs may share tiles (stream-K), of
    results without gaps and without moments.
    """
    # wgmma transposes only 16-bit operands: a slice of float32 would pass through registers and
    # back into shared memory while the tensor cores wait
    if itemsize > 2 and not (a.runs_inside and b.runs_inside):
        return None
    entries, m, inner = a.shape
    n = b.shape[1]
    if entries * m * n * inner < _MIN_PRODUCTS:
        return None
    swapped = m <= _FEW_ROWS < n
    if swapped and sums:
        return None
    if swapped:
        a, b, m, n = b, a, n, m
    batch, k = (1, entries * inner) if sums_batch else (entries, inner)
    sizes = m, n, k, batch, b.shape[0] == 1, itemsize
    moments, may_share = moments and not swapped, (shares or sums) and not swapped
    # on fewer multiprocessors some of the programs would form a second wave
    may_share &= count >= configs.MULTIPROCESSORS
    config = _config(sizes, may_share, moments, residual is not None, sums)
    if config is None:
        return None
    block_m, block_n, block_k, form = (
        config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "FORM")
    )
    # a slice does not reach from one entry into the next
    slices = math.ceil(inner / block_k) * (entries if sums_batch else 1)
    if form == "stationary" and (slices > 1 or b.shape[0] > 1):
        return None
    splits, steps = 1, slices
    if y.is_contiguous:
        splits = configs.num_splits(config, m, n, k, batch)
        steps = math.ceil(slices / splits)
        splits = math.ceil(slices / steps)
    config = configs.without_idle_stages(config, steps)
    views = _views(config, a, b, y, itemsize, splits, swapped, residual)
    if views is None:
        return None
    tiles = configs.num_tiles(config, m, n) * batch * splits
    columns = math.ceil(n / block_n)
    grid = _num_programs(config, tiles, columns, count, itemsize, residual is not None)
    entry_steps = (min(each.shape[0] - 1, 1) for each in (a, b))
    counts = math.ceil(m / block_m), columns, tiles, steps, batch, entries
    constants = {
        "A_TRANSPOSED": views[0].transposed,
        "B_TRANSPOSED": views[1].transposed,
        "SWAPPED": swapped,
        "SUMS_BATCH": sums_batch,
        # entries are columns of an image, whose pixels are neighbours in memory
        "BATCH_FIRST": batch > 1 and b.shape[0] == 1 and splits == 1,
        "FILLS": fill != _DENSE,
    }
    width = m if swapped else n
    numbers = (width, *counts, *entry_steps, *fill)
    parts = counts[0] * batch if moments and splits == 1 else 0
    adds = None
    if form == "stream-k":
        given = (n, *counts[:2], steps, batch, grid), constants["BATCH_FIRST"]
        adds = stream_k.plan(config, *views[2:], tiles, *given)
        # a part ends where a tile ends or a program
        views = *views[:2], stream_k.view_of_parts(config, grid + tiles - 1), None
    return Plan((grid,), *views, numbers, splits, parts, sums, adds, config, constants, {})


def _config(
    sizes: tuple[Any, ...], may_share: bool, moments: bool, has_residual: bool, sums: bool
) -> Any:
    """The configuration for the product and its extras; None where `sums` do not pay."""
    m, n, k, *_, itemsize = sizes
    whole = config = launch.config(configs.matmul_tma_config, *sizes)
    if may_share:
        config = stream_k.choose(sizes) or whole
    if moments:
        config = configs.for_moments(config, itemsize)
    if has_residual:
        config = configs.for_residual(config, itemsize)
    if sums:
        plain, config = config, configs.for_sums(whole)
        if config is None or not configs.sums_pay(plain, config, m, n, k):
            return None
    return config


def _num_programs(
    config: Any, tiles: int, columns: int, count: int, itemsize: int, has_residual: bool
) -> int:
    form = config.kwargs["FORM"]
    if form == "tile":
        return tiles
    if form == "stream-k":
        return stream_k.num_programs(config, itemsize)
    programs = min(tiles, count * int(configs.residents(config, itemsize, has_residual)))
    if form == "stationary":
        # the same number for every tile of b
        programs = max(programs // columns, 1) * columns
    return programs


def _views(
    config: Any,
    a: Entries,
    b: Entries,
    y: Entries,
    itemsize: int,
    splits: int,
    swapped: bool,
    residual: Entries | None,
) -> tuple[View, View, View, View | None] | None:
    block_m, block_n, block_k, pieces = (
        config.kwargs[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PIECES")
    )
    a_view, b_view = (
        each.tiles(rows, block_k, itemsize) or each.tiles(rows, block_k, itemsize, True)
        for each, rows in ((a, block_m), (b, block_n))
    )
    stored = (block_n, block_m // pieces) if swapped else (block_m, block_n // pieces)
    if config.kwargs["FORM"] == "stream-k":
        stored = block_m, stream_k.COLUMNS
    residual_view = None
    # with splits the residual is added with the partial sums
    if residual is not None and splits == 1:
        residual_view = residual.tiles(*stored, itemsize)
        if residual_view is None:
            return None
    if splits > 1:
        # one whole result after the other
        batch, rows, columns = y.shape
        y = Entries((splits * batch, rows, columns), (rows * columns, columns, 1))
        itemsize = 4
    y_view = y.tiles(*stored, itemsize)
    if a_view is None or b_view is None or y_view is None:
        return None
    return a_view, b_view, y_view, residual_view


def run(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    moments: Tensor | None = None,
    residual: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    """Writes activation(a @ b.T + bias + residual) into y, and the sum itself into
    `preactivation`, which has the strides of y; or into `moments` mean, squared deviations and
    count of the columns of each of the plan's parts of y, (parts, 3, N); or, by a plan for them,
    into `sums` those of the rows of a.
    """
    if plan.stream_k is not None:
        parts = y.new_empty(plan.y.shape, dtype=accumulator_dtype(y.dtype))
        run = plan.with_epilogue(None, None)
        run(y, plan.a.at(a), plan.b.at(b), None, plan.y.at(parts), None, None, None, None)
        stream_k.add_up(plan.stream_k, parts, y, bias, activation, preactivation, residual)
        return
    if plan.constants["SWAPPED"]:
        a, b = b, a
    single = plan.splits == 1
    target = y
    if not single:
        target = y.new_empty((plan.splits, y.numel()), dtype=accumulator_dtype(y.dtype))
    operands = plan.a.at(a), plan.b.at(b)
    result = plan.y.at(target)
    if single:
        stride = None if bias is None else bias.stride(0)
        kept = None if preactivation is None else plan.y.at(preactivation)
        run = plan.with_epilogue(activation, stride, moments is not None, plan.sums)
        added = None
        if residual is not None and plan.residual is not None:
            added = plan.residual.at(residual)
        run(y, *operands, bias, result, kept, moments, added, sums)
        return
    partial: Tensor | None = None
    if sums is not None:
        partial = y.new_empty((plan.splits, sums.numel()), dtype=target.dtype)
    run = plan.with_epilogue(None, None, sums=plan.sums)
    run(y, *operands, None, result, None, None, None, partial)
    _add_up(plan, target, y, bias, activation, preactivation, residual)
    if sums is not None and partial is not None:
        split_sum(partial, sums)


def _add_up(
    plan: Plan,
    partial: Tensor,
    y: Tensor,
    bias: Tensor | None,
    activation: str | None,
    preactivation: Tensor | None,
    residual: Tensor | None,
) -> None:
    if plan.splits >= _MANY_SPLITS and bias is None and activation is None and residual is None:
        many_splits_sum(partial, y.as_strided((y.numel(),), (1,)), kernels.SPLITS_AT_ONCE)
        return
    # as it lies in memory, whatever its dimensions are: a bias runs along the rows
    columns = plan.numbers[0]
    rows = y.as_strided((y.numel() // columns, columns), (columns, 1))
    if residual is not None and residual.dim() > 2:
        if not are_alike(Layout.of(residual), Layout.of(y)):
            raise RuntimeError("matmul: a residual of several matrices must lie as their product")
        residual = residual.as_strided(rows.shape, rows.stride())
    split_sum(partial, rows, bias, activation, preactivation, residual)
