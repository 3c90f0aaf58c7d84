"""Samples, workloads and refused calls of transposed convolutions, by the number of axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Maker, Reject, Sample


def _sample(
    make: Maker,
    name: str,
    input: tuple[int, ...],
    weight: tuple[int, ...],
    *,
    bias: bool = True,
    channels_last: bool = False,
    layouts: bool = False,
    gradcheck: bool = False,
    **given: Any,
) -> Sample:
    x, w = make(*input), make(*weight)
    if channels_last:
        order = torch.channels_last if len(weight) == 4 else torch.channels_last_3d
        x, w = (t.contiguous(memory_format=order) for t in (x, w))
    steps = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1, **given}
    outputs = weight[1] * steps["groups"]
    return Sample(
        name,
        layouts=layouts,
        gradcheck=gradcheck,
        input=x,
        weight=w,
        bias=make(outputs) if bias else None,
        **steps,
    )


def samples_1d(make: Maker) -> Iterator[Sample]:
    yield _sample(make, "typical", (2, 5, 9), (5, 6, 4), stride=2, padding=1, layouts=True)
    yield _sample(make, "gaps", (1, 3, 4), (3, 4, 2), stride=3, output_padding=2, bias=False)
    yield _sample(make, "dilation", (2, 4, 5), (4, 3, 3), dilation=3, padding=2, output_padding=2)
    yield _sample(make, "depthwise", (2, 5, 6), (5, 1, 3), stride=2, padding=1, groups=5)
    yield _sample(make, "many-channels", (1, 32, 9), (32, 24, 7), stride=2, padding=2)
    yield _sample(make, "unbatched", (4, 5), (4, 3, 3), padding=(1,))
    yield _sample(make, "empty-batch", (0, 4, 5), (4, 3, 3))
    yield _sample(make, "tiny", (1, 1, 2), (1, 2, 2), stride=2, padding=1, gradcheck=True)


def samples_2d(make: Maker) -> Iterator[Sample]:
    yield _sample(make, "typical", (2, 5, 4, 5), (5, 6, 3, 3), stride=2, padding=1, layouts=True)
    yield _sample(
        make, "output-padding", (1, 3, 4, 3), (3, 4, 3, 2), stride=(2, 3), output_padding=(1, 2)
    )
    yield _sample(
        make,
        "dilation",
        (1, 5, 3, 4),
        (5, 4, 3, 2),
        stride=(2, 1),
        padding=(1, 2),
        output_padding=(2, 1),
        dilation=(3, 2),
        bias=False,
    )
    yield _sample(make, "gaps", (2, 4, 3, 2), (4, 3, 1, 2), stride=3)
    yield _sample(make, "groups", (2, 6, 4, 3), (6, 2, 3, 3), padding=1, groups=2)
    yield _sample(
        make, "depthwise", (1, 8, 4, 3), (8, 1, 4, 4), stride=2, groups=8, channels_last=True
    )
    yield _sample(make, "one-output", (1, 5, 3, 4), (5, 1, 2, 2), stride=2)
    yield _sample(make, "channels-last", (1, 16, 3, 4), (16, 8, 2, 2), channels_last=True)
    yield _sample(make, "split-sum", (1, 256, 1, 2), (256, 16, 1, 3), channels_last=True)
    # enough products of 16-bit numbers for copies in channels_last
    yield _sample(make, "many-channels", (1, 16, 3, 4), (16, 24, 3, 4), padding=1)
    yield _sample(make, "unbatched", (4, 3, 5), (4, 3, 3, 3), padding=2)
    yield _sample(make, "empty-batch", (0, 4, 3, 5), (4, 3, 3, 3))
    yield _sample(make, "tiny", (1, 1, 2, 1), (1, 2, 2, 1), stride=(2, 1), gradcheck=True)


def samples_3d(make: Maker) -> Iterator[Sample]:
    yield _sample(
        make, "typical", (2, 3, 2, 3, 2), (3, 4, 3, 2, 2), stride=(2, 1, 1), padding=1, layouts=True
    )
    yield _sample(
        make,
        "dilation",
        (1, 2, 3, 2, 2),
        (2, 3, 2, 2, 3),
        stride=(3, 1, 2),
        padding=(1, 0, 2),
        output_padding=(2, 1, 0),
        dilation=(2, 3, 1),
        bias=False,
    )
    yield _sample(make, "groups", (2, 4, 2, 2, 3), (4, 2, 2, 1, 2), groups=2)
    yield _sample(make, "depthwise", (1, 2, 2, 2, 3), (2, 1, 2, 3, 2), stride=(1, 2, 1), groups=2)
    yield _sample(make, "many-channels", (1, 16, 2, 3, 2), (16, 16, 3, 2, 2), padding=1)
    yield _sample(make, "unbatched", (3, 2, 2, 2), (3, 2, 2, 2, 2))
    yield _sample(make, "empty-batch", (0, 3, 2, 2, 2), (3, 2, 2, 2, 2))
    yield _sample(make, "tiny", (1, 1, 2, 1, 1), (1, 2, 2, 1, 1), stride=(2, 1, 1), gradcheck=True)


# name, batch, channels in and out, axes, kernel, stride, padding, groups
_LAYERS: dict[int, tuple[Any, ...]] = {
    1: (
        ("hifigan-512", 16, 512, 256, (256,), 16, 8, 4, 1),
        ("decoder-256", 16, 256, 256, (1024,), 7, 1, 3, 1),
        ("upsample-depthwise", 16, 256, 256, (1000,), 4, 2, 1, 256),
    ),
    2: (
        ("unet-up-512", 32, 512, 256, (32, 32), 2, 2, 0, 1),
        ("dcgan-256", 64, 256, 128, (16, 16), 4, 2, 1, 1),
        ("upsample-depthwise", 32, 96, 96, (56, 56), 4, 2, 1, 96),
    ),
    3: (("unet3d-up-256", 2, 256, 128, (16, 16, 16), 2, 2, 0, 1),),
}


def workloads_of(axes: int) -> Callable[[Maker], Iterator[Sample]]:
    def workloads(make: Maker) -> Iterator[Sample]:
        order = {2: torch.channels_last, 3: torch.channels_last_3d}
        for name, n, c, k, size, kernel, stride, padding, groups in _LAYERS[axes]:
            memory_format = order.get(axes, torch.contiguous_format)
            yield Sample(
                name,
                input=make.empty(n, c, *size).contiguous(memory_format=memory_format),
                weight=make.empty(c, k // groups, *(kernel,) * axes),
                bias=make.empty(k),
                stride=stride,
                padding=padding,
                output_padding=0,
                groups=groups,
                dilation=1,
            )

    return workloads


def rejects_of(axes: int) -> Callable[[Maker], Iterator[Reject]]:
    op = f"conv_transpose{axes}d"

    def rejects(make: Maker) -> Iterator[Reject]:
        x, w = make(2, 4, *(5,) * axes), make(4, 6, *(3,) * axes)

        def reject(
            name: str, message: str, *, input: Tensor = x, weight: Tensor = w, **arguments: Any
        ) -> Reject:
            return Reject(name, f"{op}: {message}", input=input, weight=weight, **arguments)

        yield reject("channels", "weight expects 5", weight=make(5, 6, *(3,) * axes))
        yield reject("input-dim", f"input must have {axes + 2} dimensions", input=make(5))
        yield reject("bias", "bias must have 6 elements", bias=make(5))
        yield reject("output-padding", "output_padding must be smaller", stride=2, output_padding=2)
        if axes != 2:
            return
        yield reject("groups-in", "4 input channels do not divide into groups", groups=3)
        yield reject("groups-zero", "groups must be positive", groups=0)
        yield reject("weight-dim", "weight must have 4 dimensions", weight=make(4, 6, 3))
        yield reject("weight-empty", "weight has no output", weight=make(4, 0, 3, 3))
        yield reject("bias-groups", "bias must have 12 elements", bias=make(6), groups=2)
        yield reject("padding-word", "padding must be integers", padding="same")
        yield reject("padding-negative", "padding must not be negative", padding=-1)
        yield reject(
            "output-padding-negative", "padding must not be negative", stride=2, output_padding=-1
        )
        yield reject("padding-large", "the output has no pixels", padding=4)
        yield reject("no-rows", "the output has no pixels", input=make(2, 4, 0, 5))
        yield reject("stride-zero", "stride and dilation must be positive", stride=0)
        yield reject("dilation-zero", "stride and dilation must be positive", dilation=(1, 0))
        yield Reject(
            "not-a-tensor",
            f"{op}: input must be a Tensor, not list",
            input=[x],
            weight=w,
        )

    return rejects
