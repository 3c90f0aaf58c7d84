"""Other people's Triton kernels, where they are installed: found when a benchmark runs.

A peer that has no such call, or whose call computes something else, has no row; one that refuses
at run time has a row that says so.  Sources: FlagGems' `flag_gems.ops`, whose functions have no
gradient here; attorch's layers; Liger-Kernel's `liger_kernel.transformers.functional`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritorch.bench.cases import BACKWARD, BOTH, FORWARD, Case
from tritorch.bench.environment import PEERS

NAMES = PEERS

Function = Callable[..., Any]
# the function for a case, None where the peer has no such call; arguments of the case by name
Maker = Callable[[Any, Mapping[str, Any]], Function | None]

# what an argument is where a case does not give it
_DEFAULTS = {
    "reduction": "mean",
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "approximate": "none",
    "dilation": 1,
    "groups": 1,
    "negative_slope": 0.01,
    "eps": 1e-5,
    "momentum": 0.1,
}


def installed() -> tuple[str, ...]:
    """The peers that this Python has."""
    return tuple(name for name in NAMES if importlib.util.find_spec(name) is not None)


def of_case(case: Case, name: str, which: str = FORWARD) -> Function | None:
    """The peer's function for a pass of a case, taking the case's arguments by name; None if it has
    none.  Raises what the import of the peer raises.
    """
    module, makers = _PEERS[name]
    make = makers.get(case.op)
    if make is None or which not in _passes(case, name):
        return None
    given = {**_DEFAULTS, **case.arguments}
    if any(given.get(other) is not None for other in ("activation", "residual")):
        # no peer has our epilogues
        return None
    return make(importlib.import_module(module), given)


def _passes(case: Case, name: str) -> tuple[str, ...]:
    if name == "flag_gems":
        return (FORWARD,)
    if (name, case.op) == ("liger_kernel", "cross_entropy"):
        # its forward pass computes the gradient, over which the backward pass then writes again
        return (FORWARD, BOTH)
    return (FORWARD, BACKWARD, BOTH, *case.passes)


def _plain(name: str) -> Maker:
    """A function of one tensor and no option."""

    def make(module: Any, given: Mapping[str, Any]) -> Function | None:
        function = getattr(module, name, None)
        return None if function is None else lambda input, **_: function(input)

    return make


def _layer(name: str, *options: str, **fixed: Any) -> Maker:
    """A layer without parameters, of the arguments of these names, where `fixed` ones are so."""

    def make(module: Any, given: Mapping[str, Any]) -> Function | None:
        build = getattr(module, name, None)
        if build is None or any(given.get(key) != value for key, value in fixed.items()):
            return None
        layer = build(**{key: given[key] for key in options if key in given})
        if "target" in given:
            return lambda input, target, **_: layer(input, target)
        return lambda input, **_: layer(input)

    return make


def _gems_gelu(ops: Any, given: Mapping[str, Any]) -> Function | None:
    return lambda input, approximate="none": ops.gelu(input, approximate=approximate)


def _gems_mm(ops: Any, given: Mapping[str, Any]) -> Function | None:
    if (given["input"].dim(), given["other"].dim()) != (2, 2):
        return None
    return lambda input, other: ops.mm(input, other)


def _gems_softmax(name: str) -> Maker:
    def make(ops: Any, given: Mapping[str, Any]) -> Function | None:
        if given.get("dtype") is not None or not hasattr(ops, name):
            return None
        return lambda input, dim, dtype=None: getattr(ops, name)(input, dim)

    return make


def _gems_conv2d(ops: Any, given: Mapping[str, Any]) -> Function | None:
    return lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **_: (
        ops.conv2d(input, weight, bias, stride, padding, dilation, groups)
    )


def _gems_layer_norm(ops: Any, given: Mapping[str, Any]) -> Function | None:
    # with the mean and the deviation, as aten's function of that name
    return lambda input, normalized_shape, weight=None, bias=None, eps=1e-5: _first(
        ops.layer_norm(input, list(normalized_shape), weight, bias, eps)
    )


def _gems_max_pool2d(ops: Any, given: Mapping[str, Any]) -> Function | None:
    if given.get("return_indices") or given["input"].dim() != 4:
        return None
    if not hasattr(ops, "max_pool2d_with_indices"):
        return None
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    options = {name: given[name] for name in names if name in given}
    return lambda input, **_: ops.max_pool2d_with_indices(input, **options)[0]


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple | list) else result


def _last_dim(name: str) -> Maker:
    """attorch's softmax is over the last dimension alone."""
    make_layer = _layer(name, "dim", dtype=None)

    def make(module: Any, given: Mapping[str, Any]) -> Function | None:
        last = given["dim"] % given["input"].dim() == given["input"].dim() - 1
        return make_layer(module, given) if last else None

    return make


