"""Linear layer: reference, public function, declaration."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops.activation import (
    check_epilogue,
    checked_residual,
    epilogue_reference,
    with_residual,
)
from tritorch.ops.matmul import matmul_cost
from tritorch.ops.matmul_function import Linear
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(input @ weight.T + bias + residual)."""
    return epilogue_reference(F.linear(input, weight, bias), activation, residual)


@repeated
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(input @ weight.T + bias + residual).

    Args:
        input: (..., in_features), any strides; float32, float16, bfloat16 or float64 for the
            kernels.
        weight: (out_features, in_features) or (in_features,), the input's dtype and device.
        bias: None, (out_features,), or for the reference path anything that broadcasts to the
            result; beside a weight of one dimension what torch takes, a scalar unless the input is
            a matrix.
        activation: None, "relu", "relu6", "leaky_relu" (of slope 0.01), "silu", "gelu",
            "gelu_tanh", "sigmoid", "tanh", "hardswish" or "hardsigmoid", applied before the result
            is rounded and stored.
        residual: None, or a tensor of the result's shape and the input's dtype, added before the
            activation; fastest where its rows begin on 16 bytes.  It is copied, as the input is,
            where one stride does not fit all leading dimensions.  Autograd keeps it where it keeps
            the activation's input.

    Returns:
        (..., out_features), contiguous.  Accumulation and TF32 as for `matmul`.

    Raises:
        RuntimeError: sizes that do not match, different dtypes or devices.
        TypeError: `input` or `weight` is not a tensor.
        ValueError: an unknown activation.

    Source: `torch.nn.functional.linear`.
    """
    checks.tensor("linear", {"bias": bias, "residual": residual}, input=input, weight=weight)
    if backend.takes_nested("linear", input):
        return linear_reference(input, weight, bias, activation, residual=residual)
    declined = _check_linear(input, weight, bias, activation)
    if residual is not None:
        shape = (*input.shape[:-1], *weight.shape[:-1])
        residual = checked_residual("linear", input, residual, shape)
    if not backend.runs_triton("linear", input, weight, bias, residual, declined=declined):
        return linear_reference(input, weight, bias, activation, residual=residual)
    x, w, b = binding.autocast_to_lower(input, weight, bias)
    checks.same_dtype_and_device("linear", x, weight=w, bias=b)
    if w.dim() == 1:
        column = None if residual is None else residual[..., None]
        output: Tensor = binding.apply(Linear, x, w[None], b, column, activation).squeeze(-1)
    else:
        output = binding.apply(Linear, x, w, b, residual, activation)
    return output


def _check_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    """Why the kernels do not take the call."""
    check_epilogue("linear", activation)
    if weight.dim() not in (1, 2):
        checks.fail(RuntimeError, "linear", "weight must have 1 or 2 dimensions", weight=weight)
    if input.dim() == 0 or input.shape[-1] != weight.shape[-1]:
        checks.fail(
            RuntimeError,
            "linear",
            f"weight expects {weight.shape[-1]} input features",
            input=input,
            weight=weight,
        )
    if bias is None or (weight.dim() == 2 and bias.shape == weight.shape[:1]):
        return None
    if weight.dim() == 1:
        # which of them fit depends on how torch multiplies
        return "a bias of a vector"
    result = (*input.shape[:-1], weight.shape[0])
    sizes = zip(reversed(bias.shape), reversed(result), strict=False)
    if bias.dim() > len(result) or any(a != 1 and a != b for a, b in sizes):
        checks.fail(
            RuntimeError,
            "linear",
            "bias must have one element for each row of the weight",
            bias=bias,
            weight=weight,
        )
    return "a bias that broadcasts"


def _samples(make: Maker) -> Iterator[Sample]:
    for name, rows, features, outputs in (
        ("one-row", (1,), 37, 35),
        ("tile-edges", (65,), 129, 63),
        ("empty", (0,), 5, 3),
        ("no-features", (3,), 0, 5),
        ("unbatched", (), 9, 7),
        ("leading", (2, 3, 5), 9, 7),
    ):
        yield Sample(
            name,
            input=make(*rows, features),
            weight=make(outputs, features),
            bias=make(outputs),
            activation=None,
            layouts=name == "tile-edges",
        )
    yield Sample("no-bias", input=make(18, 17), weight=make(19, 17), bias=None, activation=None)
    yield Sample("relu", input=make(18, 17), weight=make(19, 17), bias=make(19), activation="relu")
    yield Sample(
        "tiny",
        input=make(4, 3),
        weight=make(2, 3),
        bias=make(2),
        activation="relu",
        gradcheck=True,
    )
    yield Sample(
        "splits", input=make(3, 4099), weight=make(5, 4099), bias=make(5), activation="relu"
    )
    yield Sample("vector-weight", input=make(4, 3), weight=make(3), bias=None, activation=None)

    def added(
        name: str,
        rows: tuple[int, ...],
        features: int,
        outputs: int,
        activation: str | None = None,
        bias: bool = True,
        **marks: bool,
    ) -> Sample:
        return Sample(
            name,
            input=make(*rows, features),
            weight=make(outputs, features),
            bias=make(outputs) if bias else None,
            activation=activation,
            residual=make(*rows, outputs),
            **marks,
        )

    yield added("residual", (65,), 129, 63, "relu", layouts=True)
    yield added("residual-leading", (2, 3, 5), 9, 7, bias=False)
    yield added("residual-splits", (3,), 4099, 5, "relu")
    yield added("residual-empty", (0,), 5, 3)
    yield added("tiny-residual", (4,), 3, 2, "relu", gradcheck=True)
    yield Sample(
        "vector-weight-residual",
        input=make(4, 3),
        weight=make(3),
        bias=None,
        activation="relu",
        residual=make(4),
    )


def _workloads(make: Maker) -> Iterator[Sample]:
    for rows, features, outputs in (
        (4096, 1024, 4096),
        (256, 2048, 1000),
        (1, 512, 512),
        (1024, 8192, 2560),
    ):
        # what computes in its epilogue takes another tile where the largest would be taken
        for activation in (None, "relu", "gelu") if rows == 4096 else (None, "relu"):
            yield Sample(
                f"{rows}x{features}x{outputs}-{activation or 'identity'}",
                input=make.empty(rows, features),
                weight=make.empty(outputs, features),
                bias=make.empty(outputs),
                activation=activation,
            )
    for size in (4096, 1000):
        yield Sample(
            f"{size}x{size}x{size}-residual",
            input=make.empty(size, size),
            weight=make.empty(size, size),
            bias=make.empty(size),
            activation=None,
            residual=make.empty(size, size),
        )


def _rejects(make: Maker) -> Iterator[Reject]:
    weight, bias = make(5, 3), make(5)
    yield Reject(
        "features",
        r"linear: weight expects 3 input features.*\(2, 4\)",
        input=make(2, 4),
        weight=weight,
    )
    yield Reject(
        "bias",
        r"linear: bias must have one element for each row.*\(4,\)",
        input=make(2, 3),
        weight=weight,
        bias=make(4),
    )
    yield Reject(
        "weight-dim", r"linear: weight must have 1 or 2", input=make(2, 3), weight=make(1, 5, 3)
    )
    yield Reject(
        "activation",
        r"linear: activation must be None or one of relu, .*'softplus'",
        input=make(2, 3),
        weight=weight,
        bias=bias,
        activation="softplus",
        raises=ValueError,
    )
    yield Reject(
        "residual-shape",
        r"linear: residual must have the result's shape.*\(2, 5\).*\(1, 5\)",
        input=make(2, 3),
        weight=weight,
        residual=make(1, 5),
        # torch would broadcast it
        raises=RuntimeError,
    )
    yield Reject(
        "residual-dtype",
        r"linear: expected residual of the input's dtype",
        input=make(2, 3),
        weight=weight,
        residual=make(2, 5).double(),
        raises=RuntimeError,
    )


def _cost(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    residual: Tensor | None = None,
) -> dict[str, Cost]:
    cost = matmul_cost(input, weight.t() if weight.dim() == 2 else weight)
    return cost if residual is None else with_residual(cost, residual)


register(
    OpSpec(
        name="linear",
        op=linear,
        reference=linear_reference,
        kernels=(
            "matmul.matmul_kernel",
            "matmul_tma.matmul_tma_kernel",
            "matmul_tma.matmul_tma_parts_kernel",
            "reduce.split_sum_kernel",
            "reduce.channel_sum_kernel",
            "activation.activation_backward_kernel",
            "reorder.reorder_kernel",
        ),
        gradients=("input", "weight", "bias", "residual"),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="multilinear",
        autocast="lower",
        source="torch.nn.functional.linear",
        layers=("Linear",),
    )
)
