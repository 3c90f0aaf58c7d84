"""Finds the fastest configurations for the shapes that a program runs, and keeps them in a table.

What is measured is one library op on tensors laid out as the program had them.  Its plan asks for
configurations; each that the kernel's table offers is timed beside the kernel's own choice.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch import kernels, launch, tuned
from tritorch.bench import session, timing
from tritorch.bench.cases import OURS, Slot
from tritorch.bench.environment import Json, environment, write_whole
from tritorch.bench.passes import Prepared
from tritorch.testing import configurations
from tritorch.testing.calls import outputs_of

# of a 16-bit result's norm: another order of a sum, and far from a wrong index
_DIFFERENT = 2.0**-6
# bytes of the tensors of all sets of a ring
_MEMORY = 1 << 30
_MOST_SETS = 8
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


@dataclass(frozen=True)
class Answer:
    """What was found for one question: the best configuration, and the times of all, in us."""

    function: str
    sizes: tuple[int, ...]
    config: Any
    own: float
    best: float
    candidates: int
    # what differs from the kernel's own result, or does not run
    refused: tuple[str, ...] = ()

    def row(self, task: Task) -> dict[str, Json]:
        """As the table keeps it."""
        times = {"own_us": self.own, "median_us": self.best, "candidates": self.candidates}
        said = {"call": str(task), "refused": list(self.refused)}
        return tuned.row(self.function, self.sizes, self.config, **times, **said)


class _Recorder(TorchDispatchMode):
    """Keeps each library op that is called, once for each layout of its arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tasks: dict[tuple[Any, ...], Task] = {}

    def __torch_dispatch__(
        self,
        op: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if op.namespace == "tritorch" and not kwargs:
            key = (op, *map(_key, args))
            if key not in self.tasks:
                self.tasks[key] = Task(op, tuple(map(_planned, args)))
        return op(*args, **(kwargs or {}))


def tasks_of(run: Callable[[], object]) -> list[Task]:
    """The library ops that `run` calls, in both passes."""
    with _Recorder() as recorder:
        run()
    return list(recorder.tasks.values())


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


def _made(argument: Any, device: torch.device) -> Any:
    if isinstance(argument, Tensor):
        made = torch.empty_strided(
            argument.shape, argument.stride(), dtype=argument.dtype, device=device
        )
        # of indices and taps zero is always one
        return made.normal_() if argument.is_floating_point() else made.zero_()
    if isinstance(argument, list):
        return [_made(one, device) for one in argument]
    return argument


def questions_of(task: Task, device: torch.device) -> list[tuple[str, tuple[int, ...]]]:
    """What the plans of the call ask for, each once, where there is more than one answer."""
    arguments = [_made(argument, device) for argument in task.arguments]
    with launch.questions() as asked:
        task.op(*arguments)
    return [
        (function, sizes)
        for function, sizes in dict.fromkeys(asked)
        if len(_candidates(function, task.itemsize())) > 1
    ]


def _candidates(function: str, itemsize: int) -> tuple[Any, ...]:
    for module in pkgutil.iter_modules(kernels.__path__):
        table = configurations.tables(module.name).get(function)
        if table is not None:
            found = table.get(itemsize, ()) if isinstance(table, Mapping) else table
            return tuple(found)
    return ()


def answer(
    task: Task,
    function: str,
    sizes: tuple[int, ...],
    device: torch.device,
    plan: timing.Plan = _PLAN,
) -> Answer:
    """Times every candidate beside the kernel's own choice; the own one stays unless another is
    faster beyond both intervals.
    """
    clock = timing.clock(device)
    ring = _ring(task, device, clock)
    with launch.choices() as chosen, tuned.using({}):
        expected = _results(task, ring[0])
    own = next(config for name, config in chosen if name == function)
    sides: dict[str, list[timing.Call]] = {"own": [_call(task, one) for one in ring]}
    configs, refused = {"own": own}, []
    for number, config in enumerate(_candidates(function, task.itemsize())):
        if str(config) == str(own):
            continue
        calls = [_call(task, one, function, config) for one in ring]
        try:
            with launch.override(function, config):
                differs = _differ(_results(task, ring[0]), expected)
        except Exception as error:
            refused.append(f"{config}: {type(error).__name__}: {error}"[:300])
            continue
        if differs:
            refused.append(f"{config}: another result")
            continue
        sides[str(number)], configs[str(number)] = calls, config
    with tuned.using({}):
        times = timing.measure(sides, clock, plan, flush=len(ring) == 1)
    best = min(times, key=lambda name: times[name].median.value)
    if times[best].median.high >= times["own"].median.low:
        best = "own"
    medians = times["own"].median.value, times[best].median.value
    return Answer(function, sizes, configs[best], *medians, len(sides), tuple(refused))


def _ring(task: Task, device: torch.device, clock: timing.Clock) -> list[list[Any]]:
    """Sets of arguments that together do not fit the cache."""
    size = sum(a.numel() * a.element_size() for a in task.arguments if isinstance(a, Tensor))
    sets = max(1, min(_MOST_SETS, 2 * clock.cache() // max(size, 1) + 1, _MEMORY // max(size, 1)))
    return [[_made(argument, device) for argument in task.arguments] for _ in range(sets)]


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
    tasks: Sequence[Task],
    file: Path,
    device: torch.device,
    plan: timing.Plan = _PLAN,
    on_task: Callable[[Task], object] = lambda task: None,
) -> Iterator[Answer]:
    """Answers what the tasks ask and the file does not know yet, and keeps every answer at once.

    Raises:
        ValueError: the file holds something else.
    """
    known, rows = tuned.read(file), _rows(file)
    for task in tasks:
        on_task(task)
        for function, sizes in questions_of(task, device):
            if (function, sizes) in known:
                continue
            found = answer(task, function, sizes, device, plan)
            known[function, sizes] = found.config
            rows.append(found.row(task))
            table: dict[str, Json] = {
                "schema": 1,
                "kind": "tuned",
                "environment": environment(),
                "rows": rows,
            }
            write_whole(file, table, overwrite=True)
            yield found


def _rows(file: Path) -> list[Json]:
    if not file.exists():
        return []
    rows: list[Json] = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return rows


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
