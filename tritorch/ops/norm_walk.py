"""How the programs of batch normalisation divide its tensors, and their launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tritorch import launch
from tritorch.ops import strided
from tritorch.ops.activation_function import computes, needs_output
from tritorch.ops.strided import Layout

kernels = launch.kernels("norm")
stats_kernels = launch.kernels("norm_stats")
reduce_kernels = launch.kernels("reduce")

STATS = "batch_norm_stats_kernel"
FORWARD = "batch_norm_forward_kernel"
REDUCE = "batch_norm_backward_reduce_kernel"
GRAD_INPUT = "batch_norm_grad_input_kernel"


class Walk(NamedTuple):
    """How programs divide tensors of one shape."""

    # programs per block of channels
    slices: int
    run: launch.Prepared


def walk_of(
    kernel: str,
    *tensors: Tensor | None,
    activation: str | None = None,
    count: int | None = None,
    in_order: bool = False,
) -> Walk:
    """The walk of a kernel along the memory of the last tensor, or over its rows in their order."""
    layouts = [None if tensor is None else Layout.of(tensor) for tensor in tensors]
    return _plan_walk(kernel, activation, count, in_order, *layouts)


@launch.planned
def _plan_walk(
    kernel: str,
    activation: str | None,
    count: int | None,
    in_order: bool,
    *tensors: Layout | None,
) -> Walk:
    reduces = kernel in (STATS, REDUCE)
    given = [tensor for tensor in tensors if tensor is not None]
    last = given[-1]
    channels = last.shape[1]
    rows = math.prod(last.shape) // channels
    images = [(tensor.strides[0], *tensor.strides[2:]) for tensor in given]
    nest_of = strided.nest_in_order if in_order else strided.nest_of
    nest = nest_of("batch_norm", (last.shape[0], *last.shape[2:]), *images)
    vector = _vector(given, nest)
    config = launch.config(
        kernels.batch_norm_config,
        channels > 1 and last.stride(1) == 1,
        channels,
        max(vector),
        last.itemsize,
        computes(activation),
    )
    blocks = math.ceil(channels / config.kwargs["BLOCK_C"])
    tiles = math.ceil(rows / config.kwargs["BLOCK_R"])
    if reduces:
        least = kernels.MIN_STEPS
        splits = reduce_kernels.num_splits(blocks, tiles, least, kernels.REDUCTIONS)
        steps = math.ceil(tiles / splits)
    else:
        steps = kernels.num_steps(blocks * tiles)
    slices = math.ceil(tiles / steps)
    along = iter(nest.strides)
    # strides of each tensor along the channels and along the nest; zeros for None
    strides: tuple[int, ...] = ()
    for tensor in tensors:
        strides += (0,) * 6 if tensor is None else (tensor.stride(1), *next(along))
    # the rows of the last tiles pass the end
    overrun = (steps + 1) * config.kwargs["BLOCK_R"]
    wide = rows + overrun >= 2**31 or any(strided.is_wide(t.shape, t.strides) for t in given)
    constants = {"INDEX_64": wide, "VECTOR_R": vector[0], "VECTOR_C": vector[1]}
    if kernel != STATS:
        constants["ACTIVATION"] = activation
    if kernel in (REDUCE, GRAD_INPUT):
        constants["FROM_OUTPUT"] = activation is not None and needs_output(activation)
    # channels, rows, tiles of a program, and the loop nest over the rows without the outermost
    sizes = (channels, rows, steps, *nest.sizes[1:])
    numbers = (*sizes, *strides) if count is None else (*sizes, count, *strides)
    prepared = launch.Prepared(
        getattr(stats_kernels if kernel == STATS else kernels, kernel),
        (blocks * slices,),
        numbers,
        config,
        **constants,
    )
    return Walk(slices, prepared)


def _vector(tensors: Sequence[Layout], nest: strided.Nest) -> tuple[int, int]:
    """Rows and channels, 16 bytes at most, that lie together and aligned in every tensor."""
    vector = 16 // tensors[0].itemsize
    along_channels = [tensor.stride(1) for tensor in tensors]
    if all(stride == 1 for stride in along_channels):
        strides = (stride for along in nest.strides for stride in along)
        return 1, math.gcd(vector, tensors[0].shape[1], *strides)
    # the innermost dimension of the nest; those after it are padding of size 1
    inner = max((dim for dim, size in enumerate(nest.sizes) if size > 1), default=0)
    if any(along[inner] != 1 for along in nest.strides):
        return 1, 1
    outer = (s for along in nest.strides for dim, s in enumerate(along) if dim != inner)
    return math.gcd(vector, nest.sizes[inner], *along_channels, *outer), 1
