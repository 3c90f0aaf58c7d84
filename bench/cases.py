"""What is timed: a call of an op, the implementations that make it, and its passes.

A case is planned with tensors that have no memory, so that hundreds of them cost nothing; `Slot`
gives one memory and numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.bench import baselines
from tritorch.registry import Argument, Cost, Maker, OpSpec, Sample, Subject, specs
from tritorch.testing.calls import map_tensors, tensors_of

OURS, TORCH = "tritorch", "torch"
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"
PASSES = (FORWARD, BACKWARD, BOTH)

# what tensors hold that must not hold any number, by argument or by op and argument
_RANGES = {
    "running_var": (0.25, 2.0),
    "exp_avg_sqs": (0.25, 2.0),
    "max_exp_avg_sqs": (0.25, 2.0),
    "target": (0.0, 1.0),
    "binary_cross_entropy.input": (0.05, 0.95),
}


@dataclass(frozen=True)
class Case:
    """One call of an op, on one shape.

    `arguments`: by name, tensors without memory.  `implementations` compute the same; the first is
    the one in question, the second its baseline.  `reference` is what it must compute.  `passes`:
    for each pass the arguments whose gradients it computes, none for the forward pass alone.
    `cost`: of each pass, where it is known.  `count`: how often a workload has this case.
    """

    op: str
    name: str
    dtype: torch.dtype
    arguments: Mapping[str, Argument]
    implementations: Mapping[str, Callable[..., Any]]
    reference: Callable[..., Any]
    passes: Mapping[str, tuple[str, ...]]
    cost: Mapping[str, Cost] = field(default_factory=dict)
    exact: bool = False
    mutates: tuple[str, ...] = ()
    count: int = 1
    # what identifies the shape in a result file, where it is not the first tensor's
    sizes: tuple[int, ...] = ()
    # changes drawn numbers at which rounding alone decides between two gradients
    settle: Callable[[dict[str, Any]], None] | None = None

    @property
    def first(self) -> Tensor:
        """The first tensor of its arguments."""
        return next(t for value in self.arguments.values() for t in tensors_of(value))

    @property
    def shape(self) -> list[int]:
        return list(self.sizes or self.first.shape)

    @property
    def layout(self) -> str:
        first = self.first
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if first.is_contiguous():
            return "contiguous"
        if first.dim() in formats and first.is_contiguous(memory_format=formats[first.dim()]):
            return "channels_last"
        return "strided"

    @property
    def size(self) -> int:
        """Bytes of the tensors among its arguments."""
        tensors = [t for value in self.arguments.values() for t in tensors_of(value)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def text(self) -> str:
        """The arguments in words: "input[64, 3, 8, 8] weight[4, 3, 3, 3] padding=1"."""
        return " ".join(_word(name, value) for name, value in self.arguments.items())

    def on(self, **implementations: Callable[..., Any]) -> Case:
        """The same case with more implementations."""
        return replace(self, implementations={**self.implementations, **implementations})


def _word(name: str, value: Argument) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f":{_short(value.dtype)}"
        return f"{name}{list(value.shape)}{kind}"
    if isinstance(value, list):
        return f"{name}[{len(value)} tensors]"
    return f"{name}={value}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Planner(Maker):
    """Makes tensors without memory, and remembers what bounds class indices."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, "meta")

    def classes(self, *shape: int, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        made = super().classes(*shape, count=count, dtype=dtype)
        made.classes = count  # type: ignore[attr-defined]
        return made


def of_spec(
    spec: OpSpec,
    sample: Sample,
    dtype: torch.dtype,
    *,
    passes: Mapping[str, tuple[str, ...]] | None = None,
    count: int = 1,
    sizes: tuple[int, ...] = (),
) -> Case:
    """The case of an op of tritorch's own, beside torch's counterpart."""
    arguments = sample.arguments
    gradients = tuple(
        name
        for name in spec.gradients
        # a loss is differentiated by what a network computes
        if name != "target" and _floats(arguments.get(name))
    )
    cost = dict(spec.cost(**arguments))
    forward, backward = cost[FORWARD], cost[BACKWARD]
    cost[BOTH] = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    if backward.bytes == 0:
        # an op that writes its arguments has no gradient
        cost.pop(BACKWARD)
    for which in passes or {}:
        # the gradient of one operand of a product costs what the product does
        cost.setdefault(which, cost["forward"])
    if passes is None:
        passes = {FORWARD: (), **({BACKWARD: gradients, BOTH: gradients} if gradients else {})}
    return Case(
        op=spec.name,
        name=sample.name,
        dtype=dtype,
        arguments=arguments,
        implementations={OURS: spec.op, TORCH: baselines.of_torch(spec)},
        reference=spec.reference,
        passes=passes,
        cost=cost,
        exact=spec.accuracy == "exact",
        mutates=spec.mutates,
        count=count,
        sizes=sizes,
    )


def _floats(value: Argument) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def workloads(
    ops: Iterable[str] = (), dtype: torch.dtype = torch.bfloat16, *, small: bool = False
) -> Iterator[Case]:
    """The workloads of the ops of these names, by default of all; `small`: samples of the tests."""
    wanted = set(ops)
    for spec in specs():
        if wanted and spec.name not in wanted:
            continue
        # an op that has not this dtype is timed in the first that it has
        own = dtype if dtype in spec.dtypes else spec.dtypes[0]
        made = spec.samples if small else spec.workloads
        for sample in made(Planner(own)):
            if small and not sample.layouts:
                continue
            yield of_spec(spec, sample, own)


def of_subject(subject: Subject, sample: Sample, dtype: torch.dtype, *, name: str) -> Case:
    """The case of a user's function beside its reference."""
    gradients = tuple(n for n in subject.gradients if _floats(sample.arguments.get(n)))
    return Case(
        op=name,
        name=sample.name,
        dtype=dtype,
        arguments=sample.arguments,
        implementations={name: subject.op, TORCH: subject.reference},
        reference=subject.reference,
        passes={FORWARD: (), **({BACKWARD: gradients, BOTH: gradients} if gradients else {})},
        exact=subject.accuracy == "exact",
        mutates=subject.mutates,
    )


@dataclass
class Slot:
    """The arguments of one call, in memory, with numbers that `fill` draws anew."""

    case: Case
    device: torch.device
    arguments: dict[str, Any]

    @classmethod
    def of(cls, case: Case, device: torch.device | str, seed: int) -> Slot:
        device = torch.device(device)

        def made(planned: Tensor) -> Tensor:
            # what the planner left on the CPU stays: a step count, say
            return planned.clone() if planned.device.type == "cpu" else _memory(planned, device)

        given: dict[str, Any] = {n: map_tensors(v, made) for n, v in case.arguments.items()}
        slot = cls(case, device, given)
        slot.fill(seed)
        return slot

    def fill(self, seed: int) -> None:
        """New numbers in the same memory."""
        generator = torch.Generator(self.device)
        for name, value in self.arguments.items():
            generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            bounds = _RANGES.get(f"{self.case.op}.{name}", _RANGES.get(name))
            planned = tensors_of(self.case.arguments[name])
            with torch.no_grad():
                for tensor, plan in zip(tensors_of(value), planned, strict=True):
                    if plan.device.type == "cpu":
                        tensor.copy_(plan)
                    elif not tensor.is_floating_point():
                        tensor.random_(0, getattr(plan, "classes", 2), generator=generator)
                    elif bounds:
                        tensor.uniform_(*bounds, generator=generator)
                    else:
                        tensor.normal_(generator=generator)
        if self.case.settle is not None:
            self.case.settle(self.arguments)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that a call must leave alone."""
        for name, value in self.arguments.items():
            if name not in self.case.mutates:
                for tensor in tensors_of(value):
                    yield name, tensor


def _memory(planned: Tensor, device: torch.device) -> Tensor:
    """Memory of its own with the same shape and strides."""
    if planned.numel() == 0:
        return torch.empty(planned.shape, dtype=planned.dtype, device=device)
    strides = planned.stride()
    extent = 1 + sum((n - 1) * s for n, s in zip(planned.shape, strides, strict=True))
    memory = torch.zeros(extent, dtype=planned.dtype, device=device)
    return memory.as_strided(planned.shape, strides)
