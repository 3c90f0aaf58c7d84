"""Compiles kernels in many processes before they are timed, without touching the GPU.

Triton finds what they leave in its cache on the disk: a run that measures need not wait for a
compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritorch import backend, tuned
from tritorch.bench.cases import OURS, Case
from tritorch.bench.passes import bound
from tritorch.testing import dry
from tritorch.testing.calls import map_tensors, outputs_of


def compile_case(case: Case, target: str, table: Mapping[tuned.Key, Any] | None = None) -> str:
    """Compiles what our implementation launches in all passes; says what went wrong, "" if nothing.

    `table`: the measured configurations that the GPU's launches will take.  The launchers are built
    too where there is a driver to build them for.
    """
    function = case.implementations[OURS]
    try:
        with (
            backend.use("triton"),
            tuned.using(table or {}),
            dry.compiling_for(target) as recorder,
        ):
            for wanted in set(case.passes.values()):
                _run(function, _unwritten(case), wanted)
        for launch in recorder.kernels:
            with contextlib.suppress(Exception):
                _launcher(launch.compiled)
    except Exception as error:
        return f"{case.op} {case.name}: {type(error).__name__}: {error}"[:500]
    return ""


def _unwritten(case: Case) -> dict[str, Any]:
    """The arguments in memory that is never touched, and therefore never allocated.

    Tensors without memory would not reach the kernels.
    """

    def made(planned: Tensor) -> Tensor:
        if planned.device.type == "cpu":
            # the host looks at it: a step count, say
            return planned.clone()
        return torch.empty_strided(planned.shape, planned.stride(), dtype=planned.dtype)

    return {name: map_tensors(value, made) for name, value in case.arguments.items()}


def _run(function: Any, given: dict[str, Any], wanted: tuple[str, ...]) -> None:
    for name in wanted:
        given[name] = given[name].detach().requires_grad_()
    outputs = [o for o in outputs_of(bound(function, given)()) if isinstance(o, Tensor)]
    outputs = [o for o in outputs if o.requires_grad]
    if outputs:
        grads = [torch.empty_like(output) for output in outputs]
        leaves = [given[name] for name in wanted]
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def _launcher(compiled: Any) -> None:
    """Builds the extension module that launches this signature, as the first launch would."""
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(compiled.src, compiled.metadata)


def table_of(environment: Mapping[str, Any] | None) -> Mapping[tuned.Key, Any]:
    """The measured configurations of the GPU of an `environment`; none where it has no GPU."""
    if environment is None or environment.get("gpu") is None:
        return {}
    return tuned.of(*(environment[name] for name in ("gpu", "capability", "multiprocessors")))


def target_of(capability: str | None) -> str | None:
    """The dry driver's name of a compute capability such as "9.0"; None where it has none."""
    name = f"sm_{(capability or '').replace('.', '')}"
    return name if name in dry.TARGETS else None
