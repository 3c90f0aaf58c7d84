"""`check`: tells what is wrong with a callable that launches Triton kernels, without a GPU."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tritorch.registry import Maker, OpSpec, Sample
from tritorch.testing import describe, dry, interpreter, schedule, supervise
from tritorch.testing.collecting import Run
from tritorch.testing.errors import RequestError
from tritorch.testing.parts import LIMITS
from tritorch.testing.report import Report
from tritorch.testing.requests import TARGETS, Request

# seconds that one case may take in a process of its own
TIMEOUT = 120.0

Samples = str | Callable[[Maker], Iterable[Sample | dict[str, Any]]] | Sequence[Any]


def check(
    fn: Callable[..., Any] | str,
    reference: Callable[..., Any] | str | None = None,
    samples: Samples | None = None,
    *,
    level: schedule.Level = "quick",
    seed: int = 0,
    case: str | Mapping[str, Any] = "",
    dtypes: Iterable[torch.dtype] | None = None,
    gradients: Iterable[str] | None = None,
    mutates: Iterable[str] | None = None,
    non_finite: Iterable[str] | None = None,
    accuracy: describe.Accuracy | None = None,
    contract: str = "ieee",
    targets: Iterable[str] = TARGETS,
    device: str | None = None,
    timeout: float = TIMEOUT,
    reproductions: str | Path | None = None,
    on_event: Callable[[supervise.Event], None] | None = None,
) -> Report:
    """Runs `fn` through the battery beside `reference`, and says what it found.

    No GPU is needed: the kernels are interpreted, with every memory access watched, and compiled
    for `targets`.  `fn` need not change: `@triton.autotune`, descriptors and a hard-coded
    `device="cuda"` work.  Tensors of the caller are copied, never written.

    Args:
        fn: a function of tensors, or its name: "package.module:function",
            "path/to/file.py:function", or an op of tritorch's own.
        reference: the same in plain PyTorch, in any dtype, or its name.  None: the function called
            `reference` in fn's module.
        samples: what the arguments look like, as text ("x[M, K] weight[N, K] eps=1e-5": see
            `tritorch.testing.inputs`), a function from a `Maker` to samples or dicts of arguments,
            or a list of calls, dicts or tuples, whose shapes are then tried.  None: the text INPUTS
            of fn's module, else a guess, which the report names.
        level: "quick" for seconds, "full" for minutes, "soak" for a night.
        seed: of all random numbers; the same seed gives the same cases.
        case: the id of the only case to run, or the case as a mapping, as reproductions have it.
        dtypes: which of float32, float16, bfloat16 and float64 are tried.  None: the first three,
            as far as the reference takes them.
        gradients: the arguments with a gradient.  None: as the reference has them.
        mutates: the arguments that fn may write.  None: those that the reference writes.
        non_finite: the arguments in which NaN and infinities are tried.  None: every one.
        accuracy: the rule by which rounding is judged, "exact", "multilinear" or "composite".
            None: derived from the reference.
        contract: "tf32" allows TF32 for float32 products, "ieee" does not.
        targets: GPUs to compile for, of "sm_80", "sm_90", "sm_100" and "gfx942"; may be empty.
        device: "cuda" runs on a GPU instead.  None: "cpu", interpreted.
        timeout: seconds after which a case in a separate process counts as hung.
        reproductions: a folder for scripts that show one finding each; created if needed.
        on_event: called with an event before each case, and with its outcome.

    Returns:
        A `Report`: `findings`, `ok`, `str()` of it for people, `to_json()` for programs.

    Raises:
        RequestError: a ValueError: a name that does not exist, an unknown option, inputs that
            cannot be read or guessed, a reference that refuses them.
        InternalError: a RuntimeError: the checks themselves failed before they could begin.
        RuntimeError: `fn` cannot be imported by another process, and this one does not interpret
            kernels; or a file under check calls `check` while it is imported.
        OSError: `reproductions` is not a writable folder.
    """
    if os.environ.get(supervise.CHILD):
        raise RuntimeError(
            "check: a check imports the file that calls this one: put the call below "
            '`if __name__ == "__main__":`'
        )
    if reproductions is not None:
        # before minutes of work
        Path(reproductions).mkdir(parents=True, exist_ok=True)
    _must_be_one_of("level", level, schedule.LEVELS)
    _must_be_one_of("contract", contract, ("ieee", "tf32"))
    _must_be_one_of("device", device or "cpu", ("cpu", "cuda"))
    targets = tuple(targets)
    for target in targets:
        _must_be_one_of("targets", target, dry.TARGETS)
    lists = {"gradients": gradients, "mutates": mutates, "non_finite": non_finite}
    fixed: dict[str, Any] = {k: None if v is None else tuple(v) for k, v in lists.items()}
    fixed["accuracy"] = accuracy
    request = Request(
        target=fn if isinstance(fn, str) else _name(fn),
        reference=reference if isinstance(reference, str) else _name(reference),
        inputs=samples if isinstance(samples, str) else _name(samples),
        dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes or ()),
        targets=targets,
        device=device or "cpu",
        level=level,
        seed=seed,
        case=case if isinstance(case, str) else "",
        step=None if isinstance(case, str) else dict(case),
        contract=contract,
        **fixed,
    )
    run = Run(request, timeout, on_event or (lambda event: None))
    unnamed = [
        what
        for what, value, name in (
            ("function", fn, request.target),
            ("reference", reference, request.reference),
            ("samples", samples, request.inputs),
        )
        if not isinstance(value, str | None) and not name
    ]
    here = not isinstance(fn, str) and interpreter.interpreting() and request.device == "cpu"
    if not here:
        _must_all_be_named(unnamed)
    part = (request.step or {}).get("section")
    compiles = bool(request.targets) and part in (None, LIMITS)
    if compiles and not (request.target and (reference is None or request.reference)):
        compiles = False
        run.report.section(LIMITS).skipped = "its functions have no name to import"
    with ThreadPoolExecutor(max_workers=1) as pool, run.ended_together():
        # beside each other: a machine that interprets has a second core to compile on
        compiling = pool.submit(run.apart, "compile") if compiles else None
        if part == LIMITS:
            # the other part knows that case
            pass
        elif here:
            constants = {**fixed, "dtypes": tuple(dtypes) if dtypes else None}
            run.here(fn, reference, samples, constants)
        else:
            run.apart("cuda" if request.device == "cuda" else "interpret")
        if compiling is not None:
            compiling.result()
    return run.finish(reproductions, unnamed)


def _name(value: Any) -> str:
    """How another process finds a function: "file.py:name", or nothing."""
    if value is None or not callable(value):
        return ""
    if isinstance(value, OpSpec):
        return value.name
    name = getattr(value, "__qualname__", "")
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if not name or "<" in name or module is None:
        return ""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        return ""
    file = getattr(module, "__file__", None)
    if file and file.endswith(".py") and not _is_of_a_package(module):
        return f"{file}:{name}"
    return "" if module.__name__ == "__main__" else f"{module.__name__}:{name}"


def _is_of_a_package(module: Any) -> bool:
    """Whether another process finds the module by its name: a file alone is found as a file."""
    top, dot, _ = module.__name__.partition(".")
    # a loader of tests makes up names such as tests.test_kernels
    return bool(dot) and importlib.machinery.PathFinder.find_spec(top) is not None


def _must_be_one_of(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise RequestError(f"check: {what}: expects one of {', '.join(known)}, received {value!r}")


def _must_all_be_named(unnamed: Sequence[str]) -> None:
    if unnamed:
        raise RuntimeError(
            f"check: the {unnamed[0]} cannot be imported by another process, and this one does not "
            "interpret kernels: set TRITON_INTERPRET=1 before Python starts, or put it at the "
            "top level of a file"
        )
