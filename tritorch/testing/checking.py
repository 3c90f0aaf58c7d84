"""`check`: tells what is wrong with a callable that launches Triton kernels, without a GPU."""

from __future__ import annotations

import contextlib
import importlib.machinery
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tritorch.registry import Maker, OpSpec, Sample
from tritorch.testing import (
    describe,
    dry,
    hosting,
    interpreter,
    parts,
    reproduction,
    requests,
    schedule,
    supervise,
)
from tritorch.testing.errors import RequestError
from tritorch.testing.findings import Finding
from tritorch.testing.parts import LIMITS
from tritorch.testing.report import MEMORY, Report
from tritorch.testing.requests import TARGETS, Request
from tritorch.testing.steps import Words

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

    Without a GPU the kernels are interpreted, every access watched, and compiled for `targets`;
    nothing of `fn`'s has to change: `@triton.autotune`, descriptors, a hard-coded `device="cuda"`
    work.  Tensors of the caller are copied, never written.

    Args:
        fn: a function of tensors, or its name: "package.module:function",
            "path/to/file.py:function", or an op of tritorch's own.
        reference: the same in plain PyTorch, in any dtype, or its name.  None: the function called
            `reference` in fn's module.
        samples: what the arguments look like, as text ("x[M, K] weight[N, K] eps=1e-5": see
            `tritorch.testing.inputs`), a function from a `Maker` to samples or dicts of arguments,
            or a list of calls, dicts or tuples, whose shapes are then what is tried.  None: the
            text INPUTS of fn's module, else a guess, which the report names.
        level: "quick" for seconds, "full" for minutes, "soak" for a night.
        seed: of every number; the same seed gives the same cases.
        case: the id of one case, to run it alone, or what a reproduction has in its place: the case
            in words.
        dtypes: what is tried of float32, float16, bfloat16 and float64.  None: the first three, as
            far as the reference takes them.
        gradients: the arguments with a gradient.  None: as the reference has them.
        mutates: the arguments that fn may write.  None: those that the reference writes.
        non_finite: the arguments in which NaN and infinities are tried.  None: every one.
        accuracy: by which rule rounding is judged; None: found out from the reference.
        contract: "tf32" where float32 products may be TF32's, "ieee" where not.
        targets: GPUs to compile for, of "sm_80", "sm_90", "sm_100" and "gfx942"; none: not at all.
        device: "cuda" runs on a GPU instead.  None: "cpu", interpreted.
        timeout: seconds that one case may take before it counts as hung, in a process of its own.
        reproductions: a folder for scripts that show one finding each; made if need be.
        on_event: hears of every case before it starts, and of what came of it.

    Returns:
        A `Report`: `findings`, `ok`, `str()` of it for people, `to_json()` for programs.

    Raises:
        RequestError: a ValueError: a name that is not there, an option that is not known, inputs
            that cannot be read or guessed, a reference that refuses them.
        InternalError: a RuntimeError: these checks failed themselves, before they could begin.
        RuntimeError: `fn` is known to this process alone, which does not interpret kernels; or a
            file that is checked calls `check` while it is imported.
        OSError: `reproductions` is no folder to write in.
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
    run = _Run(request, timeout, on_event or (lambda event: None))
    here = not isinstance(fn, str) and interpreter.interpreting() and request.device == "cpu"
    if not here:
        _must_be_known(request, fn, reference, samples)
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
    unnamed = [
        what
        for what, value, name in (
            ("function", fn, request.target),
            ("reference", reference, request.reference),
            ("samples", samples, request.inputs),
        )
        if value is not None and not name
    ]
    return run.finish(reproductions, unnamed)


