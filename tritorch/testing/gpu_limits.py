"""Compiles a user's kernels for GPUs that are not present, and checks them against their limits.

Needs a process that compiles (`dry`).  Nothing runs: what kernels should have written is zero, so
host code that branches on results sees zeros.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import linecache
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tritorch.testing import diagnostics, dry, hosting, redirect
from tritorch.testing.findings import Finding


def limits(
    call: Callable[[], object],
    targets: Iterable[str] = ("sm_80", "sm_90"),
    contract: Literal["ieee", "tf32"] = "ieee",
    configurations: Literal["all", "first"] = "all",
    on_compile: Callable[[str], None] = lambda what: None,
) -> list[Finding]:
    """Compiles what `call` launches, in every autotune configuration, and finds what stops it.

    `call`: a call of the user's function on CPU or meta tensors.  `targets`: names of
    `dry.TARGETS`; other GPUs than these two are for kernels that claim to run there, since lists of
    configurations are made for one vendor.  `contract` "tf32" allows TF32 for float32 products.
    `on_compile` is called with target, kernel and configuration before each compilation.

    Finds "compilation" and "tile" with the line, "resources" (shared memory, registers, threads;
    spills where no configuration is without) and "tf32" with the line of the product.  A
    configuration that fails while another of its kernel works is one finding per configuration,
    which says whether autotune would discard it; if all fail it is one finding.  "error": the host
    code raised before it had launched everything.  The targets of equal findings are listed in one.

    Raises ValueError for an unknown target, RuntimeError where kernels are interpreted.
    """
    # of each the targets, in order and once
    problems: dict[Finding, dict[str, None]] = {}
    for target in targets:
        for problem in _problems(_survey(call, target, configurations, on_compile), contract):
            problems.setdefault(problem, {})[target] = None
    return [
        replace(problem, message=f"{', '.join(where)}: {problem.message}")
        for problem, where in problems.items()
    ]


def is_discarded(finding: Finding) -> bool:
    """Whether it is about a configuration that autotune leaves out, so that the kernel works."""
    return finding.message.endswith(_DISCARDED)


_DISCARDED = "; autotune discards it"


@dataclass(frozen=True)
class _Attempt:
    """One kernel in one configuration: what was compiled, or why nothing was."""

    function: Any
    # the autotuner's name for the kernel, and its configuration; empty without autotune
    tuned: str
    config: str
    launch: dry.Launch | None = None
    error: Exception | None = None
    # what the compiler wrote to standard error meanwhile
    said: str = ""

    @property
    def group(self) -> tuple[Any, str]:
        """Equal for what autotune chooses from; without it each configuration is on its own."""
        alone = str(self.error) if self.launch is None else _settings(self.launch)
        return self.function, self.tuned or alone


@dataclass
class _Survey:
    target: dry.Target
    attempts: list[_Attempt]
    # what the host code raised
    error: Exception | None = None


def _survey(
    call: Callable[[], object],
    target: str,
    configurations: str,
    on_compile: Callable[[str], None],
) -> _Survey:
    """Runs `call` and keeps every attempt to compile; a failure does not end the call."""
    jit = importlib.import_module("triton.runtime.jit").JITFunction
    tuning = importlib.import_module("triton.runtime.autotuner").Autotuner
    out_of_resources = importlib.import_module("triton.runtime.errors").OutOfResources
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(dry.compiling_for(target))
        host = stack.enter_context(hosting.hosted())
        survey = _Survey(recorder.target, [])
        current = "", ""

        def note(function: Any, **outcome: Any) -> None:
            survey.attempts.append(_Attempt(function, *current, **outcome))

        run = jit.run

        def run_noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            before, written = len(recorder.launches), diagnostics.end()
            on_compile(", ".join(filter(None, (target, self.__name__, current[1]))))
            try:
                result = run(self, *args, **kwargs)
            except (dry.CompileError, out_of_resources) as error:
                note(self, error=error, said=diagnostics.since(written))
                return None
            for launch in recorder.launches[before:]:
                note(self, launch=launch)
            return result

        def run_all(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal current
            self.nargs = dict(zip(self.arg_names, args, strict=False))
            configs = self.prune_configs(kwargs) if len(self.configs) > 1 else self.configs
            configs = configs if configurations == "all" else configs[:1]
            results: list[Any] = []
            # what hooks leave behind is of the first, which the caller then works with
            for config in [*configs, *configs[:1]] if len(configs) > 1 else configs:
                if config.pre_hook is not None:
                    config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
                if len(results) < len(configs):
                    current = host.name(self), _shown(config.all_kwargs())
                    results.append(self.fn.run(*args, **kwargs, **config.all_kwargs()))
            current = "", ""
            self.best_config = configs[0]
            return results[0]

        # it would cut the compiler's frames out of errors, which know the user's line
        compiler = importlib.import_module("triton.compiler.compiler")
        stack.enter_context(redirect.replaced(compiler, "filter_traceback", lambda error: None))
        stack.enter_context(redirect.replaced(jit, "run", run_noted))
        stack.enter_context(redirect.replaced(tuning, "run", run_all))
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(redirect.replaced(owner, name, _zeroed(getattr(owner, name))))
        try:
            call()
        except Exception as error:
            survey.error = error
        # a kernel that `warmup` returned is launched without its function
        noted = {id(attempt.launch) for attempt in survey.attempts}
        for launch in recorder.launches:
            if id(launch) not in noted:
                note(launch.compiled.src.fn, launch=launch)
        return survey


def _zeroed(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def zeroed(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return factory(*args, **kwargs).zero_()

    return zeroed


def _shown(settings: dict[str, Any]) -> str:
    """A configuration on one line, without what is as by default."""
    plain = {"num_ctas": 1}
    return ", ".join(
        f"{name}={value}" for name, value in settings.items() if plain.get(name) != value
    )


def _problems(survey: _Survey, contract: str) -> Iterator[Finding]:
    """What one target refuses; `message` lacks the target."""
    kernels: dict[tuple[Any, str], dict[str, list[_Attempt]]] = {}
    for attempt in survey.attempts:
        by_config = kernels.setdefault(attempt.group, {})
        by_config.setdefault(attempt.config, []).append(attempt)
    for by_config in kernels.values():
        yield from _refusals(survey.target, list(by_config.values()))
        if contract == "ieee":
            yield from _tf32(attempt for attempts in by_config.values() for attempt in attempts)
    # what follows a failed launch need not be a fault of the host code
    if survey.error is not None and not any(attempt.error for attempt in survey.attempts):
        file, line = redirect.place(survey.error)
        yield Finding(
            "error",
            f"the host code raised {type(survey.error).__name__}: {survey.error}, after "
            f"{len(survey.attempts)} launches; what it launches later is not compiled (kernels do "
            "not run here: results are zero)",
            file=file,
            line=line,
            source=linecache.getline(file, line).strip(),
        )


def _refusals(target: dry.Target, configs: list[list[_Attempt]]) -> Iterator[Finding]:
    """What does not launch, of one kernel in each of its configurations, or always spills."""
    failed: list[tuple[Finding, bool]] = []
    spilled: list[Finding] = []
    for attempts in configs:
        found = [one for attempt in attempts for one in _refusal(target, attempt)]
        # the same configuration is compiled for several dtypes and sizes
        failed += found[:1]
        spilled += [] if found else _spills(attempts)[:1]
    if len(failed) == len(configs) > 1:
        first, _ = failed[0]
        message = f"none of the {len(configs)} configurations launches; {first.message}"
        yield replace(first, message=message)
        return
    for problem, caught in failed:
        then = _DISCARDED if caught else "; autotune does not catch that and raises"
        yield replace(problem, message=problem.message + then) if len(configs) > 1 else problem
    if len(spilled) == len(configs):
        yield spilled[0]


def _refusal(target: dry.Target, attempt: _Attempt) -> list[tuple[Finding, bool]]:
    """Why the kernel would not launch, and whether autotune goes on then; empty if it would."""
    if attempt.error is not None:
        return [_failure(attempt)]
    assert attempt.launch is not None
    used = dry.resources(attempt.launch)
    for number, limit, what in (
        (used.shared, target.shared_memory, "bytes of shared memory"),
        (used.registers, target.registers, "registers per thread"),
    ):
        if number > limit:
            config = attempt.config or _settings(attempt.launch)
            message = f"{config} needs {number} {what}, {target.product} has {limit}"
            return [(_of_kernel("resources", message, attempt.function), True)]
    return []


def _spills(attempts: list[_Attempt]) -> list[Finding]:
    found = []
    for attempt in attempts:
        assert attempt.launch is not None
        used = dry.resources(attempt.launch)
        if used.spilled_bytes:
            config = attempt.config or _settings(attempt.launch)
            message = (
                f"{config} spills {used.spilled_bytes} bytes per thread to local memory "
                f"({used.registers} registers)"
            )
            found.append(_of_kernel("resources", message, attempt.function))
    return found


def _settings(launch: dry.Launch) -> str:
    return _shown(
        launch.constexprs | {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    )


def _of_kernel(kind: str, message: str, function: Any) -> Finding:
    """A finding about a kernel as a whole, at its first line."""
    file, line = function.fn.__code__.co_filename, _first_line(function)
    source = linecache.getline(file, line).strip()
    return Finding(kind, message, function.__name__, file=file, line=line, source=source)


def _first_line(function: Any) -> int:
    """The line of its `def`, from which Triton counts: decorators may stand above it."""
    lines, first = inspect.getsourcelines(function.fn)
    return first + next(n for n, line in enumerate(lines) if line.lstrip().startswith("def "))


def _failure(attempt: _Attempt) -> tuple[Finding, bool]:
    """The error of Triton's compiler, at the user's line if it has one; if autotune catches it."""
    errors = importlib.import_module("triton.compiler.errors")
    runtime = importlib.import_module("triton.runtime.errors")
    error: BaseException | None = attempt.error
    if isinstance(error, dry.CompileError):
        error = error.__cause__
    assert error is not None
    text, finding = str(error), _of_kernel("compilation", "", attempt.function)
    caught = (runtime.OutOfResources, errors.CompileTimeAssertionFailure, runtime.PTXASError)
    if isinstance(error, errors.CompilationError):
        text, function, line = _innermost(error)
        if function is not None:
            file, line = function.fn.__code__.co_filename, _first_line(function) + line - 1
            source = linecache.getline(file, line).strip()
            finding = replace(finding, file=file, line=line, source=source)
    elif isinstance(error, runtime.OutOfResources):
        finding = replace(finding, kind="resources")
    else:
        text, place = diagnostics.told(text, attempt.said)
        if place is not None:
            source = linecache.getline(*place).strip()
            finding = replace(finding, file=place[0], line=place[1], source=source)
    if _TILE.search(text):
        finding = replace(finding, kind="tile")
    if attempt.config:
        text = f"{attempt.config} fails: {text}"
    return replace(finding, message=text), isinstance(error, caught)


# of tiles in the compiler's own words
_TILE = re.compile(
    r"power of 2|maximum tensor numel|[Ii]nput shapes should have|should have M >= |"
    r"shape should have|must be a power of two"
)


def _innermost(error: Any) -> tuple[str, Any, int]:
    """What the deepest error says, and the user's function and its line below which it arose."""
    place: tuple[Any, int] = None, 0
    while True:
        function = _compiled_function(error)
        # the language's own functions are no place for a user to look at
        if function is not None and not function.fn.__module__.startswith("triton."):
            place = function, error.node.lineno
        if not hasattr(error.__cause__, "node"):
            without = f"the statement fails ({type(error).__name__})"
            return error.error_message or str(error.__cause__ or without), *place
        error = error.__cause__


