"""Other people's Triton kernels, where they are installed: found when a benchmark runs.

A peer that refuses a call has a row that says so.  Sources: FlagGems' `flag_gems.ops`, which have
no gradient here; attorch's layers; Liger-Kernel's `liger_kernel.transformers.functional`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from tritorch.bench.cases import FORWARD, Case

NAMES = ("flag_gems", "attorch", "liger_kernel")


def installed() -> tuple[str, ...]:
    """The peers that this Python has."""
    return tuple(name for name in NAMES if importlib.util.find_spec(name) is not None)


def of_case(case: Case, name: str) -> Callable[..., Any] | None:
    """The peer's function for a case, taking the case's arguments by name; None if it has none."""
    return {"flag_gems": _flag_gems, "attorch": _attorch, "liger_kernel": _liger}[name](case)


def passes(case: Case, name: str) -> dict[str, tuple[str, ...]]:
    """The passes of a case that a peer has."""
    return {n: w for n, w in case.passes.items() if name != "flag_gems" or n == FORWARD}


def _flag_gems(case: Case) -> Callable[..., Any] | None:
    ops: Any = importlib.import_module("flag_gems.ops")
    plain = {"relu": "relu", "silu": "silu", "sigmoid": "sigmoid", "tanh": "tanh"}
    if case.op in plain:
        function = getattr(ops, plain[case.op], None)
        return None if function is None else lambda input, **_: function(input)
    if case.op == "gelu" and hasattr(ops, "gelu"):
        return lambda input, approximate="none": ops.gelu(input, approximate=approximate)
    if case.op == "matmul" and _dims(case, "input", "other") == [2, 2]:
        return lambda input, other: ops.mm(input, other)
    if case.op == "softmax" and hasattr(ops, "softmax"):
        return lambda input, dim, dtype=None: ops.softmax(input, dim)
    if case.op == "conv2d" and hasattr(ops, "conv2d") and not case.arguments.get("activation"):
        return lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, **_: (
            ops.conv2d(input, weight, bias, stride, padding, dilation, groups)
        )
    return None


def _attorch(case: Case) -> Callable[..., Any] | None:
    attorch: Any = importlib.import_module("attorch")
    layers = {"relu": "ReLU", "gelu": "GELU", "silu": "SiLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}
    losses = {"mse_loss": "MSELoss", "l1_loss": "L1Loss", "cross_entropy": "CrossEntropyLoss"}
    if case.op in layers and hasattr(attorch, layers[case.op]):
        layer = getattr(attorch, layers[case.op])()
        return lambda input, **_: layer(input)
    if case.op in ("softmax", "log_softmax"):
        name = {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[case.op]
        if hasattr(attorch, name):
            layer = getattr(attorch, name)(dim=case.arguments["dim"])
            return lambda input, **_: layer(input)
    if case.op in losses and hasattr(attorch, losses[case.op]):
        if case.arguments.get("weight") is not None:
            return None
        loss = getattr(attorch, losses[case.op])()
        return lambda input, target, **_: loss(input, target)
    return None


def _liger(case: Case) -> Callable[..., Any] | None:
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")
    if case.op == "cross_entropy":
        return lambda input, target, **options: functional.liger_cross_entropy(
            input, target, **options
        )
    if case.op == "layer_norm":
        return lambda input, normalized_shape, weight, bias, eps=1e-5: functional.liger_layer_norm(
            input, weight, bias, eps
        )
    if case.op == "group_norm":
        return lambda input, num_groups, weight, bias, eps=1e-5: functional.liger_group_norm(
            input, weight, bias, input.shape[1], num_groups, eps
        )
    return None


def _dims(case: Case, *names: str) -> list[int]:
    return [value.dim() for value in _tensors(case, names)]


def _tensors(case: Case, names: tuple[str, ...]) -> Iterator[Tensor]:
    for name in names:
        value = case.arguments[name]
        if isinstance(value, Tensor):
            yield value
