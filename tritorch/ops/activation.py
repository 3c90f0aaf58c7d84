"""Elementwise activations: references, public functions, declarations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks
from tritorch.ops import strided
from tritorch.ops.activation_function import Activation, keeps_input, slope_of
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.repeats.decorator import repeated


def relu_reference(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), NaN passed on."""
    return torch.relu_(input) if inplace else torch.relu(input)


def gelu_reference(input: Tensor, approximate: str = "none") -> Tensor:
    """torch's own; its signature says `approximate`."""
    return F.gelu(input, approximate=approximate)


def hardsigmoid_reference(input: Tensor, inplace: bool = False) -> Tensor:
    """torch's own, but in float64, where the slope of torch's gradient is 1 / 6 in float32."""
    if isinstance(input, Tensor) and input.dtype == torch.float64 and not inplace:
        return F.relu6(input + 3) / 6
    return F.hardsigmoid(input, inplace)


# by the kernels' names of them
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": hardsigmoid_reference,
}


def check_epilogue(op: str, activation: str | None) -> None:
    """Fails unless `activation` is None or a name that the kernels know."""
    if activation is not None and activation not in REFERENCES:
        rule = f"activation must be None or one of {', '.join(REFERENCES)}"
        checks.fail(ValueError, op, rule, received=activation)


