"""Dropout: reference, launches and gradient, public function, declaration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, binding, checks, launch
from tritorch.ops import strided
from tritorch.registry import Cost, Maker, OpSpec, Reject, Sample, register
from tritorch.subclasses import overridable

kernels = launch.kernels("dropout")

_WORD = 0xFFFFFFFF


def dropout_reference(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """torch's own dropout; with a seed the kernels' mask."""
    if seed is None or not training or p == 0 or input.numel() == 0:
        return F.dropout(input, p, training, inplace)
    kept = (_random_numbers(seed, input.numel()) >= _threshold(p)).to(input.dtype)
    factor = (kept * _scale(p)).as_strided(input.shape, _dense_strides(input))
    return input.mul_(factor) if inplace else input * factor


def _random_numbers(seed: Tensor, count: int) -> Tensor:
    """The numbers of the elements in their order, each in [-2^31, 2^31), int64.

    Source: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1,
    2, 3, SC 2011.
    """
    counter = torch.arange(-(-count // 4), device=seed.device)
    a, b, c, d = counter & _WORD, counter >> 32, counter * 0, counter * 0
    low, high = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(10):
        upper_a, lower_a = _product(0xD2511F53, a)
        upper_c, lower_c = _product(0xCD9E8D57, c)
        a, b, c, d = upper_c ^ b ^ low, lower_c, upper_a ^ d ^ high, lower_a
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    numbers = torch.stack((a, b, c, d), dim=-1).reshape(-1)[:count]
    # as the kernel reads the same bits
    return numbers - (numbers >> 31 << 32)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a product that int64 does not hold."""
    upper = ((word >> 16) * factor + ((word & 0xFFFF) * factor >> 16)) >> 16
    return upper & _WORD, (word * factor) & _WORD


def _threshold(p: float) -> int:
    # of 2^32 numbers this share is below it
    return min(round(p * 2**32), _WORD) - 2**31


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def _dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor in the tensor's order of dimensions: the order in which elements
    are counted.
    """
    if tensor.is_contiguous():
        return tensor.stride()
    return torch.empty_like(tensor, device="meta").stride()


def _output(input: Tensor, seed: Tensor, p: float, order: Sequence[int]) -> Tensor:
    # a stride of 0 says nothing of the order of dimensions
    if 0 in input.stride():
        return input.new_empty_strided(input.shape, tuple(order))
    return strided.empty_like(input)


@binding.library_op(
    "dropout_forward(Tensor input, Tensor seed, float p, SymInt[] order) -> Tensor", fake=_output
)
def _dropout_forward(input: Tensor, seed: Tensor, p: float, order: Sequence[int]) -> Tensor:
    y = _output(input, seed, p, order)
    _launch(input, seed, y, p, order)
    return y


@binding.library_op(
    "dropout_forward_(Tensor(a!) input, Tensor seed, float p, SymInt[] order) -> ()",
    fake=lambda input, seed, p, order: None,
)
def _dropout_forward_(input: Tensor, seed: Tensor, p: float, order: Sequence[int]) -> None:
    _launch(input, seed, input, p, order)


def _launch(x: Tensor, seed: Tensor, y: Tensor, p: float, order: Sequence[int]) -> None:
    run = _plan(_threshold(p), x.shape, x.stride(), y.stride(), tuple(order))
    run(x, x, seed, y, floats=(_scale(p),))


@launch.planned
def _plan(threshold: int, shape: tuple[int, ...], *along: tuple[int, ...]) -> launch.Prepared:
    # the order comes last and so decides which element is the how-manyth
    nest = strided.nest_of("dropout", shape, *along)
    return launch.Prepared(
        kernels.dropout_kernel,
        (math.ceil(nest.numel / kernels.BLOCK),),
        (nest.numel, threshold, *nest.sizes[1:], *nest.strides[0], *nest.strides[1]),
        INDEX_64=nest.wide,
        BLOCK=kernels.BLOCK,
    )


class Dropout(torch.autograd.Function):
    """Keeps the seed alone; the gradient is dropped out likewise, in the input's order."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        seed: Tensor,
        p: float,
        order: tuple[int, ...],
        inplace: bool = False,
    ) -> Tensor:
        ctx.p, ctx.order = p, order
        binding.save_for_backward(ctx, seed)
        if inplace:
            _dropout_forward_(input, seed, p, order)
            ctx.mark_dirty(input)
            return input
        output: Tensor = _dropout_forward(input, seed, p, order)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return binding.apply(Dropout, grad_output, seed, ctx.p, ctx.order), None, None, None, None


