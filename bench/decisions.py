"""Why a call runs the kernels that it runs: what its plans ask, and who answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritorch import backend, launch, ops, tuned
from tritorch.testing import dry
from tritorch.testing.errors import RequestError

# the GPU whose measured table is asked for a target
GPUS = {"sm_90": "NVIDIA H100 80GB HBM3"}
# what a shape's numbers are
SHAPES = {
    "conv2d": "N,C,H,W,K,R or N,C,H,W,K,R,STRIDE",
    "linear": "ROWS,OUT,IN",
    "matmul": "M,N,K",
}


@dataclass(frozen=True)
class Answer:
    """One question of a plan; `config` is None where the kernel that was asked for declines."""

    function: str
    sizes: tuple[int, ...]
    config: Any
    measured: bool


@dataclass(frozen=True)
class Decision:
    """What one pass launches, in order, and what was asked on the way.

    A launch may have fewer stages than its configuration, which is for all sums.
    """

    which: str
    launches: tuple[dry.Launch, ...]
    answers: tuple[Answer, ...]

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of those launched."""
        return tuple(launch.kernel for launch in self.launches)


def decisions(
    op: str, shape: str, target: str = "sm_90", dtype: torch.dtype = torch.bfloat16
) -> list[Decision]:
    """The decisions of each pass of an op of SHAPES, in channels_last, on a target.

    A configuration is a measured one where the table that is installed for the target's GPU has it.

    Raises:
        RequestError: another op, or a shape of other numbers.
    """
    function, given = _call(op, shape, dtype)
    file = tuned.shipped(GPUS[target]) if target in GPUS else None
    table = {} if file is None else tuned.read(file)
    found = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.use("triton"))
        recorder = stack.enter_context(dry.compiling_for(target))
        stack.enter_context(tuned.using(table))

        def watched(which: str, run: Callable[[], object]) -> Decision:
            before = len(recorder.launches)
            answers = _answers(run, table)
            return Decision(which, tuple(recorder.launches[before:]), answers)

        outputs: list[Tensor] = []
        found.append(watched("forward", lambda: outputs.append(function(**given))))
        [y] = outputs
        leaves = [value for value in given.values() if isinstance(value, Tensor)]
        grad = torch.empty_like(y)
        found.append(watched("backward", lambda: torch.autograd.grad(y, leaves, grad)))
    return found


def _answers(run: Callable[[], object], table: Mapping[tuned.Key, Any]) -> tuple[Answer, ...]:
    with launch.questions() as asked, launch.choices() as chosen:
        run()
    given = iter(chosen)
    answer = next(given, None)
    answers = []
    for function, sizes in asked:
        config = None
        # a question that was declined has left no choice
        if answer is not None and answer[0] == function:
            config, answer = answer[1], next(given, None)
        answers.append(Answer(function, sizes, config, (function, sizes) in table))
    return tuple(answers)


def _call(op: str, shape: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], dict[str, Any]]:
    if op not in SHAPES:
        raise RequestError(f"--why: expects one of {', '.join(SHAPES)}, received {op!r}")
    try:
        numbers = [int(word) for word in shape.split(",")]
    except ValueError:
        numbers = []
    if op == "conv2d" and len(numbers) == 6:
        numbers.append(1)
    if len(numbers) != (7 if op == "conv2d" else 3) or min(numbers) < 1:
        raise RequestError(f"--why {op}: expects {SHAPES[op]}, received {shape!r}")

    # memory that is never touched is never allocated
    def made(*size: int) -> Tensor:
        form = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=dtype, memory_format=form).requires_grad_()

    if op == "conv2d":
        n, c, h, w, k, r, stride = numbers
        tensors = {"input": made(n, c, h, w), "weight": made(k, c, r, r)}
        return ops.conv2d, {**tensors, "stride": stride, "padding": r // 2}
    m, n, k = numbers
    if op == "linear":
        return ops.linear, {"input": made(m, k), "weight": made(n, k)}
    return ops.matmul, {"input": made(m, k), "other": made(k, n)}


def lines(found: list[Decision]) -> list[str]:
    """The decisions as text."""
    shown = []
    for one in found:
        shown.append(f"{one.which}: {', '.join(one.kernels) or 'no kernel'}")
        for answer in one.answers:
            said = f"{answer.function}{answer.sizes}"
            if answer.config is None:
                shown.append(f"  {said}: not this kernel")
                continue
            by = "measured" if answer.measured else "the kernel's own choice"
            shown.append(f"  {said}: {answer.config} ({by})")
        for made in one.launches:
            grid = " x ".join(str(size) for size in made.grid)
            shown.append(
                f"  {made.kernel} on {grid}: num_warps: {made.num_warps}, "
                f"num_stages: {made.num_stages}, shared: {made.compiled.metadata.shared} bytes"
            )
    return shown