def _compiled_function(error: Any) -> Any:
    """The function of the language whose compilation raised `error`, from the compiler's frames."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        function = getattr(frame.f_locals.get("self"), "jit_fn", None)
        if function is not None and function.src == error.src:
            return function
    return None


# a matrix instruction that reads float32 operands as TF32
_TF32_INSTRUCTION = re.compile(
    r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*tf32|\bv_mfma\w*xf32"
)
# a product as the kernel's own intermediate language has it, and a place in the source
_DOT = re.compile(
    r"= tt\.dot [^\n]*inputPrecision = tf32 : tensor<[0-9x]+xf32>[^\n]* loc\((#\w+)\)"
)
_LOCATION = re.compile(r"^(#\w+) = loc\((.*)\)$", re.MULTILINE)


def _tf32(attempts: Iterable[_Attempt]) -> Iterator[Finding]:
    """Each `tl.dot` of float32 operands that a matrix unit computes in TF32, once."""
    found: set[tuple[str, int]] = set()
    for attempt in attempts:
        if attempt.launch is None:
            continue
        assembly = attempt.launch.compiled.asm
        if not _TF32_INSTRUCTION.search(assembly.get("ptx") or assembly["amdgcn"]):
            continue
        locations = dict(_LOCATION.findall(assembly["ttir"]))
        for location in _DOT.findall(assembly["ttir"]):
            file, line = _resolve(location, locations)
            file = _present(file, attempt.function)
            if (file, line) in found:
                continue
            found.add((file, line))
            yield Finding(
                "tf32",
                "tl.dot multiplies float32 as TF32, without the low 13 bits of each operand; "
                'input_precision="ieee" keeps them',
                attempt.function.__name__,
                file=file,
                line=line,
                source=linecache.getline(file, line).strip(),
            )


def _present(file: str, function: Any) -> str:
    """The file that a kernel is in, where Triton's cache names one of the same text elsewhere."""
    own = str(function.fn.__code__.co_filename)
    return own if os.path.basename(own) == os.path.basename(file) else file


def _resolve(location: str, locations: dict[str, str]) -> tuple[str, int]:
    """File and line of a location: of what is called, if it is in a function that was inlined."""
    text = locations.get(location, "")
    place = re.search(r'"([^"]+)":(\d+):\d+', text)
    if place is not None:
        return place[1], int(place[2])
    below = re.search(r"#\w+", text)
    return ("", 0) if below is None else _resolve(below[0], locations)