def _attorch_cross_entropy(attorch: Any, given: Mapping[str, Any]) -> Function | None:
    plain = given["input"].dim() == 2 and not given["target"].is_floating_point()
    asked = given["reduction"], given["ignore_index"], given["label_smoothing"]
    if not plain or asked != ("mean", -100, 0.0) or given.get("weight") is not None:
        return None
    loss = attorch.CrossEntropyLoss()
    return lambda input, target, **_: loss(input, target)


def _attorch_conv2d(attorch: Any, given: Mapping[str, Any]) -> Function | None:
    if isinstance(given["padding"], str) or given["dilation"] not in (1, (1, 1)):
        return None
    weight, bias = given["weight"], given.get("bias")
    groups = given["groups"]
    layer = attorch.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        given["stride"],
        given["padding"],
        groups=groups,
        bias=bias is not None,
    )
    return _functional(layer)


def _attorch_layer_norm(attorch: Any, given: Mapping[str, Any]) -> Function | None:
    shape = given["normalized_shape"]
    if len(shape) != 1 or given.get("weight") is None or given.get("bias") is None:
        return None
    return _functional(attorch.LayerNorm(shape[0], given["eps"]))


def _functional(layer: torch.nn.Module) -> Function:
    """A layer as a function of the parameters that a case has."""

    def call(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
    ) -> Any:  # fmt: skip
        own = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return torch.func.functional_call(layer, own, (input,))

    return call


def _liger_cross_entropy(functional: Any, given: Mapping[str, Any]) -> Function | None:
    if given["input"].dim() != 2 or given["target"].is_floating_point():
        return None

    def call(input: Tensor, target: Tensor, **options: Any) -> Any:
        # where it is differentiated it writes the gradient over its input
        own = input.clone() if input.requires_grad else input
        return functional.liger_cross_entropy(own, target, **options)

    return call


def _liger_layer_norm(functional: Any, given: Mapping[str, Any]) -> Function | None:
    if len(given["normalized_shape"]) != 1:
        return None
    if given.get("weight") is None or given.get("bias") is None:
        return None
    return lambda input, normalized_shape, weight, bias, eps=1e-5: functional.liger_layer_norm(
        input, weight, bias, eps
    )


def _liger_group_norm(functional: Any, given: Mapping[str, Any]) -> Function | None:
    if given.get("weight") is None or given.get("bias") is None:
        return None
    return lambda input, num_groups, weight, bias, eps=1e-5: functional.liger_group_norm(
        input, weight, bias, input.shape[1], num_groups, eps
    )


def _liger_softmax(functional: Any, given: Mapping[str, Any]) -> Function | None:
    last = given["dim"] % given["input"].dim() == given["input"].dim() - 1
    if not last or given.get("dtype") is not None or not hasattr(functional, "liger_softmax"):
        return None
    return lambda input, dim, dtype=None: functional.liger_softmax(input)


_PEERS: Mapping[str, tuple[str, Mapping[str, Maker]]] = {
    "flag_gems": (
        "flag_gems.ops",
        {
            **{name: _plain(name) for name in ("relu", "silu", "sigmoid", "tanh")},
            "gelu": _gems_gelu,
            "matmul": _gems_mm,
            "softmax": _gems_softmax("softmax"),
            "log_softmax": _gems_softmax("log_softmax"),
            "conv2d": _gems_conv2d,
            "layer_norm": _gems_layer_norm,
            "max_pool2d": _gems_max_pool2d,
        },
    ),
    "attorch": (
        "attorch",
        {
            "relu": _layer("ReLU"),
            "gelu": _layer("GELU", approximate="none"),
            "silu": _layer("SiLU"),
            "sigmoid": _layer("Sigmoid"),
            "tanh": _layer("Tanh"),
            "softmax": _last_dim("Softmax"),
            "log_softmax": _last_dim("LogSoftmax"),
            "mse_loss": _layer("MSELoss", "reduction", weight=None),
            "l1_loss": _layer("L1Loss", "reduction", weight=None),
            "smooth_l1_loss": _layer("SmoothL1Loss", "reduction", "beta"),
            "huber_loss": _layer("HuberLoss", "reduction", "delta", weight=None),
            "cross_entropy": _attorch_cross_entropy,
            "conv2d": _attorch_conv2d,
            "layer_norm": _attorch_layer_norm,
        },
    ),
    "liger_kernel": (
        "liger_kernel.transformers.functional",
        {
            "cross_entropy": _liger_cross_entropy,
            "layer_norm": _liger_layer_norm,
            "group_norm": _liger_group_norm,
            "softmax": _liger_softmax,
        },
    ),
}
