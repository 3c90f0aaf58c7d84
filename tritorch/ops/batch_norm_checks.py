"""What a batch normalisation's shapes and numbers must be, and which ones its kernels take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tritorch import checks
from tritorch.ops import strided
from tritorch.ops.activation import check_epilogue


@checks.remembered
def check_shapes(
    op: str,
    input: torch.Size,
    residual: torch.Size | None,
    running_mean: torch.Size | None,
    running_var: torch.Size | None,
    weight: torch.Size | None,
    bias: torch.Size | None,
    training: bool,
    eps: float,
    activation: str | None,
    of: str = "input",
    prefix: str = "",
) -> str | None:
    """Why the kernels do not take the call; `of` names what is normalised, and `prefix` begins the
    names of weight and bias.
    """
    checks.flag(op, "training", training)
    # of an empty input torch asks for no vectors, and nothing of them
    is_empty = 0 in input
    if (running_mean is None) != (running_var is None) and not is_empty:
        checks.fail(
            ValueError if training else RuntimeError,
            op,
            "running_mean and running_var must both be tensors or both be None",
            running_mean=running_mean,
            running_var=running_var,
        )
    if not training and running_mean is None and not is_empty:
        checks.fail(RuntimeError, op, "running statistics are needed outside training", input=input)
    if training and len(input) and math.prod((*input[:1], *input[2:])) == 1:
        checks.fail(
            ValueError, op, "expected more than one value per channel in training", **{of: input}
        )
    if training and eps <= 0:
        checks.fail(ValueError, op, "eps must be positive in training", eps=eps)
    if eps < 0:
        checks.fail(ValueError, op, "eps must not be negative", eps=eps)
    check_epilogue(op, activation)
    vectors = {
        "running_mean": running_mean,
        "running_var": running_var,
        f"{prefix}weight": weight,
        f"{prefix}bias": bias,
    }
    channels = input[1] if len(input) > 1 else 0
    for name, vector in vectors.items():
        if vector is not None and math.prod(vector) != channels and not is_empty:
            checks.fail(
                RuntimeError,
                op,
                f"{name} must have {channels} elements",
                **{of: input, name: vector},
            )
    if len(input) < 2 and not is_empty:
        checks.fail(IndexError, op, "input must have a batch and a channel dimension", input=input)
    if residual is not None and residual != input:
        checks.fail(
            RuntimeError,
            op,
            f"residual must have the {of}'s shape",
            **{of: input, "residual": residual},
        )
    if len(input) > strided.RANK:
        return f"{len(input)} dimensions"
    if any(vector is not None and len(vector) != 1 for vector in vectors.values()):
        return "parameters or statistics that are not vectors"
    return None


def check_statistics(op: str, training: bool, **running: Tensor | None) -> str | None:
    """RuntimeError where running statistics require a gradient, or training cannot write them; else
    why the kernels do not take them.
    """
    declined = None
    for name, statistic in running.items():
        if statistic is None:
            continue
        if statistic.requires_grad and torch.is_grad_enabled():
            checks.fail(RuntimeError, op, f"{name} cannot require a gradient", **{name: statistic})
        if training:
            checks.writable(op, statistic)
            # torch writes no negated view through a library op
            if not torch.compiler.is_compiling() and statistic.is_neg():
                declined = f"a negated view as {name}"
    return declined
