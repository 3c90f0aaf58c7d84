"""Finds the fastest configurations for the shapes that a program runs, and keeps them in a table.

What is measured is one library op on tensors laid out as the program had them.  Its plan asks for
configurations; each candidate is timed beside the kernel's own choice, in every call that asks the
same, and their sum decides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch import launch, tuned
from tritorch.bench import candidates, session, timing
from tritorch.bench.cases import OURS, Slot
from tritorch.bench.environment import Json
from tritorch.bench.intervals import Interval
from tritorch.bench.passes import Prepared
from tritorch.bench.tuned_table import TunedTable
from tritorch.testing.calls import outputs_of, tensors_of

# of a 16-bit result's norm: another order of a sum, and far from a wrong index
_DIFFERENT = 2.0**-6
# bytes of the tensors of all sets of a ring
_MEMORY = 1 << 30
_MOST_SETS = 8
# arguments whose numbers are none below zero: of what has a root taken, and counts
_POSITIVE = frozenset({"var", "rstd", "running_var", "exp_avg_sqs", "max_exp_avg_sqs", "steps"})
_PLAN = timing.Plan(precision=0.005)


@dataclass(frozen=True)
class Task:
    """A call of a library op; its tensors are kept without their memory."""

    op: Any
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        shapes = ", ".join(
            "x".join(map(str, a.shape)) for a in self.arguments if isinstance(a, Tensor)
        )
        return f"{self.op.name().partition('::')[2]}({shapes})"

    def itemsize(self) -> int:
        """Bytes of an element of the first tensor of numbers."""
        found = (a for a in self.arguments if isinstance(a, Tensor) and a.is_floating_point())
        return next((a.element_size() for a in found), 0)


# the calls that ask, by what they ask
Asked = dict[tuned.Key, list[Task]]


@dataclass(frozen=True)
class Answer:
    """What was found for one question: the best configuration, and the times of all, in us."""

    function: str
    sizes: tuple[int, ...]
    config: Any
    # of each call, in which the kernel's own choice and the best one took
    calls: tuple[tuple[str, float, float], ...]
    candidates: int
    # what differs from the kernel's own result, or does not run
    refused: tuple[str, ...] = ()

    @property
    def own(self) -> float:
        return sum(own for _, own, _ in self.calls) / len(self.calls)

    @property
    def best(self) -> float:
        return sum(best for _, _, best in self.calls) / len(self.calls)

    def row(self) -> dict[str, Json]:
        """As the table keeps it."""
        calls = [{"call": call, **_times(own, best)} for call, own, best in self.calls]
        return tuned.row(
            self.function,
            self.sizes,
            self.config,
            **_times(self.own, self.best),
            candidates=self.candidates,
            calls=calls,
            refused=list(self.refused),
        )


def _times(own: float, best: float) -> dict[str, Json]:
    return {"own_us": round(own, 3), "median_us": round(best, 3)}


# where a configuration has no room for a product's moments, another one runs than was asked for
_TAKES_OTHERS = frozenset({"tritorch::convolution_batch_norm_stats"})


class _Recorder(TorchDispatchMode):
    """Keeps what each library op that is called asks, once for each layout of its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.asked: Asked = {}
        self._seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(
        self,
        op: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if op.namespace != "tritorch" or kwargs or op.name() in _TAKES_OTHERS:
            return op(*args, **(kwargs or {}))
        key = (op, *map(_key, args))
        if key in self._seen:
            return op(*args)
        self._seen.add(key)
        task = Task(op, tuple(map(_planned, args)))
        # what a table answers would hide what is asked where it does not
        with launch.questions() as asked, tuned.using({}):
            result = op(*args)
        for question in dict.fromkeys(asked):
            self.asked.setdefault(question, []).append(task)
        return result


def asked_by(programs: Iterable[Callable[[], object]]) -> Asked:
    """What the plans of the library ops ask that the programs call, in both passes."""
    recorder = _Recorder()
    for run in programs:
        with recorder:
            run()
    return recorder.asked


def _key(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    if isinstance(argument, list | tuple):
        return tuple(map(_key, argument))
    return argument


def _planned(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device="meta"
        )
    if isinstance(argument, list | tuple):
        return [_planned(one) for one in argument]
    return argument


def _made(argument: Any, device: torch.device, positive: bool) -> Any:
    if isinstance(argument, Tensor):
        lengths = zip(argument.shape, argument.stride(), strict=True)
        extent = 1 + sum((n - 1) * s for n, s in lengths) if argument.numel() else 0
        # of indices and taps zero is always one
        memory = torch.zeros(extent, dtype=argument.dtype, device=device)
        if argument.is_floating_point():
            # the memory, because of what is expanded nothing can be written twice
            memory = memory.uniform_(0.5, 2.0) if positive else memory.normal_()
        return memory.as_strided(argument.shape, argument.stride())
    if isinstance(argument, list):
        return [_made(one, device, positive) for one in argument]
    return argument


def answer(
    function: str,
    sizes: tuple[int, ...],
    tasks: Sequence[Task],
    device: torch.device,
    plan: timing.Plan = _PLAN,
) -> Answer | None:
    """Times every candidate beside the kernel's own choice in all calls; the own one stays unless
    another is faster beyond both intervals.  None where there is nothing to compare with.

    `plan`: its seconds are for all calls together.
    """
    own = candidates.own(function, sizes)
    configs = {"own": own}
    for number, config in enumerate(candidates.candidates(function, sizes, tasks[0].itemsize())):
        if str(config) != str(own):
            configs[str(number)] = config
    if len(configs) == 1:
        return None
    each = replace(plan, seconds=plan.seconds / len(tasks))
    times: list[dict[str, Interval]] = []
    refused: dict[str, None] = {}
    for task in tasks:
        medians, why = _timed(task, function, configs, device, each)
        times.append(medians)
        refused |= dict.fromkeys(why)
        # what one call cannot take is nothing for the others
        configs = {name: config for name, config in configs.items() if name in medians}
    best = min(configs, key=lambda name: sum(one[name].value for one in times))
    if sum(one[best].high for one in times) >= sum(one["own"].low for one in times):
        best = "own"
    calls = [
        (str(task), one["own"].value, one[best].value)
        for task, one in zip(tasks, times, strict=True)
    ]
    return Answer(function, sizes, configs[best], tuple(calls), len(configs), tuple(refused))


def _timed(
    task: Task,
    function: str,
    configs: Mapping[str, Any],
    device: torch.device,
    plan: timing.Plan,
) -> tuple[dict[str, Interval], list[str]]:
    """The medians of one call by name, and why the others have none."""
    clock = timing.clock(device)
    ring = _ring(task, device, clock)
    kernels = candidates.kernels_of(function)
    with tuned.using({}):
        with launch.recorded() as names:
            expected = _results(task, ring[0])
        refused = []
        if not all(bool(result.isfinite().all()) for result in expected):
            refused = [f"all: {task} is not finite by the kernel's own choice"]
            configs = {"own": configs["own"]}
        # a plan may decline what was chosen, and then another family's kernel runs
        must = configs["own"] is None or any(name in kernels for name in names)
        sides: dict[str, list[timing.Call]] = {"own": [_call(task, one) for one in ring]}
        for name, config in configs.items():
            if name == "own":
                continue
            try:
                with launch.override(function, config), launch.recorded() as names:
                    differs = _differ(_results(task, ring[0]), expected)
            except Exception as error:
                refused.append(f"{config}: {type(error).__name__}: {error}"[:300])
                continue
            if differs:
                refused.append(f"{config}: another result")
            elif must and not any(name in kernels for name in names):
                refused.append(f"{config}: another kernel runs")
            else:
                sides[name] = [_call(task, one, function, config) for one in ring]
        flush = len(ring) * _size(task) < 2 * clock.cache()
        times = timing.measure(sides, clock, plan, flush=flush)
    return {name: one.median for name, one in times.items()}, refused


def _ring(task: Task, device: torch.device, clock: timing.Clock) -> list[list[Any]]:
    """Sets of arguments that together do not fit the cache, as far as there may be so many."""
    size = max(1, _size(task))
    sets = max(1, min(_MOST_SETS, 2 * clock.cache() // size + 1, _MEMORY // size))
    return [_set(task, device) for _ in range(sets)]


def _size(task: Task) -> int:
    """Bytes of the tensors of one set."""
    found = [one for argument in task.arguments for one in tensors_of(argument)]
    # a list may be of strides
    return sum(one.numel() * one.element_size() for one in found if isinstance(one, Tensor))


def _set(task: Task, device: torch.device) -> list[Any]:
    names = [argument.name for argument in task.op._schema.arguments]
    return [
        _made(argument, device, name in _POSITIVE)
        for name, argument in zip(names, task.arguments, strict=False)
    ]


def _call(
    task: Task, arguments: Sequence[Any], function: str = "", config: Any = None
) -> timing.Call:
    if config is None:
        return lambda: task.op(*arguments)

    def call() -> object:
        with launch.override(function, config):
            return task.op(*arguments)

    return call


def _results(task: Task, arguments: Sequence[Any]) -> list[Tensor]:
    return [output.clone() for output in outputs_of(task.op(*arguments))]


def _differ(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a result is beyond another order of its sums."""
    for one, other in zip(ours, expected, strict=True):
        difference = (one.double() - other.double()).norm()
        if not difference <= _DIFFERENT * other.double().norm():
            return True
    return False


def tune(
    asked: Asked,
    table: TunedTable,
    device: torch.device,
    plan: timing.Plan = _PLAN,
    on_question: Callable[[str, tuple[int, ...]], object] = lambda function, sizes: None,
) -> Iterator[Answer]:
    """Answers what is asked and the table does not know yet, and keeps every answer at once."""
    for (function, sizes), tasks in asked.items():
        on_question(function, sizes)
        if table.knows(function, sizes, candidates.like(function, sizes)):
            continue
        found = answer(function, sizes, tasks, device, plan)
        if found is not None:
            table.add(found.row(), found.config)
            yield found


def programs(
    ops: Sequence[str], dtype: torch.dtype, device: torch.device
) -> Iterator[Callable[[], object]]:
    """Every pass of the workloads of these ops.

    Raises:
        ValueError: there is no such op.
    """
    for case in session.plan(session.Wanted(targets=tuple(ops), dtype=dtype)):
        slot = Slot.of(case, device, 0)
        for which in case.passes:
            yield Prepared(case, which, [slot]).call(OURS, 0)


def program(target: str) -> Callable[[], object]:
    """The program of `module:factory`: what the factory returns is called, or if it is a model with
    its inputs, run forward and backward.

    Raises:
        ValueError: there is no such factory, or it returns something else.
    """
    name, _, attribute = target.partition(":")
    try:
        made = getattr(importlib.import_module(name), attribute)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"tune: {target} cannot be made: {error}") from error
    if isinstance(made, tuple) and made and isinstance(made[0], torch.nn.Module):
        model, *inputs = made
        return lambda: (
            torch.stack([o.float().sum() for o in outputs_of(model(*inputs))]).sum().backward()
        )
    if callable(made) and not isinstance(made, torch.nn.Module):
        found: Callable[[], object] = made
        return found
    raise ValueError(
        f"tune: {target} must return a callable, or a tuple of a model and its inputs; "
        f"received {type(made).__name__}"
    )
