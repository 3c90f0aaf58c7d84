"""Which convolutions run through Hopper's tensor memory accelerator, and their launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tritorch import launch
from tritorch.descriptors import View
from tritorch.ops.activation_function import computes
from tritorch.ops.conv_tma_taps import leaves_out
from tritorch.ops.geometry import Geometry, Weight, oriented, split
from tritorch.ops.reduce import accumulator_dtype, split_sum
from tritorch.ops.strided import Layout

kernels = launch.kernels("conv_tma")
configs = launch.kernels("conv_tma_configs")

# slices of channels that one program must have before it pays to split a sum
_MIN_SLICES = 8
# tiles may have so many times the pixels they cover; beyond it the portable kernel wastes less
_MAX_WASTE = 1.7
# stands for the stride of an axis of size 1, which addresses nothing but which hardware checks
_ANY_STRIDE = 16


class Plan(NamedTuple):
    """A launch for tensors of known layouts."""

    grid: tuple[int, int]
    # of x, filter and y; or of grad_output, input and gradient of the filter
    views: tuple[View, View, View]
    # the kernel's integers up to the stride of the bias, and those after it
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    splits: int
    # of a residual, in tiles as computed
    added: View | None
    # tiles of pixels whose channel moments a launch can write; 0 if it cannot
    parts: int
    config: Any
    constants: dict[str, Any]
    # by epilogue, filled on demand
    launches: dict[tuple[Any, ...], launch.Prepared]

    def prepared(self, kernel: Any, *between: int, **epilogue: Any) -> launch.Prepared:
        """The launch with this epilogue; `between` are its numbers, passed after `sizes`."""
        key = (*between, *epilogue.values())
        found = self.launches.get(key)
        if found is None:
            numbers = (*self.sizes, *between, *self.steps)
            found = self.launches[key] = launch.Prepared(
                kernel, self.grid, numbers, self.config, **epilogue, **self.constants
            )
        return found


def plan_convolve(
    x: Layout,
    weight: Layout,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    count: int,
    residual: Layout | None = None,
    activation: str | None = None,
    has_bias: bool = False,
) -> Plan | None:
    """The launch that writes the convolution of x, or the transposed one, into y; None if these
    kernels do not take it.

    `count` is the number of multiprocessors.  Tensors are 16-bit, or float32 for TF32, and aligned
    to 16 bytes.
    """
    if len(x.shape) != 4 or x.stride(1) != 1 or y.stride(1) != 1:
        return None
    if weight.stride(along_memory(weight, transposed)) != 1:
        return None
    if transposed and not _reaches_all(weight, geometry):
        return None
    w, itemsize = oriented(weight, geometry.groups, transposed), x.itemsize
    # with erf the largest tile has no registers left for a bias either
    short_of_registers = residual is not None or (has_bias and activation == "gelu")
    cut = _cut(x, w, y, geometry, transposed, activation, short_of_registers)
    if cut is None:
        return None
    config, blocks, splits = cut.config, cut.blocks, cut.splits
    block_k, block_c = config.kwargs["BLOCK_K"], config.kwargs["BLOCK_C"]
    views = (
        _pixels(x, blocks, block_c, cut.pairs and not transposed),
        _filters(weight, transposed, block_k, block_c),
        _pixels(
            y,
            configs.stored_pixels(config, itemsize, *blocks),
            block_k,
            cut.pairs and transposed,
            splits,
        ),
    )
    if not all(view.is_describable(itemsize) for view in views):
        return None
    added = None
    # with splits the residual is added with the partial sums
    if residual is not None and splits == 1:
        added = _pixels(residual, blocks, block_k, False)
        if residual.stride(1) != 1 or not added.is_describable(itemsize):
            return None
    programs = cut.tiles
    if config.kwargs["PERSISTENT"]:
        fit = max(count * configs.residents(config, itemsize) // geometry.groups, 1)
        programs = _num_programs(min(cut.tiles, fit), cut.num_k, cut.residues)
    numbers = cut.tiles, cut.steps, splits
    tap_steps, inverses = geometry.residues(transposed)
    return Plan(
        (programs, geometry.groups * splits),
        views,
        (y.shape[0], w.read, w.written, *w.taps, *y.shape[2:], *x.shape[2:], *numbers),
        (*geometry.scalars(), *tap_steps, *inverses),
        splits,
        added,
        0 if transposed or splits > 1 else cut.parts,
        config,
        {
            "TRANSPOSED": transposed,
            "PAIRS": cut.pairs,
            "SKIPS": cut.skips,
            "BLOCK_N": blocks[0],
            "BLOCK_P": blocks[1],
            "BLOCK_Q": blocks[2],
        },
        {},
    )


class _Cut(NamedTuple):
    """How a convolution is cut into tiles, and the sum of a tile into splits."""

    config: Any
    # images, rows and columns of a tile
    blocks: tuple[int, int, int]
    pairs: bool
    skips: bool
    residues: int
    # tiles of the pixels of a residue, those of its channels, and of all of these together
    parts: int
    num_k: int
    tiles: int
    splits: int
    # slices of a split
    steps: int


def _cut(
    x: Layout,
    w: Weight,
    y: Layout,
    geometry: Geometry,
    transposed: bool,
    activation: str | None,
    short_of_registers: bool,
) -> _Cut | None:
    """None where no tile fits; `short_of_registers`: the epilogue takes registers from it."""
    # transposed, pixels of different residues are reached by different taps
    n, _, *image = y.shape
    steps_each = geometry.stride if transposed else (1, 1)
    residues = math.prod(steps_each)
    pixels = n, *(math.ceil(size / each) for size, each in zip(image, steps_each, strict=True))
    config = _config(w, pixels, residues, geometry, transposed, x.itemsize)
    if config is None:
        return None
    if short_of_registers:
        config = configs.for_residual(config, computes(activation), x.itemsize)
    block_k, block_npq, block_c = (config.kwargs[f"BLOCK_{axes}"] for axes in ("K", "NPQ", "C"))
    # a tile may not reach into the channels of the next group, or of the next pixel of a pair
    fits = w.read % block_c == 0 and w.written % block_k == 0
    if geometry.groups > 1 and not fits:
        return None
    pairs = fits and geometry.stride == (2, 2) and _is_of_pairs(y if transposed else x)
    # without pairs a stride leaves gaps between the pixels of a tile
    config, blocks = _blocks(config, pixels, pairs or geometry.stride == (1, 1))
    each_axis = zip(pixels, blocks, strict=True)
    parts = math.prod(math.ceil(size / block) for size, block in each_axis)
    if parts * block_npq > _MAX_WASTE * math.prod(pixels):
        return None
    num_k = math.ceil(w.written / block_k)
    tiles = parts * num_k * residues
    tap_steps, _ = geometry.residues(transposed)
    slices = math.ceil(w.read / block_c)
    taps = (math.ceil(taps / step) for taps, step in zip(w.taps, tap_steps, strict=True))
    splits, steps = 1, slices * math.prod(taps)
    # the sums of a split are images after the last one, which a tile must not reach into
    if residues == 1 and n % blocks[0] == 0 and not config.kwargs["PERSISTENT"]:
        splits, steps = split(2 * tiles * geometry.groups, steps, _MIN_SLICES)
    # a tile with a single tap left has a slice for each split
    skips = splits <= slices and leaves_out(x, y, w, geometry, transposed, blocks[1:])
    return _Cut(config, blocks, pairs, skips, residues, parts, num_k, tiles, splits, steps)


def _reaches_all(weight: Layout, geometry: Geometry) -> bool:
    """Whether each pixel of a transposed convolution has a tap that reaches it."""
    each_axis = zip(geometry.stride, geometry.dilation, weight.shape[2:], strict=True)
    return all(
        math.gcd(stride, dilation) == 1 and stride <= taps for stride, dilation, taps in each_axis
    )


def _config(
    w: Weight,
    pixels: tuple[int, ...],
    residues: int,
    geometry: Geometry,
    transposed: bool,
    itemsize: int,
) -> Any:
    """The configuration for these pixels of each residue, or None."""
    n, p, q = pixels
    groups, taps = geometry.groups, max(math.prod(w.taps) // residues, 1)
    # passed only where they are not 2 and 1, as measured tables have them
    others = (itemsize, groups) if groups > 1 else (itemsize,) if itemsize > 2 else ()
    sizes = n * residues, p, q, w.written, w.read, taps, geometry.stride[0], transposed, *others
    return launch.config(configs.conv2d_tma_config, *sizes)


def _is_of_pairs(image: Layout) -> bool:
    """Whether rows and columns can be viewed in pairs: even sizes, and dense columns."""
    _, c, h, w = image.shape
    return h % 2 == w % 2 == 0 and image.stride(3) == c


def _blocks(
    config: Any, pixels: tuple[int, ...], is_dense: bool
) -> tuple[Any, tuple[int, int, int]]:
    """Images, rows and columns of a tile, and the configuration that has them."""
    block_npq = config.kwargs["BLOCK_NPQ"]
    # tables go by sizes alone, which images with pairs and images without may share
    chosen, own = configs.pixels_of(config)
    if not is_dense:
        return own, (block_npq, 1, 1)
    if chosen is not None and math.prod(chosen) == block_npq:
        return config, chosen
    return own, configs.tile_of_pixels(*pixels, block_npq)


def _num_programs(most: int, num_k: int, residues: int) -> int:
    """At most `most` programs, such that each gets tiles of all residues.

    Residues have different numbers of taps: with a common factor a program would get only some.
    """
    programs = most
    while math.gcd(programs, num_k * residues) > num_k:
        programs -= 1
    return programs


def _pixels(
    image: Layout, blocks: tuple[int, ...], channels: int, pairs: bool, splits: int = 1
) -> View:
    (n, c, h, w), (block_n, block_p, block_q) = image.shape, blocks
    along_n, _, along_h, along_w = described_strides(image)
    if pairs:
        return View(
            (n, h // 2, 2, w // 2, 2 * c),
            (along_n, 2 * along_h, along_h, 2 * along_w, 1),
            (block_n, block_p, 1, block_q, channels),
        )
    return View(
        (splits * n, h, w, c),
        (along_n if splits == 1 else c * h * w, along_h, along_w, 1),
        (block_n, block_p, block_q, channels),
    )


def described_strides(tensor: Layout) -> tuple[int, ...]:
    """The strides for a descriptor: the hardware also checks those of axes of size 1."""
    return tuple(
        stride if size > 1 else _ANY_STRIDE
        for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    )


def along_memory(weight: Layout, transposed: bool) -> int:
    """Which axis of the filters must be contiguous: 1, inputs; or 0, outputs, for a transposed
    convolution of float32, since TF32 needs both operands contiguous along the sum.
    """
    return 0 if transposed and weight.itemsize > 2 else 1


def _filters(weight: Layout, transposed: bool, block_k: int, block_c: int) -> View:
    """Taps x outputs x inputs, or taps x inputs x outputs where outputs are contiguous: no tile
    reads into the next tap.
    """
    outputs, inputs, r, s = weight.shape
    along_outputs, along_inputs, along_r, along_s = described_strides(weight)
    if s == 1:
        along_s = along_r
    elif r > 1 and along_r != s * along_s:
        # taps in two dimensions, which no descriptor takes
        along_s = 0
    if along_memory(weight, transposed) == 0:
        return View((r * s, inputs, outputs), (along_s, along_inputs, 1), (1, block_k, block_c))
    block = (block_c, block_k) if transposed else (block_k, block_c)
    return View((r * s, outputs, inputs), (along_s, along_outputs, 1), (1, *block))


def convolve(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    preactivation: Tensor | None = None,
    moments: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """Writes the activation of the convolution into y, and what it is applied to into
    `preactivation`; or into `moments` mean, squared deviations and count of the channels of each of
    the plan's parts of y, (parts, 3, K).
    """
    target, is_split = y, plan.splits > 1
    if is_split:
        dtype = accumulator_dtype(y.dtype)
        target = torch.empty((plan.splits, y.numel()), dtype=dtype, device=y.device)
    of_x, of_w, of_y = plan.views
    kept = None if preactivation is None or is_split else of_y.at(preactivation)
    added = None
    if residual is not None and plan.added is not None:
        added = plan.added.at(residual)
    run = plan.prepared(
        kernels.conv2d_tma_kernel,
        1 if bias is None else bias.stride(0),
        ACTIVATION=None if is_split else activation,
    )
    run(y, of_x.at(x), of_w.at(weight), bias, of_y.at(target), kept, moments, added)
    if is_split:
        split_sum(target, y, None, activation, preactivation, residual)
