"""Elementwise activations: references, launches and gradients, public functions, declarations."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register

kernels = launch.kernels("activation")

# by the names that the kernels give them
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
    "hardsigmoid": F.hardsigmoid,
}
# whose derivative the output tells; the others need the input
_FROM_OUTPUT = frozenset(("relu", "relu6", "leaky_relu", "sigmoid", "tanh"))
# whose gradient torch lays out as what is saved; the others' is as grad_output
_LAID_OUT_AS_SAVED = frozenset(("relu", "leaky_relu"))
# whose second derivative is not zero
_CURVED = frozenset(("silu", "gelu", "gelu_tanh", "sigmoid", "tanh", "hardswish"))


def needs_output(activation: str, slope: float = 0.01) -> bool:
    """Whether `ActivationBackward` takes the activation's output, and not its input."""
    # a negative slope gives one output to two inputs
    return activation in _FROM_OUTPUT and slope >= 0


@binding.library_op(
    "activation_forward(Tensor input, str activation, float slope) -> Tensor",
    fake=lambda input, activation, slope: strided.empty_like(input),
)
def _activation_forward(input: Tensor, activation: str, slope: float) -> Tensor:
    y = strided.empty_like(input)
    _launch_forward(input, y, activation, slope)
    return y


@binding.library_op(
    "activation_forward_(Tensor(a!) input, str activation, float slope) -> ()",
    fake=lambda input, activation, slope: None,
)
def _activation_forward_(input: Tensor, activation: str, slope: float) -> None:
    _launch_forward(input, input, activation, slope)


def _launch_forward(x: Tensor, y: Tensor, activation: str, slope: float) -> None:
    nest = strided.nest(activation, x, y)
    launch.run(
        kernels.activation_forward_kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        x,
        y,
        nest.numel,
        *nest.sizes[1:],
        *nest.strides[0],
        *nest.strides[1],
        slope,
        on=x,
        ACTIVATION=activation,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
    )


def _grad_input(
    grad_output: Tensor, saved: Tensor, activation: str, slope: float, order: int
) -> Tensor:
    # a stride of 0 says nothing of the order of dimensions
    as_saved = activation in _LAID_OUT_AS_SAVED or 0 in grad_output.stride()
    return strided.empty_like(saved if as_saved else grad_output)


@binding.library_op(
    "activation_backward(Tensor grad_output, Tensor saved, str activation, float slope, int order)"
    " -> Tensor",
    fake=_grad_input,
)
def _activation_backward(
    grad_output: Tensor, saved: Tensor, activation: str, slope: float, order: int
) -> Tensor:
    grad_input = _grad_input(grad_output, saved, activation, slope, order)
    nest = strided.nest(activation, grad_output, saved, grad_input)
    launch.run(
        kernels.activation_backward_kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        grad_output,
        saved,
        grad_input,
        nest.numel,
        *nest.sizes[1:],
        *nest.strides[0],
        *nest.strides[1],
        *nest.strides[2],
        slope,
        on=saved,
        ACTIVATION=activation,
        ORDER=order,
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
    )
    return grad_input


class ActivationBackward(torch.autograd.Function):
    """grad_output times a derivative of the activation, of first or second order.

    `saved` is the output or the input, as `needs_output` says, and the derivative of second order
    is that of the first one by `saved`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        saved: Tensor,
        activation: str,
        slope: float = 0.01,
        order: int = 1,
    ) -> Tensor:
        ctx.activation, ctx.slope, ctx.order = activation, slope, order
        ctx.save_for_backward(saved, grad_output if activation in _CURVED else None)
        grad_input: Tensor = _activation_backward(grad_output, saved, activation, slope, order)
        return grad_input

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, grad_output = ctx.saved_tensors
        rest = ctx.activation, ctx.slope
        into_grad = into_saved = None
        if ctx.needs_input_grad[0]:
            into_grad = binding.apply(ActivationBackward, grad, saved, *rest, ctx.order)
        if ctx.needs_input_grad[1] and ctx.activation in _CURVED:
            if ctx.order > 1:
                raise NotImplementedError(
                    f"{ctx.activation}: the kernels have no derivative of third order"
                )
            into_saved = binding.apply(ActivationBackward, grad * grad_output, saved, *rest, 2)
        return into_grad, into_saved, None, None, None


class Activation(torch.autograd.Function):
    """Keeps the output where it tells the derivative, else the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, activation: str, slope: float, inplace: bool) -> Tensor:
        ctx.activation, ctx.slope = activation, slope
        from_output = needs_output(activation, slope)
        if inplace:
            # torch keeps a copy too
            copies = not from_output and ctx.needs_input_grad[0]
            saved = input.clone() if copies else input
            _activation_forward_(input, activation, slope)
            ctx.mark_dirty(input)
            ctx.save_for_backward(saved)
            return input
        output: Tensor = _activation_forward(input, activation, slope)
        ctx.save_for_backward(output if from_output else input)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        grad_input = binding.apply(
            ActivationBackward, grad_output, saved, ctx.activation, ctx.slope
        )
        return grad_input, None, None, None


