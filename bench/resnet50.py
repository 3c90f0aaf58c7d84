"""The layers of ResNet-50 as cases, and the network itself in plain torch.nn.

Source: He, Zhang, Ren, Sun, Deep residual learning for image recognition, 2015, with the stride in
the 3x3 convolution, as everybody trains it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.bench.cases import BACKWARD, FORWARD, Case, Planner, of_spec
from tritorch.registry import OpSpec, Sample, specs

# name, how often ResNet-50 has it, channels in and out, kernel, stride, height and width of images
CONVOLUTIONS = (
    ("stem", 1, 3, 64, 7, 2, 224),
    ("s1b0.conv1", 1, 64, 64, 1, 1, 56),
    ("s1.conv2", 3, 64, 64, 3, 1, 56),
    ("s1.conv3", 4, 64, 256, 1, 1, 56),
    ("s1.conv1", 2, 256, 64, 1, 1, 56),
    ("s2b0.conv1", 1, 256, 128, 1, 1, 56),
    ("s2b0.conv2", 1, 128, 128, 3, 2, 56),
    ("s2.conv3", 4, 128, 512, 1, 1, 28),
    ("s2b0.downsample", 1, 256, 512, 1, 2, 56),
    ("s2.conv1", 3, 512, 128, 1, 1, 28),
    ("s2.conv2", 3, 128, 128, 3, 1, 28),
    ("s3b0.conv1", 1, 512, 256, 1, 1, 28),
    ("s3b0.conv2", 1, 256, 256, 3, 2, 28),
    ("s3.conv3", 6, 256, 1024, 1, 1, 14),
    ("s3b0.downsample", 1, 512, 1024, 1, 2, 28),
    ("s3.conv1", 5, 1024, 256, 1, 1, 14),
    ("s3.conv2", 5, 256, 256, 3, 1, 14),
    ("s4b0.conv1", 1, 1024, 512, 1, 1, 14),
    ("s4b0.conv2", 1, 512, 512, 3, 2, 14),
    ("s4.conv3", 3, 512, 2048, 1, 1, 7),
    ("s4b0.downsample", 1, 1024, 2048, 1, 2, 14),
    ("s4.conv1", 2, 2048, 512, 1, 1, 7),
    ("s4.conv2", 2, 512, 512, 3, 1, 7),
)
# channels, height and width of the activations between them
ACTIVATIONS = ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))
SQUARES = (1024, 2048, 4096, 8192)
# rows, outputs and inputs: tiles that are a wave of programs and a bit, the perceptron of a
# vision transformer on 256 images of 197 patches, and a wave or less: a layer of 64 tokens, and
# 1x1 convolutions of batch 32
ODD = (
    ("few-tiles", 1024, 2560, 8192),
    ("vit.fc1", 50432, 3072, 768),
    ("vit.fc2", 50432, 768, 3072),
    ("tokens", 64, 4096, 4096),
    ("s3.conv3-32", 6272, 1024, 256),
    ("s4.conv1-32", 1568, 512, 2048),
)

GRAD_INPUT, GRAD_WEIGHT = "grad_input", "grad_weight"

# how near to zero a sum is too near, and by how much it is moved, more than half a bfloat16's step
_NEAR, _AWAY = 2.0**-10, 2.0**-4


class Shapes:
    """The cases of one batch size; `shrink` divides sizes, so that a CPU can run them."""

    def __init__(self, batch: int, dtype: torch.dtype = torch.bfloat16, shrink: int = 1) -> None:
        self.batch, self.dtype, self.shrink = batch, dtype, shrink
        self._make = Planner(dtype)
        self._specs = {spec.name: spec for spec in specs()}

    def _small(self, size: int, least: int = 1) -> int:
        return max(least, size // self.shrink)

    def _images(self, c: int, size: int) -> Tensor:
        size = self._small(size, 7)
        made = self._make(self.batch, self._channels(c), size, size)
        return made.to(memory_format=torch.channels_last)

    def _channels(self, c: int) -> int:
        return c if c <= 3 else self._small(c, 8)

    def _case(self, op: str, name: str, passes: Any = None, **options: Any) -> Case:
        spec: OpSpec = self._specs[op]
        more = {key: options.pop(key) for key in ("count", "sizes") if key in options}
        return of_spec(spec, Sample(name, **options), self.dtype, passes=passes, **more)

    def convolutions(self) -> Iterator[Case]:
        """The 23 distinct convolutions, three passes of each but the first."""
        for name, count, c, k, kernel, stride, size in CONVOLUTIONS:
            x = self._images(c, size)
            w = self._make(self._channels(k), x.shape[1], kernel, kernel)
            passes = {FORWARD: (), GRAD_INPUT: ("input",), GRAD_WEIGHT: ("weight",)}
            if c == 3:
                # no gradient of the images is needed
                del passes[GRAD_INPUT]
            yield self._case(
                "conv2d",
                name,
                passes,
                input=x,
                weight=w.to(memory_format=torch.channels_last),
                bias=None,
                stride=stride,
                padding=kernel // 2,
                count=count,
                sizes=(*x.shape, w.shape[0], kernel, stride),
            )

    def products(self) -> Iterator[Case]:
        """Square products, odd ones, the classifier, and the convolutions that are products."""
        wanted = [(f"square-{side}", 1, side, side, side) for side in reversed(SQUARES)]
        wanted += [(name, 1, m, n, k) for name, m, n, k in ODD]
        wanted += [("fc", 1, self.batch, 1000, 2048)]
        wanted += [
            (name, count, self.batch * size * size, k, c)
            for name, count, c, k, kernel, stride, size in CONVOLUTIONS
            if kernel == stride == 1
        ]
        for name, count, *sizes in wanted:
            m, n, k = (self._small(size, 8) for size in sizes)
            yield self._case(
                "linear",
                name,
                {FORWARD: (), GRAD_INPUT: ("input",), GRAD_WEIGHT: ("weight",)},
                input=self._make(m, k),
                weight=self._make(n, k),
                count=count,
                sizes=(m, n, k),
            )

    def batch_norms(self) -> Iterator[Case]:
        """Training's batch norm: alone, with a ReLU, with an addition and a ReLU."""
        for c, size in ACTIVATIONS:
            x = self._images(c, size)
            vector = self._make.float32(x.shape[1])
            fused: tuple[tuple[str, dict[str, Any]], ...] = (
                ("batch_norm", {}),
                ("batch_norm_relu", {"activation": "relu"}),
                ("batch_norm_add_relu", {"activation": "relu", "residual": x}),
            )
            for name, more in fused:
                case = self._case(
                    "batch_norm",
                    "",
                    input=x,
                    running_mean=None,
                    running_var=None,
                    weight=vector,
                    bias=vector,
                    training=True,
                    **more,
                )
                settle = _away_from_the_kink if "residual" in more else None
                yield replace(case, op=name, settle=settle)

    def pools(self) -> Iterator[Case]:
        x = self._images(64, 112)
        yield self._case("max_pool2d", "stem", input=x, kernel_size=3, stride=2, padding=1)
        yield self._case("avg_pool2d", "half", input=x, kernel_size=2)
        x = self._images(2048, 7)
        yield self._case("adaptive_avg_pool2d", "global", input=x, output_size=1)

    def elementwise(self) -> Iterator[Case]:
        for c, size in ACTIVATIONS:
            yield self._case("relu", "activation", input=self._images(c, size))
        logits = self._make(self.batch, 1000)
        target = self._make.classes(self.batch, count=1000)
        yield self._case("cross_entropy", "imagenet", input=logits, target=target)

    def network(self) -> Iterator[Case]:
        """What a train step calls, but for the optimizer."""
        yield from self.convolutions()
        yield from map(self._with_norm, self.convolutions())
        widths = {(k, size // stride) for _, _, _, k, _, stride, size in CONVOLUTIONS}
        for c, size in sorted(widths):
            x, vector = self._images(c, size), self._make.float32(self._channels(c))
            yield self._case(
                "batch_norm",
                "network",
                input=x,
                running_mean=vector,
                running_var=vector,
                weight=vector,
                bias=vector,
                training=True,
            )
            yield self._case("relu", "network", input=x)
        yield from self.pools()
        x, w = self._make(self.batch, 2048), self._make(1000, 2048)
        yield self._case("linear", "network", input=x, weight=w, bias=self._make(1000))
        logits = Planner(torch.float32)(self.batch, 1000)
        target = self._make.classes(self.batch, count=1000)
        yield self._case("cross_entropy", "network", input=logits, target=target)

    def _with_norm(self, case: Case) -> Case:
        """A convolution and what follows it in the network, as `tritorch.fuse` joins them."""
        given: dict[str, Any] = {k: value for k, value in case.arguments.items() if k != "bias"}
        x, weight = case.first, given["weight"]
        vector = self._make.float32(weight.shape[0])
        if not case.name.endswith("downsample"):
            given["activation"] = "relu"
        if case.name.endswith("conv3"):
            pixels = x.shape[2:]
            given["residual"] = self._make(self.batch, vector.shape[0], *pixels).to(
                memory_format=torch.channels_last
            )
        norm = dict.fromkeys(("running_mean", "running_var", "norm_weight", "norm_bias"), vector)
        of = [name for name in ("input", "weight", "residual") if name in given]
        if GRAD_INPUT not in case.passes:
            of.remove("input")
        passes = {FORWARD: (), BACKWARD: (*of, "norm_weight", "norm_bias")}
        return self._case("conv2d_batch_norm", case.name, passes, training=True, **given, **norm)

    def host(self) -> Iterator[Case]:
        """Calls so small that a GPU is done with them before Python has prepared the next."""
        images = self._make(8, 64, 8, 8).to(memory_format=torch.channels_last)
        filters = self._make(64, 64, 3, 3).to(memory_format=torch.channels_last)
        square, vector = self._make(64, 64), self._make.float32(64)
        calls: dict[str, dict[str, Any]] = {
            "conv2d": {"input": images, "weight": filters, "bias": None, "padding": 1},
            "batch_norm": {
                "input": images, "running_mean": None, "running_var": None, "weight": vector,
                "bias": vector, "training": True,
            },
            "relu": {"input": images},
            "linear": {"input": square, "weight": square},
            "matmul": {"input": square, "other": square},
            "max_pool2d": {"input": images, "kernel_size": 2},
            "avg_pool2d": {"input": images, "kernel_size": 2},
        }  # fmt: skip
        for op, arguments in calls.items():
            yield self._case(op, "host", {FORWARD: ()}, **arguments)
        for op in ("conv2d", "batch_norm", "relu", "linear"):
            yield self._case(op, "host", {BACKWARD: self._gradients(op, calls[op])}, **calls[op])

    def _gradients(self, op: str, arguments: dict[str, Any]) -> tuple[str, ...]:
        return tuple(n for n in self._specs[op].gradients if arguments.get(n) is not None)


def _away_from_the_kink(arguments: dict[str, Any]) -> None:
    """Moves the residual where its sum with a batch norm is so close to zero that rounding decides
    on which side of ReLU's kink it is: of both gradients each is right there, and among a hundred
    million numbers there are some.
    """
    input, residual = arguments["input"], arguments["residual"]
    weight, bias = arguments["weight"], arguments["bias"]
    y = F.batch_norm(input.float(), None, None, weight, bias, training=True).add_(residual)
    step = torch.where(y.abs() < _NEAR, torch.copysign(y.new_full((), _AWAY), y), 0.0)
    residual.add_(step)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width, and what goes past them."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        past = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += past
        out: Tensor = self.relu(y)
        return out


class ResNet50(nn.Module):
    """25,557,032 parameters, for images of 224 by 224 pixels in 1,000 classes."""

    def __init__(self, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], 64
        for number, count in enumerate(blocks):
            width = 64 << number
            stage = []
            for block in range(count):
                stage.append(Bottleneck(inputs, width, 2 if number and not block else 1))
                inputs = 4 * width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(self.stages(x)), 1))
        return logits
