"""One call of every layer of tritorch.nn, or several, for the tests that loop over them."""

import inspect
from typing import NamedTuple

import pytest
import torch

IMAGES = (2, 3, 6, 5)
VOLUMES = (2, 3, 4, 5, 6)


class Case(NamedTuple):
    """One layer and one call: `input` and, for losses, the kind of target."""

    layer: str
    arguments: dict
    input: tuple[int, ...]
    target: str | None = None


# younger than the oldest torch that we take
TAKES_BIAS = "bias" in inspect.signature(torch.nn.BatchNorm2d).parameters
NO_BIAS = {"bias": False} if TAKES_BIAS else {}
CASES = [
    Case("Linear", {"in_features": 5, "out_features": 3}, (4, 5)),
    Case("Linear", {"in_features": 5, "out_features": 3, "bias": False}, (2, 2, 5)),
    Case("Conv2d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3}, IMAGES),
    Case(
        "Conv2d",
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": (1, 0),
            "dilation": (1, 2),
            "groups": 2,
            "bias": False,
        },
        (2, 4, 6, 5),
    ),
    Case(
        "Conv2d",
        {"in_channels": 3, "out_channels": 2, "kernel_size": 3, "padding": "same"},
        IMAGES[1:],
    ),
    *(
        Case(
            "Conv2d",
            {
                "in_channels": 3,
                "out_channels": 2,
                "kernel_size": 3,
                "stride": 2,
                "padding": (1, 2),
                "padding_mode": mode,
            },
            IMAGES,
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    Case("Conv1d", {"in_channels": 3, "out_channels": 4, "kernel_size": 3}, (2, 3, 7)),
    Case(
        "Conv1d",
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 3,
            "stride": 2,
            "padding": 2,
            "dilation": 2,
            "groups": 2,
            "padding_mode": "reflect",
        },
        (4, 9),
    ),
    Case("Conv3d", {"in_channels": 3, "out_channels": 2, "kernel_size": 2}, VOLUMES),
    Case(
        "Conv3d",
        {
            "in_channels": 3,
            "out_channels": 3,
            "kernel_size": (1, 2, 3),
            "padding": "same",
            "groups": 3,
            "padding_mode": "circular",
        },
        VOLUMES[1:],
    ),
    *(
        Case(
            f"ConvTranspose{axes}d",
            {
                "in_channels": 4,
                "out_channels": 6,
                "kernel_size": (1, 2, 3)[-axes:],
                "stride": 2,
                "padding": 1,
                "output_padding": 1,
                "groups": 2,
                "dilation": 2,
            },
            (2, 4, 3, 2, 2)[: axes + 2],
        )
        for axes in (1, 2, 3)
    ),
    Case("MaxPool2d", {"kernel_size": 2}, IMAGES),
    Case(
        "MaxPool2d",
        {
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": 1,
            "dilation": (1, 2),
            "ceil_mode": True,
            "return_indices": True,
        },
        IMAGES,
    ),
    Case("AvgPool2d", {"kernel_size": 2}, IMAGES),
    Case(
        "AvgPool2d",
        {
            "kernel_size": (3, 2),
            "stride": (2, 1),
            "padding": (1, 0),
            "ceil_mode": True,
            "count_include_pad": False,
        },
        IMAGES,
    ),
    Case("AvgPool2d", {"kernel_size": 3, "padding": 1, "divisor_override": 5}, IMAGES),
    Case("MaxPool1d", {"kernel_size": 3, "padding": 1, "return_indices": True}, (2, 3, 9)),
    Case("AvgPool1d", {"kernel_size": 3, "stride": 2, "ceil_mode": True}, (3, 8)),
    Case("MaxPool3d", {"kernel_size": 2, "dilation": (1, 2, 1), "ceil_mode": True}, VOLUMES),
    Case("AvgPool3d", {"kernel_size": 3, "padding": 1, "count_include_pad": False}, VOLUMES),
    Case("AvgPool3d", {"kernel_size": 2, "divisor_override": 5}, VOLUMES),
    Case("AdaptiveAvgPool1d", {"output_size": 4}, (2, 3, 9)),
    Case("AdaptiveAvgPool2d", {"output_size": 1}, IMAGES),
    Case("AdaptiveAvgPool2d", {"output_size": (None, 3)}, IMAGES),
    Case("AdaptiveAvgPool3d", {"output_size": (2, 1, 3)}, VOLUMES),
    Case("AdaptiveMaxPool2d", {"output_size": (4, 3), "return_indices": True}, IMAGES),
    Case("BatchNorm1d", {"num_features": 3}, (4, 3)),
    Case("BatchNorm1d", {"num_features": 3}, (4, 3, 5)),
    Case("BatchNorm2d", {"num_features": 3}, IMAGES),
    Case("BatchNorm2d", {"num_features": 3, **NO_BIAS, "eps": 1e-2}, IMAGES),
    Case("BatchNorm3d", {"num_features": 3}, (2, 3, 2, 2, 3)),
    Case("GroupNorm", {"num_groups": 2, "num_channels": 4}, (2, 4, 3, 5)),
    Case("GroupNorm", {"num_groups": 1, "num_channels": 4, "affine": False}, (3, 4)),
    Case("InstanceNorm1d", {"num_features": 3}, (2, 3, 7)),
    Case("InstanceNorm1d", {"num_features": 3, "affine": True}, (3, 7)),
    Case("InstanceNorm2d", {"num_features": 3, "affine": True, "eps": 1e-2}, IMAGES),
    Case("InstanceNorm2d", {"num_features": 3, "track_running_stats": True}, IMAGES),
    Case("InstanceNorm3d", {"num_features": 3, "affine": True, "momentum": None}, VOLUMES),
    Case("LayerNorm", {"normalized_shape": 5}, IMAGES),
    Case("LayerNorm", {"normalized_shape": (3, 6, 5), "eps": 1e-2, **NO_BIAS}, IMAGES),
    Case("LayerNorm", {"normalized_shape": (5,), "elementwise_affine": False}, (5,)),
    Case("ReLU", {}, IMAGES),
    Case("ReLU", {"inplace": True}, IMAGES),
    Case("ReLU6", {"inplace": True}, IMAGES),
    Case("LeakyReLU", {"negative_slope": 0.2}, IMAGES),
    Case("LeakyReLU", {"inplace": True}, IMAGES),
    Case("SiLU", {"inplace": True}, IMAGES),
    Case("GELU", {}, IMAGES),
    Case("GELU", {"approximate": "tanh"}, IMAGES),
    Case("Sigmoid", {}, IMAGES),
    Case("Softmax", {"dim": 1}, IMAGES),
    Case("LogSoftmax", {"dim": -1}, IMAGES),
    # another probability gives other zeros than torch's
    Case("Dropout", {"p": 1.0, "inplace": True}, IMAGES),
    Case("Tanh", {}, IMAGES),
    Case("Hardswish", {"inplace": True}, IMAGES),
    Case("Hardsigmoid", {"inplace": True}, IMAGES),
    Case("CrossEntropyLoss", {}, (4, 3), "classes"),
    Case("CrossEntropyLoss", {"label_smoothing": 0.1}, (4, 3, 2), "classes"),
    Case("CrossEntropyLoss", {"ignore_index": 1, "reduction": "sum"}, (6, 3), "classes"),
    Case("CrossEntropyLoss", {"weight": [0.5, 1.0, 2.0]}, (4, 3), "classes"),
    Case("CrossEntropyLoss", {"reduction": "none"}, (4, 3), "probabilities"),
    Case("NLLLoss", {}, (4, 3), "classes"),
    Case("NLLLoss", {"weight": [0.5, 1.0, 2.0], "ignore_index": 1}, (4, 3, 2), "classes"),
    Case("NLLLoss", {"reduction": "none"}, (6, 3, 2, 2), "classes"),
    Case("MSELoss", {}, (4, 3), "values"),
    Case("MSELoss", {"reduction": "none"}, (4, 3), "values"),
    Case("L1Loss", {}, (4, 3), "values"),
    Case("SmoothL1Loss", {"beta": 0.5}, (4, 3), "values"),
    Case("SmoothL1Loss", {"beta": 0.0, "reduction": "sum"}, (4, 3), "values"),
    Case("HuberLoss", {"delta": 0.5, "reduction": "none"}, (4, 3), "values"),
    Case("BCELoss", {}, (4, 3), "probabilities"),
    Case("BCELoss", {"weight": [0.5, 1.0, 2.0], "reduction": "sum"}, (4, 3), "probabilities"),
    Case("BCEWithLogitsLoss", {}, (4, 3), "probabilities"),
    Case(
        "BCEWithLogitsLoss",
        {"weight": [0.5, 1.0, 2.0], "pos_weight": [3.0, 1.0, 0.5], "reduction": "none"},
        (4, 3),
        "probabilities",
    ),
]
# the layers with parameters or buffers, once each
ONE_OF_EACH = list({case.layer: case for case in reversed(CASES)}.values())


def named(case):
    options = ",".join(f"{k}={v}" for k, v in case.arguments.items())
    return f"{case.layer}({options})-{'x'.join(map(str, case.input))}".replace(" ", "")


def cases(chosen):
    return pytest.mark.parametrize("case", [pytest.param(c, id=named(c)) for c in chosen])


def make_layer(module, case, device="cpu"):
    """The layer of `module`, random as its constructor makes it, in float64."""
    torch.manual_seed(1)
    arguments = {
        name: torch.tensor(value) if isinstance(value, list) else value
        for name, value in case.arguments.items()
    }
    return getattr(module, case.layer)(**arguments).to(device, torch.float64)


def make_call(case, device="cpu"):
    """The arguments of the layer's call."""
    torch.manual_seed(2)
    input = torch.randn(case.input, dtype=torch.float64)
    if case.layer == "BCELoss":
        input = input.sigmoid()
    input = input.to(device).requires_grad_()
    if case.target is None:
        return (input,)
    if case.target == "classes":
        shape = (case.input[0], *case.input[2:])
        return input, torch.randint(case.input[1], shape).to(device)
    target = torch.randn(case.input, dtype=torch.float64)
    if case.target == "probabilities":
        target = target.softmax(1)
    return input, target.to(device)
