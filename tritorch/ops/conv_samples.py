"""Samples, workloads and refused calls of the convolution of images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Maker, Reject, Sample


def samples(make: Maker) -> Iterator[Sample]:
    def sample(
        name: str,
        input: tuple[int, ...],
        weight: tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
        size: tuple[int, ...] | None = None,
        channels_last: bool = False,
        layouts: bool = False,
        gradcheck: bool = False,
    ) -> Sample:
        x, w = make(*input), make(*weight)
        # of the size of the output
        residual = None if size is None else make(*input[:-3], weight[0], *size)
        if channels_last:
            x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
        return Sample(
            name,
            layouts=layouts,
            gradcheck=gradcheck,
            input=x,
            weight=w,
            bias=make(weight[0]) if bias else None,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            activation=activation,
            residual=residual,
        )

    image, filters = (2, 5, 6, 7), (18, 5, 3, 3)
    last: dict[str, Any] = {"channels_last": True}
    yield sample("3x3", image, filters, padding=1, layouts=True)
    yield sample("1x1", (2, 17, 5, 3), (19, 17, 1, 1))
    yield sample("valid", image, (18, 5, 3, 2), padding="valid", bias=False)
    yield sample("stride-2", (2, 9, 7, 9), (10, 9, 3, 3), stride=2, padding=1)
    yield sample("stem", (1, 3, 13, 15), (20, 3, 7, 7), stride=2, padding=3, **last)
    yield sample("dilation", (1, 6, 9, 8), (7, 6, 3, 3), padding=2, dilation=2)
    yield sample("stride-3-dilation-2", image, (6, 5, 3, 4), stride=3, padding=3, dilation=2)
    # two rows and six columns share a divisor with the stride: some residues are reached by no tap
    yield sample("common-divisor", (1, 5, 14, 9), (6, 5, 2, 1), stride=(4, 2), dilation=(6, 2))
    yield sample(
        "asymmetric", (2, 5, 9, 12), (6, 5, 2, 3), stride=(3, 2), padding=(0, 2), dilation=(2, 1)
    )
    yield sample("gaps", (1, 5, 8, 9), (4, 5, 2, 1), stride=4)
    yield sample("same-even", image, (6, 5, 4, 2), padding="same")
    yield sample("larger-than-image", (2, 5, 2, 1), (6, 5, 5, 4), padding=(2, 3))
    yield sample("one-pixel", (2, 5, 1, 1), (6, 5, 1, 1))
    yield sample("groups", (2, 12, 5, 6), (10, 6, 3, 3), padding=1, groups=2)
    yield sample("few-per-group", (1, 6, 5, 6), (6, 2, 3, 3), padding=1, groups=3, **last)
    yield sample("depthwise", (2, 5, 6, 7), (5, 1, 3, 3), padding=1, groups=5)
    yield sample("depthwise-multiplier", (2, 3, 7, 6), (6, 1, 3, 3), stride=2, groups=3, **last)
    yield sample("depthwise-5x5", (1, 16, 5, 4), (16, 1, 5, 5), padding=2, groups=16, **last)
    yield sample("depthwise-same", image, (5, 1, 2, 4), padding="same", dilation=(1, 3), groups=5)
    yield sample("depthwise-gaps", (1, 5, 8, 9), (5, 1, 2, 1), stride=4, groups=5)
    # sums over several tiles of pixels each
    yield sample("depthwise-splits", (1, 2, 23, 23), (2, 1, 3, 3), padding=1, groups=2)
    yield sample("unbatched", (5, 6, 4), (6, 5, 3, 3), padding=1)
    yield sample("relu", image, filters, padding=1, activation="relu", **last)
    yield sample("relu-split-sum", (1, 256, 2, 1), (16, 256, 1, 1), activation="relu", **last)
    yield sample("relu-depthwise", image, (5, 1, 3, 3), groups=5, activation="relu")
    yield sample("residual", image, filters, size=(4, 5), activation="relu", layouts=True)
    yield sample("residual-last", (2, 8, 6, 7), (16, 8, 3, 3), size=(4, 5), **last)
    yield sample("residual-edges", (1, 33, 3, 4), (65, 33, 3, 3), size=(3, 4), padding=1)
    yield sample(
        "residual-groups", (2, 12, 5, 6), (10, 6, 3, 3), size=(5, 6), padding=1, groups=2, **last
    )
    yield sample(
        "residual-depthwise", image, (5, 1, 3, 3), size=(4, 5), groups=5, activation="relu"
    )
    yield sample(
        "residual-split-sum", (1, 256, 2, 1), (16, 256, 1, 1), size=(2, 1), activation="relu"
    )
    # copied to channels_last with the images
    yield sample("residual-many-channels", (2, 32, 3, 5), (24, 32, 3, 3), size=(3, 5), padding=1)
    yield sample("residual-unbatched", (5, 6, 4), (6, 5, 3, 3), size=(4, 2), bias=False)
    yield sample("residual-empty-batch", (0, 5, 6, 4), (6, 5, 3, 3), size=(4, 2))
    yield sample("empty-batch", (0, 5, 6, 4), (6, 5, 3, 3), padding=1)
    yield sample("empty-batch-depthwise", (0, 5, 6, 4), (5, 1, 3, 3), padding=1, groups=5)
    # enough products of 16-bit numbers for copies in channels_last
    yield sample("many-channels", (2, 16, 3, 5), (24, 16, 3, 3), padding=1)
    # channels along memory that are no whole vectors
    yield sample("fours", (1, 12, 4, 5), (20, 12, 1, 1), **last)
    yield sample("tile-edges", (1, 33, 3, 4), (65, 33, 3, 3), padding=1)
    yield sample("channel-blocks", (1, 120, 2, 3), (40, 120, 2, 1), padding=(1, 0), **last)
    yield sample("split-sum", (1, 256, 2, 1), (16, 256, 3, 1), padding=(1, 0), **last)
    yield sample("pixel-tiles", (1, 5, 12, 13), (18, 5, 1, 1), **last)
    yield sample("tiny", (1, 2, 3, 1), (5, 2, 2, 1), stride=2, padding=(1, 0), gradcheck=True)
    yield sample(
        "tiny-depthwise", (1, 2, 2, 2), (2, 1, 2, 1), padding=(1, 0), groups=2, gradcheck=True
    )
    yield sample(
        "tiny-residual", (1, 2, 2, 1), (2, 2, 2, 1), size=(1, 1), activation="relu", gradcheck=True
    )


# name, batch, channels in and out, image, kernel, stride, groups, activation; half of the kernel is
# padding
_LAYERS = (
    ("resnet50-s1-3x3", 64, 64, 64, 56, 3, 1, 1, None),
    ("resnet50-stem", 64, 3, 64, 224, 7, 2, 1, None),
    ("resnet50-s1-1x1", 64, 64, 256, 56, 1, 1, 1, None),
    ("resnet50-s2-3x3-stride-2", 64, 128, 128, 56, 3, 2, 1, None),
    ("resnet50-s3-3x3", 64, 256, 256, 14, 3, 1, 1, None),
    ("resnet50-s4-3x3", 64, 512, 512, 7, 3, 1, 1, None),
    ("resnet50-s4-1x1-stride-2", 64, 1024, 2048, 14, 1, 2, 1, None),
    ("resnet50-s4-3x3-batch-1", 1, 512, 512, 7, 3, 1, 1, None),
    ("mobilenet-96-stride-2", 64, 96, 96, 112, 3, 2, 96, None),
    ("mobilenet-144", 64, 144, 144, 56, 3, 1, 144, None),
    ("resnext50-32x4d", 64, 128, 128, 56, 3, 1, 32, None),
    # what computes in its epilogue takes another tile where the largest would be taken
    ("convnext-s1-1x1-gelu", 64, 96, 384, 56, 1, 1, 1, "gelu"),
    ("resnet50-s1-3x3-gelu", 64, 64, 64, 56, 3, 1, 1, "gelu"),
    ("efficientnet-144-silu", 64, 144, 144, 56, 3, 1, 144, "silu"),
)


def workloads(make: Maker) -> Iterator[Sample]:
    for name, n, c, k, size, kernel, stride, groups, activation in _LAYERS:
        for order in (torch.channels_last, torch.contiguous_format):
            nchw = order == torch.contiguous_format
            if nchw and name not in ("resnet50-s2-3x3-stride-2", "mobilenet-144"):
                continue
            yield Sample(
                f"{name}-contiguous" if nchw else name,
                input=make.empty(n, c, size, size).contiguous(memory_format=order),
                weight=make.empty(k, c // groups, kernel, kernel).contiguous(memory_format=order),
                bias=None,
                stride=stride,
                padding=kernel // 2,
                dilation=1,
                groups=groups,
                activation=activation,
            )
    # what a folded batch norm leaves of the last convolution of a block, and of a whole one
    for name, c, k, size, kernel in (
        ("resnet50-s1-1x1-residual", 64, 256, 56, 1),
        ("resnet34-s2-3x3-residual", 128, 128, 28, 3),
        ("resnet18-s1-3x3-residual", 64, 64, 56, 3),
    ):
        images, added, filters = (
            make.empty(*shape).contiguous(memory_format=torch.channels_last)
            for shape in ((64, c, size, size), (64, k, size, size), (k, c, kernel, kernel))
        )
        yield Sample(
            name,
            input=images,
            weight=filters,
            bias=make.empty(k),
            stride=1,
            padding=kernel // 2,
            dilation=1,
            groups=1,
            activation="relu",
            residual=added,
        )


def rejects(make: Maker) -> Iterator[Reject]:
    x, w = make(2, 4, 8, 8), make(6, 4, 3, 3)

    def reject(
        name: str, message: str, *, input: Tensor = x, weight: Tensor = w, **arguments: Any
    ) -> Reject:
        return Reject(name, f"conv2d: {message}", input=input, weight=weight, **arguments)

    channels, positive = "weight expects", "stride and dilation must be positive"
    yield reject(
        "channels", rf"{channels} 5 input channels.*\(6, 5, 3, 3\)", weight=make(6, 5, 3, 3)
    )
    yield reject("groups-in", rf"{channels} 6 .*groups 2", weight=make(6, 3, 3, 3), groups=2)
    yield reject("groups-out", "6 output channels do not divide", weight=make(6, 1, 3, 3), groups=4)
    yield reject("groups-zero", "groups must be positive.*groups 0", groups=0)
    yield reject("padding-negative", "padding must not be negative.*-1", padding=(0, -1))
    yield reject("padding-word", "padding must be 'same', 'valid'.*'full'", padding="full")
    yield reject("padding-three", "padding must be one integer or 2", padding=(1, 1, 1))
    yield reject("same-stride", "padding 'same' takes a stride of 1", padding="same", stride=(2, 1))
    yield reject("stride-zero", rf"{positive}.*stride \(0, 0\)", stride=0)
    yield reject("dilation-zero", rf"{positive}.*dilation \(1, 0\)", dilation=(1, 0))
    yield reject("kernel", "the filter is larger than the padded", weight=make(6, 4, 3, 9))
    yield reject(
        "no-rows", "the filter is larger than the padded", input=make(2, 4, 0, 8), padding=2
    )
    yield reject("input-dim", "input must have 4 dimensions", input=make(8, 8))
    yield reject("weight-dim", "weight must have 4 dimensions", weight=make(6, 4, 3))
    yield reject("weight-empty", "weight must have 4 .*none empty", weight=make(0, 4, 3, 3))
    yield reject("bias", r"bias must have 6 elements.*\(5,\)", bias=make(5))
    yield reject("bias-dim", r"bias must have 6 elements.*\(6, 1\)", bias=make(6, 1))
    yield reject(
        "activation",
        r"activation must be None or one of relu, .*'softplus'",
        raises=ValueError,
        activation="softplus",
    )
    # torch would broadcast the one, and promote the other
    yield reject(
        "residual-shape",
        r"residual must have the result's shape.*\(2, 6, 6, 6\).*\(2, 6, 1, 1\)",
        raises=RuntimeError,
        residual=make(2, 6, 1, 1),
    )
    yield reject(
        "residual-dtype",
        "expected residual of the input's dtype",
        raises=RuntimeError,
        residual=make(2, 6, 6, 6).double(),
    )
    # on the reference path the message is torch's
    dtype = "conv2d: expected weight of the input's dtype|should be the same"
    yield Reject("dtype", dtype, input=x, weight=w.double())
    yield reject("not-a-tensor", "input must be a Tensor, not list", input=[x])  # type: ignore[arg-type]