class _Run:
    """Collects what the parts of one check say."""

    def __init__(
        self, request: Request, timeout: float, on_event: Callable[[supervise.Event], None]
    ) -> None:
        self.request, self.timeout, self.on_event = request, timeout, on_event
        self.start = time.perf_counter()
        self.report = Report(
            request.target, request.reference, request.level, request.seed, request.device
        )
        # what a reproduction of each finding needs: its case in words
        self.shown: list[tuple[Finding, Words | None]] = []
        # what the compiling part said: it counts when the other is done, whichever was faster
        self.later: list[supervise.Event] = []
        # how many cases each section of the battery is to have, once it says so
        self.planned: dict[str, float] = {"cases": math.inf}
        self.cut_short: dict[str, float] = {}
        self.ended: list[tuple[Finding, supervise.Event]] = []
        self.unwanted = threading.Event()
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def ended_together(self) -> Iterator[None]:
        """What fails or interrupts one part ends the process of the other."""
        try:
            yield
        except BaseException:
            self.unwanted.set()
            raise

    def here(
        self,
        fn: Any,
        reference: Any,
        samples: Any,
        options: dict[str, Any],
    ) -> None:
        """The battery in this process."""
        module = sys.modules.get(getattr(fn, "__module__", ""))
        if reference is None:
            reference = getattr(module, "reference", None)
        if isinstance(reference, str):
            reference = hosting.load(reference)
        if reference is None:
            raise RequestError("check: there is nothing to compare with: pass a reference")
        for option, constant in (("dtypes", "DTYPES"), ("non_finite", "NON_FINITE")):
            if options[option] is None:
                options[option] = getattr(module, constant, None)
        if samples is None or samples == "":
            samples = getattr(module, "INPUTS", "")
        named = self.request.reference or getattr(reference, "__name__", "reference")
        if not self.report.target:
            self.report.target = getattr(fn, "__name__", "function")

        def work() -> None:
            found = requests.asked(fn, reference, samples, named, options, self._say)
            parts.battery_part(self.request, found, self._say)

        parts.going_on(work, self._say)

    def apart(self, part: str) -> None:
        """A part in a process of its own."""
        compiles = part == "compile"
        doing: supervise.Event = {}

        def hear(event: supervise.Event) -> None:
            nonlocal doing
            doing = event if event["event"] == "doing" else doing
            self._hear(event, later=compiles)

        request = self.request.to_json()
        for finding in supervise.run(
            part, request, timeout=self.timeout, on_event=hear, unwanted=self.unwanted
        ):
            self.ended.append((finding, doing))
            # how many there are to compile nobody knows before
            self.cut_short |= {LIMITS: math.inf} if compiles else self.planned

    def _say(self, event: str, **fields: Any) -> None:
        self._hear({"event": event, **fields}, later=False)

    def _hear(self, event: supervise.Event, *, later: bool) -> None:
        with self.lock:
            if later:
                self.later.append(event)
            else:
                self._note(event)
            self.on_event(event)

    def _note(self, event: supervise.Event) -> None:
        kind = event["event"]
        if kind == "begin":
            self.report.reference = event["reference"]
            self.report.notes += event["notes"]
        elif kind == "plan":
            self.planned = event["cases"]
        elif kind == "end":
            self.report.notes += [n for n in event["notes"] if n not in self.report.notes]
            if event["watched"]:
                self.report.section(MEMORY).cases = event["watched"]
        elif kind == "outcome":
            section = self.report.section(event["section"])
            section.cases += 1
            section.declined += event["declined"]
            section.broken += event["broken"]
            section.seconds += event["seconds"]
        elif kind == "mistake":
            where = f"{event['property']} of {event['case']}"
            self.report.mistakes.append(f"{where}:\n{event['message']}")
        elif kind == "again":
            self.report.section(event["section"]).failed = True
        elif kind == "finding":
            finding = parts.as_finding(event["finding"])
            for new in self.report.add(event["section"], [finding]):
                self.shown.append((new, event["step"]))
                self.report.ids[new.key] = event["id"]

    def finish(self, folder: str | Path | None, unnamed: Sequence[str]) -> Report:
        """The report, and the scripts; `unnamed` says what no other process can import."""
        for event in self.later:
            self._note(event)
        self.report.cut_short(self.cut_short)
        # in the order of their parts too
        for finding, doing in sorted(self.ended, key=lambda ended: ended[0].message):
            self.report.section(finding.kind).cases += 1
            for new in self.report.add(finding.kind, [finding]):
                self.shown.append((new, doing.get("step")))
                self.report.ids[new.key] = doing.get("id", "")
        if self.request.case and not self.report.cases:
            raise RequestError(
                f"check: no case has the id {self.request.case!r}: ids are those of a report of "
                "the same inputs, level and seed"
            )
        self.report.seconds = time.perf_counter() - self.start
        for last in (MEMORY, LIMITS):
            if last in self.report.sections:
                self.report.sections[last] = self.report.sections.pop(last)
        if folder is not None and self.shown:
            self._reproduce(Path(folder), unnamed)
        return self.report

    def _shows(self, step: Words, finding: Finding) -> bool:
        """Whether a case shows a finding when no other has been before it."""
        found: list[Finding] = []

        def hear(event: supervise.Event) -> None:
            if event["event"] == "finding":
                found.append(parts.as_finding(event["finding"]))

        part = "cuda" if self.request.device == "cuda" else "interpret"
        part = "compile" if step["section"] == LIMITS else part
        request = replace(self.request, case="", step=step).to_json()
        try:
            found += supervise.run(part, request, timeout=self.timeout, on_event=hear)
        except (RequestError, supervise.ChildError):
            # the report counts for more than a script
            return False
        wanted = reproduction.sign(finding)
        return any(reproduction.sign(one) == wanted for one in found)

    def _reproduce(self, folder: Path, unnamed: Sequence[str]) -> None:
        """A script for each finding, or why there is none."""
        if unnamed:
            what = " and the ".join(unnamed)
            self.report.unscripted.append(
                f"the {what}: no name to import {'them' if len(unnamed) > 1 else 'it'} by; "
                "give a module-level name, or samples as text"
            )
            return
        for finding, step in self.shown:
            if step is None:
                place = f" at {finding.file}:{finding.line}" if finding.line else ""
                self.report.unscripted.append(f"the {finding.kind}{place}: of no single case")
                continue
            if finding.kind != "hang" and not self._shows(step, finding):
                said = "its case alone, in a process of its own, does not show it"
                self.report.unscripted.append(f"the {finding.kind} in {finding.case}: {said}")
                continue
            path = reproduction.write(folder, self.request, finding, step, timeout=self.timeout)
            self.report.reproductions.append(str(path))


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


def _must_be_known(request: Request, fn: Any, reference: Any, samples: Any) -> None:
    for what, value, name in (
        ("the function", fn, request.target),
        ("the reference", reference, request.reference),
        ("the samples", samples, request.inputs),
    ):
        if not isinstance(value, str | None) and not name:
            raise RuntimeError(
                f"check: {what} cannot be imported by another process, and this one does not "
                "interpret kernels: set TRITON_INTERPRET=1 before Python starts, or put it at the "
                "top level of a file"
            )
