"""Runs one sample of an op as a user could: any layout, any gradient, poisoned memory, inputs
watched.

`truth` and `outcome` turn a spec and a sample into values, and `verdicts` judges one against the
other by the
tolerance rule; tests and checks are loops over these three.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument, Maker, Sample, Subject
from tritorch.testing import errors, mutation, tolerances
from tritorch.testing.calls import call, map_tensors, outputs_of, tensors_of
from tritorch.testing.findings import Finding
from tritorch.testing.scales import scales_of

LAYOUTS = ("sliced", "transposed", "channels_last", "misaligned", "expanded")
GRAD_LAYOUTS = ("sliced", "transposed", "channels_last", "misaligned", "ones")


@dataclass(frozen=True)
class Outcome:
    """What one call gave: outputs, gradients by argument, and arguments that it wrote."""

    outputs: tuple[Tensor, ...]
    grads: dict[str, Tensor]
    written: dict[str, Tensor]

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under a name that says what it is."""
        for number, output in enumerate(self.outputs):
            yield f"output {number}", output
        for name, grad in self.grads.items():
            yield f"gradient of {name}", grad
        for name, value in self.written.items():
            yield f"{name} afterwards", value


class Mutated(AssertionError):
    """A call wrote into an argument that it must not change: `finding` says which store did."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.message)
        self.finding = finding


class Refused(RuntimeError):
    """The reference does not take a call, which therefore says nothing about the subject."""


def sample_of(spec: Subject, name: str, make: Maker) -> Sample:
    """The sample of that name, its tensors made by `make`."""
    for sample in spec.samples(make):
        if sample.name == name:
            return sample
    raise KeyError(f"{spec.name} has no sample {name!r}")


def relayout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory; what lies between the elements is NaN (or a large integer).

    "expanded" repeats the first slice of the first dimension by a stride of 0, so its values
    differ.
    """
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape) if tensor.dim() and tensor.shape[0] else tensor
    if layout == "sliced":
        shape = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if tensor.dim() else (2,)
        memory = _garbage(tensor, shape)
        view = memory[..., ::2] if tensor.dim() else memory[0]
    elif layout == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        view = _garbage(tensor, tuple(reversed(tensor.shape))).permute(order)
    elif layout == "channels_last":
        if tensor.dim() not in (4, 5):
            return tensor
        order = (0, tensor.dim() - 1, *range(1, tensor.dim() - 1))
        shape = (tensor.shape[0], *tensor.shape[2:], tensor.shape[1])
        view = _garbage(tensor, shape).permute(order)
    elif layout == "misaligned":
        view = _garbage(tensor, (tensor.numel() + 1,))[1:].view(tensor.shape)
    else:
        raise ValueError(f"relayout: expects one of {LAYOUTS}, received {layout!r}")
    view.copy_(tensor)
    return view


def _garbage(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 113
    return torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)


