"""Convolutions on descriptors, in tiles small enough for an interpreter, and their gradients."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tritorch import backend, hardware, launch, ops
from tritorch.ops import conv_tma, conv_weight_tma

last = torch.channels_last
FORWARD, WEIGHT, PORTABLE = "conv2d_tma_kernel", "conv2d_grad_weight_tma_kernel", "conv2d_kernel"


class Case(NamedTuple):
    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dilation: int = 1
    groups: int = 1
    activation: str | None = None
    # channels written, pixels, channels read; of a filter's gradient channels, channels, pixels and
    # taps
    tile: tuple[int, ...] = (16, 16, 16)
    weight_tile: tuple[int, ...] = (16, 16, 16, 1)
    dtype: torch.dtype = torch.float16
    persistent: bool = False

    def make(self, device="cpu"):
        """Image, filters, bias and the gradient of the output."""
        generator = torch.Generator().manual_seed(3)

        def made(*shape):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            order = last if len(shape) == 4 else torch.contiguous_format
            return values.to(device, self.dtype).contiguous(memory_format=order)

        x, w = made(*self.input), made(*self.weight)
        y = self.reference(x, w, None)
        return x, w, made(self.weight[0]), made(*y.shape)

    def geometry(self):
        return self.stride, self.padding, self.dilation, self.groups

    def reference(self, x, w, bias):
        y = F.conv2d(x, w, bias, *self.geometry())
        return y.relu() if self.activation == "relu" else y

    def run(self, x, w, bias):
        return ops.conv2d(x, w, bias, *self.geometry(), activation=self.activation)


@contextlib.contextmanager
def tiles(case):
    convolutions, weights = conv_tma.configs, conv_weight_tma.kernels
    with (
        hardware.pretend(90),
        launch.override("conv2d_tma_config", convolutions._tile(*case.tile, 4, 2, case.persistent)),
        launch.override("conv2d_grad_weight_tma_config", weights._tile(*case.weight_tile, 4, 2)),
        backend.use("triton"),
        backend.strict(),
        launch.recorded() as names,
    ):
        yield names


def gradients(run, operands, grad):
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    y = run(*leaves)
    return (y, *torch.autograd.grad(y, leaves, grad))


CASES = {
    # every axis has a tile that ends past it, rows of one tile and channels of the next
    "3x3": Case((4, 24, 3, 5), (24, 24, 3, 3)),
    "bfloat16": Case((2, 16, 4, 4), (16, 16, 3, 3), dtype=torch.bfloat16),
    "relu": Case((2, 16, 4, 4), (32, 16, 3, 3), activation="relu"),
    "pairs": Case((2, 16, 6, 8), (16, 16, 3, 3), stride=2),
    "odd-stride-2": Case((16, 16, 3, 5), (16, 16, 3, 3), stride=2, weight_tile=(16, 16, 16, 3)),
    "dilation": Case((16, 16, 3, 4), (16, 16, 3, 3), padding=2, dilation=2),
    "groups": Case((2, 32, 4, 4), (32, 16, 3, 3), groups=2),
    "groups-pairs": Case((4, 32, 4, 4), (32, 16, 3, 3), stride=2, groups=2),
    "three-taps": Case((16, 16, 4, 3), (16, 16, 3, 3), weight_tile=(16, 16, 16, 3)),
    "columns": Case((1, 16, 3, 16), (16, 16, 3, 3), weight_tile=(16, 16, 16, 3)),
    "split": Case((1, 144, 4, 4), (16, 144, 3, 1), padding=(1, 0)),
    # programs have several tiles, and the two that there are not the same number
    "persistent": Case((5, 32, 4, 4), (32, 32, 3, 1), padding=(1, 0), persistent=True),
    "persistent-pairs": Case(
        (4, 32, 4, 8), (32, 16, 3, 2), stride=2, padding=(1, 0), groups=2, persistent=True
    ),
    # tiles of single pixels leave out the taps that read nothing, and corners have none left
    "edges": Case((16, 16, 3, 3), (16, 16, 3, 3)),
    "edges-persistent": Case((16, 16, 3, 4), (32, 16, 3, 2), persistent=True),
    "edges-stride-2": Case((16, 16, 4, 6), (16, 16, 4, 3), stride=2, padding=(2, 1)),
    "edges-split": Case((16, 144, 1, 3), (16, 144, 1, 3), padding=(0, 1)),
    "edges-groups": Case((16, 32, 3, 3), (32, 16, 2, 3), padding=2, dilation=2, groups=2),
    "corners": Case((16, 16, 2, 2), (16, 16, 3, 2), padding=4),
    "1x1-stride-2": Case((16, 16, 3, 3), (16, 16, 1, 1), stride=2, padding=0),
}