def checked_residual(op: str, input: Tensor, residual: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A residual as a product adds it: of its shape, and of the dtype that autocast gives both."""
    if residual.shape != shape:
        checks.fail(
            RuntimeError,
            op,
            "residual must have the result's shape",
            result=torch.Size(shape),
            residual=residual.shape,
        )
    (lowered,) = binding.autocast_to_lower(residual)
    if residual.dtype != input.dtype or residual.device != input.device:
        # compared after autocast, which casts both; the product casts its input itself
        (x,) = binding.autocast_to_lower(input)
        checks.same_dtype_and_device(op, x, residual=lowered)
    added: Tensor = lowered
    return added


def with_residual(cost: dict[str, Cost], residual: Tensor) -> dict[str, Cost]:
    """The cost of a product that adds a residual, whose gradient is one that it has anyway."""
    forward = cost["forward"]
    traffic = forward.bytes + residual.numel() * residual.element_size()
    return {**cost, "forward": Cost(forward.flops, traffic)}


def epilogue_reference(y: Tensor, activation: str | None, residual: Tensor | None = None) -> Tensor:
    """What the kernels of other ops compute from their result before they store it."""
    if residual is not None:
        # of the dtype that autocast may have given the product
        y = y + residual.to(y.dtype)
    return y if activation is None else REFERENCES[activation](y)


def _call(
    op: str,
    reference: Callable[..., Tensor],
    input: Tensor,
    *options: Any,
    activation: str | None = None,
    slope: float | None = None,
    inplace: bool = False,
) -> Tensor:
    """The kernels' result, or that of `reference(input, *options)` where they do not take it."""
    checks.tensor(op, input=input)
    if backend.takes_nested(op, input):
        return reference(input, *options)
    if inplace:
        checks.writable(op, input)
    declined = strided.declined(input, inplace)
    if not backend.runs_triton(op, input, declined=declined):
        return reference(input, *options)
    # what a Function writes into torch.compile cannot follow, a copy it can
    copies = inplace and torch.compiler.is_compiling()
    inplace = inplace and not copies
    activation, slope = activation or op, slope_of(slope)
    original = None
    differentiates = input.requires_grad and torch.is_grad_enabled()
    if inplace and differentiates and keeps_input(activation, slope):
        # not in the Function, whose copy would have no graph for a second gradient
        original = (input.clone(),)
    output: Tensor = binding.apply(Activation, input, original, activation, slope, inplace)
    return input.copy_(output) if copies else output


@repeated
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0) elementwise; NaN and -0.0 pass, as in torch.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels, other
            dtypes take the reference path.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of the input's shape, dtype and order of dimensions.

    Raises:
        RuntimeError: a boolean input, or (in place) what torch would not write: a leaf that
            requires a gradient or a view of one, an expanded tensor, one of inference mode.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.relu`.
    """
    checks.tensor("relu", input=input)
    if input.dtype == torch.bool:
        checks.fail(RuntimeError, "relu", "boolean inputs are not supported", input=input)
    return _call("relu", relu_reference, input, inplace, inplace=inplace)


@repeated
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6) elementwise; arguments and result as those of `relu`.

    Source: `torch.nn.functional.relu6`.
    """
    return _call("relu6", F.relu6, input, inplace, inplace=inplace)


@repeated
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where it is positive, else input * negative_slope; otherwise as `relu`.

    Source: `torch.nn.functional.leaky_relu`.
    """
    slope = negative_slope
    if type(slope) is not float:
        slope = checks.number("leaky_relu", "negative_slope", slope)
    return _call(
        "leaky_relu",
        F.leaky_relu,
        input,
        negative_slope,
        inplace,
        slope=slope,
        inplace=inplace,
    )


@repeated
def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input) elementwise; otherwise as `relu`, but only for floating point.

    Source: `torch.nn.functional.silu`.
    """
    return _call("silu", F.silu, input, inplace, inplace=inplace)


@repeated
def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input * Phi(input) elementwise, Phi the normal distribution function; floating point only.

    Args:
        input: as for `relu`.
        approximate: "none", or "tanh" for input (1 + tanh(sqrt(2 / pi) (input + 0.044715
            input^3))) / 2.

    Raises:
        RuntimeError: another `approximate`.

    Source: `torch.nn.functional.gelu`.
    """
    if not isinstance(approximate, str):
        checks.fail(TypeError, "gelu", "approximate must be a string", received=approximate)
    if approximate not in ("none", "tanh"):
        checks.fail(
            RuntimeError, "gelu", "approximate must be 'none' or 'tanh'", received=approximate
        )
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return _call("gelu", gelu_reference, input, approximate, activation=activation)


@repeated
def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)) elementwise; otherwise as `relu`, but integers give floating point.

    Source: `torch.sigmoid`.
    """
    return _call("sigmoid", torch.sigmoid, input)


@repeated
def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent elementwise; otherwise as `sigmoid`.

    Source: `torch.tanh`.
    """
    return _call("tanh", torch.tanh, input)


@repeated
def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * min(max(input + 3, 0), 6) / 6 elementwise; otherwise as `silu`.

    Source: `torch.nn.functional.hardswish`.
    """
    return _call("hardswish", F.hardswish, input, inplace, inplace=inplace)


@repeated
def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input + 3, 0), 6) / 6 elementwise; otherwise as `silu`.

    Source: `torch.nn.functional.hardsigmoid`.
    """
    return _call("hardsigmoid", hardsigmoid_reference, input, inplace, inplace=inplace)


def _relu_samples(make: Maker) -> Iterator[Sample]:
    # sizes around the tile's edges and shapes of each rank are tried with one activation for all
    yield Sample("one", input=make(1))
    yield Sample("empty", input=make(0, 3))
    yield Sample("scalar", input=make())
    yield Sample("block-1", input=make(1023))
    yield Sample("block", input=make(1024))
    yield Sample("blocks", input=make(2048))
    yield Sample("images", input=make(2, 3, 5, 7), layouts=True)
    yield Sample("tiny", input=make(3, 2), gradcheck=True)
    yield Sample("volume", input=make(2, 3, 4, 5, 6))


def _relu_workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("resnet50-stem", input=make.empty(32, 64, 112, 112))
    yield Sample("odd", input=make.empty(1023, 1021))
    yield Sample("sliced", input=make.empty(64, 128, 56, 112)[..., ::2])


def _relu_rejects(make: Maker) -> Iterator[Reject]:
    bools = torch.zeros(3, dtype=torch.bool, device=make.device)
    yield Reject("bool", r"relu: boolean inputs.*\(3,\) bool", input=bools)
    yield from _rejects("relu", make)


def _samples(variants: tuple[dict[str, Any], ...], make: Maker) -> Iterator[Sample]:
    for number, options in enumerate(variants):
        name = "-".join(str(value) for value in options.values()) or "plain"
        # of whole vectors: torch's gradients at NaN differ in what is left of one
        input = make(2, 3, 4, 4, scale=2.0)
        yield Sample(name, input=input, layouts=number == 0, **options)
        yield Sample(f"{name}-tiny", input=make(3, 2, scale=2.0), gradcheck=True, **options)
    yield Sample("empty", input=make(0, 3), **variants[0])


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("images", input=make.empty(32, 64, 112, 112))


def _rejects(op: str, make: Maker) -> Iterator[Reject]:
    values: Any = [1.0]
    yield Reject("not-a-tensor", rf"{op}: input must be a Tensor, not list", input=values)


def _gelu_rejects(make: Maker) -> Iterator[Reject]:
    yield Reject(
        "approximate",
        r"gelu: approximate must be 'none' or 'tanh' \(received 'erf'\)",
        input=make(2),
        approximate="erf",
    )
    yield from _rejects("gelu", make)


def _cost(input: Tensor, *options: Any, **named: Any) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    return {
        "forward": Cost(input.numel(), 2 * size),
        "backward": Cost(input.numel(), 3 * size),
    }


def _register(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    layer: str,
    *variants: dict[str, Any],
    source: str = "torch.nn.functional",
    **fields: Any,
) -> None:
    name = op.__name__
    defaults: dict[str, Any] = {
        "samples": functools.partial(_samples, variants or ({},)),
        "workloads": _workloads,
        "rejects": functools.partial(_rejects, name),
        "accuracy": "composite",
    }
    register(
        OpSpec(
            name=name,
            op=op,
            reference=reference,
            kernels=(
                "activation.activation_forward_kernel",
                "activation.activation_backward_kernel",
            ),
            gradients=("input",),
            cost=_cost,
            source=f"{source}.{name}",
            layers=(layer,),
            **(defaults | fields),
        )
    )


_register(
    relu,
    relu_reference,
    "ReLU",
    samples=_relu_samples,
    workloads=_relu_workloads,
    rejects=_relu_rejects,
    accuracy="exact",
)
_register(relu6, F.relu6, "ReLU6", accuracy="exact")
_register(leaky_relu, F.leaky_relu, "LeakyReLU", {"negative_slope": 0.2}, {"negative_slope": -0.5})
_register(silu, F.silu, "SiLU")
_register(
    gelu,
    gelu_reference,
    "GELU",
    {"approximate": "none"},
    {"approximate": "tanh"},
    rejects=_gelu_rejects,
)
_register(sigmoid, torch.sigmoid, "Sigmoid", source="torch")
_register(tanh, torch.tanh, "Tanh", source="torch")
_register(hardswish, F.hardswish, "Hardswish")
_register(hardsigmoid, hardsigmoid_reference, "Hardsigmoid")
