"""The properties that a function can lack on a GPU alone: graphs, streams, memory beside tensors.

As in `battery.py`, each is a function from a subject and a case to findings, and none is good.  All
but `guard_bands` need a case on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tritorch.registry import Argument, Subject
from tritorch.testing import calls, cases, hints
from tritorch.testing.cases import Outcome
from tritorch.testing.findings import Finding
from tritorch.testing.trials import Case, judged, outcome, same_bits

# some 30 milliseconds: longer than any host code takes to get ahead
_DELAY_CYCLES = 50_000_000
# elements on either side of a tensor, which keep its alignment
_BAND = 1024
_WARM_UPS = 3


class NotCaptured(cases.Refused):
    """A call cannot be captured in a CUDA graph, which it need not be: says why."""


def cuda_graph(subject: Subject, case: Case) -> list[Finding]:
    """A captured call, replayed with other numbers in its arguments, gives the result of those.

    Raises NotCaptured where there is no such call.
    """
    later = replace(case, seed=case.seed + 1)
    arguments, others = case.arguments(subject), later.arguments(subject)
    expected, findings = outcome(subject, later, others)
    if expected is None:
        return findings
    make_grad = _remembered(later.gradient(subject))
    given = _leaves(subject, arguments)
    graph = torch.cuda.CUDAGraph()
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # compiles and tunes what a capture cannot
            for _ in range(_WARM_UPS):
                _once(subject, given, make_grad)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            captured = _once(subject, given, make_grad)
    except Exception as error:
        found = hints.of_exception(error, str(case))
        place = f" at {found.file}:{found.line}" if found.line else ""
        message = f"the call cannot be captured in a CUDA graph: {found.message}{place}"
        raise NotCaptured(message) from error
    _write(given, others)
    graph.replay()
    torch.cuda.synchronize()
    return findings + _compared(
        "cuda graph", "replayed", subject, later, others, captured, expected
    )


def side_stream(subject: Subject, case: Case) -> list[Finding]:
    """All work is done on the current stream: it waits for what makes the arguments there."""
    arguments = case.arguments(subject)
    make_grad = _remembered(case.gradient(subject))
    expected, findings = outcome(subject, case, arguments)
    if expected is None:
        return findings
    # makes the gradients too, on a stream that is waited for
    _once(subject, _leaves(subject, arguments), make_grad)
    late = _leaves(subject, {n: calls.map_tensors(v, _stale) for n, v in arguments.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(_DELAY_CYCLES)
        _write(late, arguments)
        actual = _once(subject, late, make_grad)
    stream.synchronize()
    return findings + _compared(
        "stream", "on a side stream", subject, case, arguments, actual, expected
    )


def _stale(tensor: Tensor) -> Tensor:
    """What must not be read: NaN, or for an index at least a valid one."""
    return torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)


def guard_bands(subject: Subject, case: Case) -> list[Finding]:
    """Nothing beside an argument is written, and nothing there changes the result."""
    arguments = case.arguments(subject)
    expected, findings = outcome(subject, case, arguments)
    if expected is None:
        return findings
    bands: dict[str, _Banded] = {}

    def banded(name: str) -> Callable[[Tensor], Tensor]:
        def place(tensor: Tensor) -> Tensor:
            bands[f"{name} {len(bands)}"] = _Banded(name, tensor)
            return bands[f"{name} {len(bands) - 1}"].view

        return place

    given = {name: calls.map_tensors(v, banded(name)) for name, v in arguments.items()}
    actual = _once(subject, _leaves(subject, given, copy=False), case.gradient(subject))
    for band in bands.values():
        if band.written():
            message = f"memory beside {band.name} was written"
            findings.append(Finding("guard band", message, argument=band.name, case=str(case)))
    said = "with NaN beside the arguments"
    return findings + _compared("guard band", said, subject, case, arguments, actual, expected)


class _Banded:
    """A tensor's values amid NaN (integers: the largest), in its own strides."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name = name
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 1 + sum((n - 1) * s for n, s in steps) if tensor.numel() else 0
        canary = float("nan") if tensor.is_floating_point() else _largest(tensor.dtype)
        self.memory = torch.full(
            (extent + 2 * _BAND,), canary, dtype=tensor.dtype, device=tensor.device
        )
        self.view = self.memory.as_strided(tensor.shape, tensor.stride(), _BAND)
        outside = torch.ones(self.memory.shape, dtype=torch.bool, device=tensor.device)
        # an expanded tensor cannot be written to: its elements are, each once
        each = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
        outside.as_strided(tensor.shape, tensor.stride(), _BAND)[each] = False
        self.view[each] = tensor[each]
        self.outside = outside
        self.before = self.memory.clone()

    def written(self) -> bool:
        now, then = (memory.detach()[self.outside] for memory in (self.memory, self.before))
        return not cases.bitwise_equal(now, then)


def _largest(dtype: torch.dtype) -> int | bool:
    return True if dtype == torch.bool else int(torch.iinfo(dtype).max)


def _leaves(
    subject: Subject, arguments: Mapping[str, Argument], *, copy: bool = True
) -> dict[str, Argument]:
    """Arguments to call with, those with a gradient as leaves."""
    given = {
        name: calls.map_tensors(value, torch.clone if copy else torch.detach)
        for name, value in arguments.items()
    }
    for name in subject.gradients:
        value = given.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            given[name] = value.detach().requires_grad_()
    return given


def _once(
    subject: Subject, given: dict[str, Argument], make_grad: Callable[[Tensor], Tensor]
) -> Outcome:
    """One call and its gradients, without the copies and checks that a capture does not allow."""
    outputs = calls.outputs_of(calls.call(subject.op, given), subject.name)
    grads = cases.differentiate(outputs, given, make_grad)
    return Outcome(
        tuple(output.detach() for output in outputs), grads, cases.written(subject, given)
    )


def _remembered(make_grad: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Makes a gradient once for each shape: a capture cannot copy from the host."""
    known: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def make(like: Tensor) -> Tensor:
        key = like.shape, like.dtype
        if key not in known:
            known[key] = make_grad(like)
        return known[key]

    return make


def _write(given: Mapping[str, Argument], values: Mapping[str, Argument]) -> None:
    """Writes values into tensors that have an address already."""
    with torch.no_grad():
        for name, value in values.items():
            for target, source in zip(
                calls.tensors_of(given[name]), calls.tensors_of(value), strict=True
            ):
                target.copy_(source)


def _compared(
    kind: str,
    when: str,
    subject: Subject,
    case: Case,
    arguments: Mapping[str, Argument],
    actual: Outcome,
    expected: Outcome,
) -> list[Finding]:
    """What has other bits than expected, and is wrong too: sums by atomics may differ in bits."""
    other = same_bits(kind, when, actual, expected, case)
    if not other:
        return []
    return [
        replace(finding, kind=kind, message=f"{when}, {finding.message}")
        for finding in judged(subject, case, arguments, actual)
    ]