def _copy(tensor: Tensor) -> Tensor:
    # with the very strides: clone() would close the gaps of a sliced or expanded tensor
    if tensor.numel() == 0:
        return tensor.detach().clone()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.detach().as_strided((extent,), (1,)).clone()
    start = tensor.data_ptr() % 16
    # keep the misalignment of the address too
    padded = torch.empty(extent + 16, dtype=tensor.dtype, device=tensor.device)
    offset = next(i for i in range(16) if padded[i:].data_ptr() % 16 == start)
    padded[offset : offset + extent] = memory
    return padded.as_strided(tensor.shape, tensor.stride(), offset)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN (integers: the largest), so that an unwritten element shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch.use_deterministic_algorithms sets this flag, and imports torch's compiler for seconds to
    # set one there
    set_flag: Any = torch._C._set_deterministic_algorithms
    set_flag(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # the switch is for the memory; some of torch's own CUDA ops have no other algorithm
            warnings.filterwarnings("ignore", message=r".*[Dd]eterministic")
            yield
    finally:
        set_flag(enabled, warn_only=warn_only)


def run(
    function: Callable[..., Any],
    spec: Subject,
    arguments: dict[str, Argument],
    *,
    wanted: Iterable[str] | None = None,
    grad_outputs: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """Calls `function` on copies of `arguments` and differentiates it.

    `wanted`: the arguments that require a gradient, by default all that can.  `grad_outputs`: makes
    the
    gradient of each differentiable output.  `dtype`: what floating-point tensors are converted to
    first.

    Raises:
        Mutated: an argument that the spec does not list in `mutates` has changed.
    """
    chosen = set(spec.gradients if wanted is None else wanted)
    given: dict[str, Argument] = {}
    for name, value in arguments.items():
        copied = map_tensors(value, _copy)
        if dtype is not None:
            copied = map_tensors(copied, lambda t: t.to(dtype) if t.is_floating_point() else t)
        if name in chosen and isinstance(copied, Tensor) and copied.is_floating_point():
            copied.requires_grad_()
        given[name] = copied
    before = {
        name: map_tensors(value, lambda t: t.detach().clone()) for name, value in given.items()
    }

    with poisoned_memory():
        outputs = outputs_of(call(function, given), spec.name)
        grads = differentiate(outputs, given, grad_outputs)
        if any(tensor.is_cuda for value in given.values() for tensor in tensors_of(value)):
            # a GPU error is raised where the host next waits: here, it is this function's
            torch.cuda.synchronize()

    for name, value in given.items():
        if name not in spec.mutates and not bitwise_equal(value, before[name]):
            raise Mutated(mutation.finding(spec.name, name, value, before[name]))
    return Outcome(tuple(output.detach() for output in outputs), grads, written(spec, given))


def written(spec: Subject, given: Mapping[str, Argument]) -> dict[str, Tensor]:
    """The arguments that a call may write, as it left them."""
    return {
        f"{name}[{i}]" if isinstance(given[name], list) else name: tensor.detach()
        for name in spec.mutates
        for i, tensor in enumerate(tensors_of(given.get(name)))
    }


def differentiate(
    outputs: tuple[Tensor, ...],
    given: dict[str, Argument],
    grad_outputs: Callable[[Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """The gradients of the arguments that require one, by name."""
    leaves = {n: v for n, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    differentiable = [output for output in outputs if output.requires_grad]
    if not leaves or not differentiable or grad_outputs is None:
        return {}
    found = torch.autograd.grad(
        differentiable,
        list(leaves.values()),
        [grad_outputs(output.detach()) for output in differentiable],
        allow_unused=True,
    )
    return {n: g.detach() for n, g in zip(leaves, found, strict=True) if g is not None}


def bitwise_equal(value: Argument, before: Argument) -> bool:
    """Whether tensors, or lists of them, have the same shapes, dtypes and bits, NaN included."""
    return all(
        now.shape == then.shape and now.dtype == then.dtype and torch.equal(_bits(now), _bits(then))
        for now, then in zip(tensors_of(value), tensors_of(before), strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    # a dimension of one element is contiguous whatever its stride, which a view minds
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copied.reshape(-1).view(torch.uint8)


def random_gradient(seed: str, layout: str | None = None) -> Callable[[Tensor], Tensor]:
    """Makes gradients of outputs: standard normal (integers for an integer output's maker), laid
    out as asked.

    The same seed gives every output shape the same values in every dtype, up to rounding to
    `like`'s.
    """

    def make(like: Tensor) -> Tensor:
        if layout == "ones":
            return torch.ones((), dtype=like.dtype, device=like.device).expand(like.shape)
        grad = Maker(like.dtype, like.device, seed)(*like.shape)
        return relayout(grad, layout) if layout is not None else grad

    return make


def integer_gradient(seed: str) -> Callable[[Tensor], Tensor]:
    """Makes gradients of outputs that hold integers in [-2, 2]."""
    return lambda like: Maker(like.dtype, like.device, seed, integers=True)(*like.shape)


@dataclass(frozen=True)
class Judgement:
    """One tensor of an outcome beside the truth; `actual` is None where the call gave none."""

    what: str
    verdict: tolerances.Verdict
    actual: Tensor | None = None
    truth: Tensor | None = None


def verdicts(
    spec: Subject,
    arguments: dict[str, Argument],
    grad_outputs: Callable[[Tensor], Tensor],
    *,
    unit_in: float = 0.0,
) -> list[tuple[str, tolerances.Verdict]]:
    """Runs the op, its reference in the same dtype and its reference in float64, and compares every
    result.
    """
    actual = run(spec.op, spec, arguments, grad_outputs=grad_outputs)
    found = judge(spec, arguments, actual, grad_outputs, unit_in=unit_in)
    return [(judgement.what, judgement.verdict) for judgement in found]


def reference(
    spec: Subject,
    arguments: dict[str, Argument],
    grad_outputs: Callable[[Tensor], Tensor] | None = None,
    *,
    wanted: Iterable[str] | None = None,
    dtype: torch.dtype | None = None,
) -> Outcome:
    """What the reference gives; raises Refused where it raises."""
    try:
        return run(
            spec.reference, spec, arguments, wanted=wanted, grad_outputs=grad_outputs, dtype=dtype
        )
    except Exception as error:
        errors.must_be_the_users(error)
        said = f"{spec.name}: the reference raises {type(error).__name__}: {error}"
        raise Refused(said) from error


def on_cpu(arguments: Mapping[str, Argument]) -> dict[str, Argument]:
    """The arguments with their tensors on the CPU."""
    return {name: map_tensors(value, Tensor.cpu) for name, value in arguments.items()}


def judge(
    spec: Subject,
    arguments: dict[str, Argument],
    actual: Outcome,
    grad_outputs: Callable[[Tensor], Tensor],
    *,
    unit_in: float = 0.0,
    wanted: Iterable[str] | None = None,
) -> list[Judgement]:
    """Compares an outcome with the truth; the gradients of outputs are rounded to the tested dtype
    first.

    The truth is computed on the CPU: torch's CUDA kernels are what an op is compared with, and some
    of them are wrong.  So is what an exact op must give to the bit, which torch's CUDA kernels may
    add up in any order.  Raises Refused where the reference does not take the arguments.
    """
    dtypes = iter([o.dtype for o in actual.outputs if o.is_floating_point()])
    given: list[Tensor] = []

    def rounded(like: Tensor) -> Tensor:
        grad = grad_outputs(like.to(next(dtypes, like.dtype)))
        given.append(grad)
        return grad.to(like.dtype)

    there = on_cpu(arguments)
    wanted = spec.gradients if wanted is None else tuple(wanted)
    truth = reference(spec, there, rounded, wanted=wanted, dtype=torch.float64)
    try:
        compared = there if spec.accuracy == "exact" else arguments
        baseline = reference(spec, compared, grad_outputs, wanted=wanted)
    except Refused:
        # what torch takes on the CPU alone: batch norm with a bias and no weight, say
        baseline = reference(spec, there, grad_outputs, wanted=wanted)
    if len(actual.outputs) != len(truth.outputs) and spec.mutates:
        # whether a call that writes its arguments returns them too is a matter of taste
        actual, truth, baseline = (
            Outcome((), each.grads, each.written) for each in (actual, truth, baseline)
        )
    if len(actual.outputs) != len(truth.outputs):
        said = f"number: {len(actual.outputs)} outputs, where torch gives {len(truth.outputs)}"
        return [Judgement("result", _refusal(said))]
    scales = scales_of(spec, there, given, wanted)
    values, baselines = dict(actual.named()), dict(baseline.named())
    found = []
    for what, true in truth.named():
        if what not in values:
            found.append(Judgement(what, _refusal("missing: there is none")))
            continue
        expected = true.double() if true.is_floating_point() else true
        expected = baselines[what] if spec.accuracy == "exact" else expected
        verdict = tolerances.compare(
            values[what],
            expected,
            baseline=baselines[what],
            exact=spec.accuracy == "exact",
            unit_in=unit_in,
            **scales.get(what, {}),
        )
        found.append(Judgement(what, verdict, values[what], expected))
    known = dict(truth.named())
    # a gradient of zero says the same as none
    return found + [
        Judgement(what, _refusal("number: torch gives none"))
        for what, value in values.items()
        if what not in known and value.any()
    ]


def _refusal(said: str) -> tolerances.Verdict:
    return tolerances.Verdict(False, math.inf, None, said)