def _call(
    op: str,
    reference: Callable[..., Tensor],
    input: Tensor,
    *options: Any,
    activation: str | None = None,
    slope: float = 0.01,
    inplace: bool = False,
) -> Tensor:
    """The kernels' result, or that of `reference(input, *options)` where they do not take it."""
    checks.tensor(op, input=input)
    if inplace:
        checks.writable(op, input)
    declined = f"{input.dim()} dimensions" if input.dim() > strided.RANK else None
    if not backend.runs_triton(op, input, declined=declined):
        return reference(input, *options)
    output: Tensor = binding.apply(Activation, input, activation or op, slope, inplace)
    return output


def relu_reference(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0), NaN passed on."""
    return torch.relu_(input) if inplace else torch.relu(input)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(input, 0) elementwise; NaN and -0.0 pass, as in torch.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels, other
            dtypes take the reference path.
        inplace: write the result into `input` and return it.

    Returns:
        A tensor of the input's shape, dtype and order of dimensions.

    Raises:
        RuntimeError: a boolean input, or (in place) a leaf that requires a gradient.
        TypeError: `input` is not a tensor.

    Source: `torch.nn.functional.relu`.
    """
    checks.tensor("relu", input=input)
    if input.dtype == torch.bool:
        checks.fail(RuntimeError, "relu", "boolean inputs are not supported", input=input)
    return _call("relu", relu_reference, input, inplace, inplace=inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(input, 0), 6) elementwise; arguments and result as those of `relu`.

    Source: `torch.nn.functional.relu6`.
    """
    return _call("relu6", F.relu6, input, inplace, inplace=inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """input where it is positive, else input * negative_slope; otherwise as `relu`.

    Source: `torch.nn.functional.leaky_relu`.
    """
    return _call(
        "leaky_relu",
        F.leaky_relu,
        input,
        negative_slope,
        inplace,
        slope=float(negative_slope),
        inplace=inplace,
    )


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """input * sigmoid(input) elementwise; otherwise as `relu`, but of floating point alone.

    Source: `torch.nn.functional.silu`.
    """
    return _call("silu", F.silu, input, inplace, inplace=inplace)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """input times the normal distribution function of it; of floating point alone.

    Args:
        input: as for `relu`.
        approximate: "none", or "tanh" for input (1 + tanh(sqrt(2 / pi) (input + 0.044715
            input^3))) / 2.

    Raises:
        RuntimeError: another `approximate`.

    Source: `torch.nn.functional.gelu`.
    """
    if approximate not in ("none", "tanh"):
        checks.fail(
            RuntimeError, "gelu", "approximate must be 'none' or 'tanh'", received=approximate
        )
    activation = "gelu" if approximate == "none" else "gelu_tanh"
    return _call("gelu", _gelu_reference, input, approximate, activation=activation)


def _gelu_reference(input: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(input, approximate=approximate)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + exp(-input)) elementwise; otherwise as `relu`, integers give floating point.

    Source: `torch.sigmoid`.
    """
    return _call("sigmoid", torch.sigmoid, input)


def tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent elementwise; otherwise as `sigmoid`.

    Source: `torch.tanh`.
    """
    return _call("tanh", torch.tanh, input)


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """input * min(max(input + 3, 0), 6) / 6 elementwise; otherwise as `silu`.

    Source: `torch.nn.functional.hardswish`.
    """
    return _call("hardswish", F.hardswish, input, inplace, inplace=inplace)


def hardsigmoid_reference(input: Tensor, inplace: bool = False) -> Tensor:
    """torch's own, but in float64, where the slope of torch's gradient is 1 / 6 in float32."""
    if isinstance(input, Tensor) and input.dtype == torch.float64 and not inplace:
        return F.relu6(input + 3) / 6
    return F.hardsigmoid(input, inplace)


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
    _gelu_reference,
    "GELU",
    {"approximate": "none"},
    {"approximate": "tanh"},
    rejects=_gelu_rejects,
)
_register(sigmoid, torch.sigmoid, "Sigmoid", source="torch")
_register(tanh, torch.tanh, "Tanh", source="torch")
_register(hardswish, F.hardswish, "Hardswish")
_register(hardsigmoid, hardsigmoid_reference, "Hardsigmoid")