@overridable
def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """Zero with probability p, else input / (1 - p), for each element by itself.

    The mask is a function of a seed and of the element's number in memory, so that nothing but the
    seed is kept for the gradient.  The seed is drawn from torch's generator of the input's device:
    `torch.manual_seed` repeats a call, and activation checkpointing repeats its mask.  It never
    leaves the device: a captured CUDA graph draws another one at every replay, as far as torch has
    registered the generator with the graph.  The numbers are not those of torch's own dropout.

    Args:
        input: any shape and strides; float32, float16, bfloat16 or float64 for the kernels.
        p: the probability of zero, from 0 to 1.
        training: without it the input is returned as it is.
        inplace: write the result into `input` and return it.
        seed: int64, one element on the input's device, instead of a drawn one: it gives the same
            mask on the reference path.

    Returns:
        A tensor of the input's shape, dtype and order of dimensions; the input itself where p is 0.
        A dropped NaN or infinity is NaN, as in torch.

    Raises:
        RuntimeError: p is NaN; (in place) as `relu`.
        TypeError: `input` is not a tensor, `p` no number, `training` neither True nor False.
        ValueError: p outside of [0, 1], a seed of another kind.

    Source: `torch.nn.functional.dropout`.
    """
    checks.tensor("dropout", {"seed": seed}, input=input)
    if type(p) is not float:
        p = checks.number("dropout", "p", p)
    if type(training) is not bool:
        checks.flag("dropout", "training", training)
    if not 0 <= p <= 1:
        # torch has another error for NaN
        error = RuntimeError if math.isnan(p) else ValueError
        checks.fail(error, "dropout", "p must be from 0 to 1", p=p)
    if seed is not None and (seed.dtype, seed.numel()) != (torch.int64, 1):
        checks.fail(ValueError, "dropout", "the seed must be one element of int64", seed=seed)
    if backend.takes_nested("dropout", input):
        return dropout_reference(input, p, training, inplace, seed=seed)
    if not training or p == 0 or input.numel() == 0:
        return input
    if inplace:
        checks.writable("dropout", input)
    declined = strided.declined(input, inplace)
    if not backend.runs_triton("dropout", input, declined=declined):
        return dropout_reference(input, p, training, inplace, seed=seed)
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=input.device)
    # what a Function writes into torch.compile cannot follow, a copy it can
    copies = inplace and torch.compiler.is_compiling()
    strides = _dense_strides(input)
    output: Tensor = binding.apply(Dropout, input, seed, p, strides, inplace and not copies)
    return input.copy_(output) if copies else output


def _seed(make: Maker) -> Tensor:
    if make.device.type == "meta":
        return torch.empty(1, dtype=torch.int64, device="meta")
    # both halves of the seed count
    return torch.tensor([0x123456789ABCDEF], device=make.device)


def _samples(make: Maker) -> Iterator[Sample]:
    yield Sample("images", input=make(2, 3, 5, 7), p=0.5, seed=_seed(make), layouts=True)
    yield Sample("tiny", input=make(3, 2), p=0.25, seed=_seed(make), gradcheck=True)
    yield Sample("scalar", input=make(), p=0.5, seed=_seed(make))
    yield Sample("empty", input=make(0, 3), p=0.5, seed=_seed(make))
    yield Sample("blocks", input=make(2050), p=0.1, seed=_seed(make))
    yield Sample("all", input=make(5), p=1.0, seed=_seed(make))
    yield Sample("none", input=make(5), p=0.0, seed=_seed(make))


def _workloads(make: Maker) -> Iterator[Sample]:
    yield Sample("features", input=make.empty(256, 4096), p=0.5, seed=_seed(make))


def _rejects(make: Maker) -> Iterator[Reject]:
    values: Any = [1.0]
    yield Reject(
        "not-a-tensor",
        r"dropout: input must be a Tensor, not list",
        input=values,
        raises=TypeError,
    )
    yield Reject("p", r"dropout: p must be from 0 to 1 \(p 1.5\)", input=make(2), p=1.5)
    yield Reject(
        "seed",
        r"dropout: the seed must be one element of int64.*\(2,\)",
        input=make(2),
        seed=torch.zeros(2, dtype=torch.int64, device=make.device),
        raises=ValueError,
    )


def _cost(input: Tensor, *options: Any, **named: Any) -> dict[str, Cost]:
    size = input.numel() * input.element_size()
    cost = Cost(input.numel(), 2 * size)
    return {"forward": cost, "backward": cost}


register(
    OpSpec(
        name="dropout",
        op=dropout,
        reference=dropout_reference,
        kernels=("dropout.dropout_kernel",),
        gradients=("input",),
        samples=_samples,
        workloads=_workloads,
        rejects=_rejects,
        cost=_cost,
        accuracy="multilinear",
        source="torch.nn.functional.dropout",
        layers=("Dropout",),
    )
)
