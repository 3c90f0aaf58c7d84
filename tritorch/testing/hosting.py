"""Runs a user's unmodified host code and kernels on a machine without a GPU.

`load` finds a callable by its name; `hosted` redirects CUDA to the CPU (`redirect.py`) and replaces
what needs a real device to decide: each `@triton.autotune` runs one chosen configuration.  Works
where kernels are interpreted and inside `dry.compiling_for`.  With a CUDA device nothing is
redirected, and configurations are still chosen here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

from tritorch.testing import dry, interpreter, libdevice, loading, redirect
from tritorch.testing.errors import RequestError

# an index into the configurations, a triton.Config, or a test that the first fitting one passes
Choice: TypeAlias = Any


class Unsupported(RuntimeError):
    """A kernel uses what Triton's interpreter does not have: says what, in which kernel and line.

    `kernel`, `file` and `line` are those of the statement.
    """

    def __init__(self, kernel: str, file: str, line: int, reason: str) -> None:
        super().__init__(f"{kernel} cannot be interpreted: {reason} ({file}:{line})")
        self.kernel, self.file, self.line, self.reason = kernel, file, line, reason


@dataclass(eq=False)
class Host:
    """What `hosted` saw.

    `configurations`: of each autotuned kernel that was launched, by its name, the configurations
    that pruning left for one of the launches, in their order; a second kernel of the same name goes
    by its module's too.  `programs`: the most that a launch had, where kernels are interpreted.
    """

    choice: Mapping[str, Choice] | Choice = None
    tune: bool = False
    configurations: dict[str, list[Any]] = field(default_factory=dict)
    programs: int = 0
    _names: dict[Any, str] = field(default_factory=dict, repr=False)
    # what each tuning key was tuned to
    _tuned: dict[Any, Any] = field(default_factory=dict, repr=False)

    def name(self, autotuner: Any) -> str:
        """The name of its kernel in `configurations`."""
        if autotuner not in self._names:
            function = autotuner.base_fn
            taken = function.__name__ in self._names.values()
            name = f"{function.__module__}.{function.__name__}" if taken else function.__name__
            self._names[autotuner] = name
        return self._names[autotuner]

    def choose(self, autotuner: Any, configs: list[Any]) -> Any:
        """The configuration for this launch among those that pruning has left."""
        name = self.name(autotuner)
        known = self.configurations.setdefault(name, [])
        known += [config for config in configs if config not in known]
        choice = self.choice
        if isinstance(choice, Mapping):
            choice = choice.get(name, choice.get(autotuner.base_fn.__name__))
        if choice is None:
            return configs[0]
        if callable(choice):
            fitting = [config for config in configs if choice(config)]
            if not fitting:
                shown = "; ".join(map(str, configs))
                raise ValueError(f"hosted: no configuration of {name} is chosen, of {shown}")
            return fitting[0]
        if not isinstance(choice, int):
            return choice
        wanted = known[min(choice, len(known) - 1)]
        return wanted if wanted in configs else configs[0]


_hosts: list[Host] = []


@contextlib.contextmanager
def hosted(config: Mapping[str, Choice] | Choice = None, *, tune: bool = False) -> Iterator[Host]:
    """Lets code written for a GPU run inside the block: `with hosted() as host: fn(x)`.

    Autotuned kernels run one configuration and are never timed.  `config` says which: None is the
    first; a number is an index into `Host.configurations`, where a kernel with fewer runs its last
    and a launch that prunes it away runs its first; a `triton.Config` runs as it is; a function of
    a configuration chooses the first for which it is true; a dict gives any of these by the name of
    the kernel.  `tune` runs every configuration once before the chosen one, at the first launch for
    a tuning key, as tuning on a GPU does: a kernel that adds to its output then needs
    `reset_to_zero` or `restore_value`.  Hooks run when Triton runs them: `reset_to_zero` takes
    effect at the first launch for a key, and never again.

    `do_bench` calls once, a benchmark's `run` does nothing, `torch.compile` leaves code as it is,
    and interpreted kernels run inside `interpreter.corrected`.  Blocks nest; inside
    `dry.compiling_for`, code is told of the GPU that is compiled for.

    Raises, from a launch: Unsupported, for what the interpreter lacks.
    """
    host = Host(config, tune)
    with contextlib.ExitStack() as stack:
        stack.enter_context(redirect.redirected())
        if importlib.util.find_spec("triton") is not None:
            if interpreter.interpreting():
                stack.enter_context(interpreter.corrected())
            if not _hosts:
                if interpreter.interpreting():
                    stack.enter_context(libdevice.interpreted())
                for owner, name, replacement in _replacements():
                    stack.enter_context(redirect.replaced(owner, name, replacement))
        _hosts.append(host)
        stack.callback(_hosts.pop)
        yield host


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    tuning = importlib.import_module("triton.runtime.autotuner")
    yield tuning.Autotuner, "run", _run_tuned
    testing = importlib.import_module("triton.testing")
    for name in ("do_bench", "do_bench_cudagraph"):
        yield testing, name, _once(getattr(testing, name))
    # a benchmark's sizes are meant for a GPU
    yield testing.Mark, "run", lambda self, *args, **options: None
    if interpreter.interpreting():
        interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
        yield interpreted, "run", _interpreting(interpreted.run)


def _run_tuned(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`Autotuner.run` with the choice of the innermost host."""
    host = _hosts[-1]
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    given = self.nargs | kwargs
    key = _key(self, given)
    config = host._tuned.get(key)
    if config is None:
        tunes = len(self.configs) > 1
        configs = self.prune_configs(kwargs) if tunes else self.configs
        config = host._tuned[key] = host.choose(self, configs)
        conflicts = config.kwargs.keys() & kwargs.keys()
        if conflicts:
            raise ValueError(
                f"Conflicting meta-parameters: {', '.join(conflicts)}. "
                "Make sure that you don't re-define auto-tuned symbols."
            )
        for one in configs if tunes and host.tune else ():
            self._bench(*args, config=one, **kwargs)
        if tunes:
            self.pre_hook(given | config.all_kwargs(), reset_only=True)
    settings = config.all_kwargs()
    self.best_config = config
    if config.pre_hook is not None:
        config.pre_hook(given | settings)
    result = self.fn.run(*args, **kwargs, **settings)
    self.nargs = None
    return result


def _key(autotuner: Any, given: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton tunes once for: the values of the key and the dtypes of the arguments."""
    arguments = {name: given[name] for name in autotuner.arg_names if name in given}
    values = [arguments[name] for name in autotuner.keys if name in arguments]
    dtypes = [str(value.dtype) for value in arguments.values() if hasattr(value, "dtype")]
    return autotuner, *values, *dtypes


def _once(original: Callable[..., Any]) -> Callable[..., Any]:
    """A benchmark that calls once and measures 1 millisecond."""

    def once(
        fn: Callable[[], object],
        *args: Any,
        quantiles: Any = None,
        return_mode: str = "mean",
        **options: Any,
    ) -> Any:
        if not _hosts:
            return original(fn, *args, quantiles=quantiles, return_mode=return_mode, **options)
        fn()
        times = [1.0] * len(quantiles or [1.0])
        return times if len(times) > 1 or (return_mode == "all" and not quantiles) else times[0]

    return once


def _interpreting(run: Callable[..., Any]) -> Callable[..., Any]:
    """`InterpretedFunction.run` as the compiled launch behaves, which says what it cannot do."""

    def launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return _Warmed(self, kwargs)
        grid = _grid(self, grid, args, kwargs)
        for host in _hosts:
            host.programs = max(host.programs, math.prod(grid))
        try:
            return run(self, *args, grid=grid, warmup=False, **kwargs)
        except Exception as error:
            unsupported = _unsupported(self.__name__, error)
            if unsupported is None:
                raise
            raise unsupported from error

    return launch


def _grid(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The grid as numbers; a function of the arguments gets those of the call, as on a GPU."""
    if callable(grid):
        signature = inspect.signature(kernel.fn)
        options = {name: value for name, value in kwargs.items() if name in signature.parameters}
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        grid = grid(bound.arguments)
    return tuple(int(size) for size in grid)


class _Warmed:
    """What `kernel.warmup` returns where nothing is compiled: plausible, and never zero."""

    n_regs, n_spills, n_max_threads = 32, 0, 1024

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self._kernel = kernel
        self.name = kernel.__name__
        self.metadata = SimpleNamespace(
            shared=1024,
            num_warps=options.get("num_warps", 4),
            num_stages=options.get("num_stages", 3),
            num_ctas=options.get("num_ctas", 1),
            name=self.name,
        )

    def _init_handles(self) -> None:
        pass

    def __getitem__(self, grid: Any) -> Any:
        return self._kernel[grid]


def _unsupported(kernel: str, error: BaseException) -> Unsupported | None:
    """What the interpreter lacks, if that is why the launch failed."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    if isinstance(cause, NotImplementedError):
        lacks_assembly = "inline_asm" in text
        reason = "it contains inline assembly" if lacks_assembly else text or "it is not written"
    elif isinstance(cause, AttributeError) and "'InterpreterBuilder' object has no" in text:
        reason = f"the interpreter has no {text.rpartition('attribute ')[2]}"
    elif "_semantic` argument must be provided" in text:
        reason = "the interpreter does not know this function of the language"
    else:
        return None
    file, line = redirect.place(cause)
    return Unsupported(kernel, file, line, reason)


def load(target: str) -> Any:
    """The object that `named` finds."""
    return named(target).value


def function(target: str, command: str) -> loading.Named:
    """The same for a target that must be callable; `command` begins the RequestError's message."""
    found = named(target)
    if _is_kernel(found.value):
        raise RequestError(
            f"{command}: {target} is a kernel: name the Python function that takes tensors and "
            "launches it"
        )
    if not callable(found.value):
        raise RequestError(f"{command}: {target} is no function, but {type(found.value).__name__}")
    return found


def _is_kernel(value: Any) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    kernels = importlib.import_module("triton.runtime.jit").KernelInterface
    return isinstance(value, kernels)


def named(target: str) -> loading.Named:
    """What "package.module:attribute" or "path/to/file.py:attribute" names.

    An attribute may have dots.  A module is looked for from the current directory too; a file's
    folder goes to the front of `sys.path`, as when Python runs the file, or if it is in a package,
    that package's folder.  What runs at import is `hosted`; `if __name__ == "__main__"` does not.
    Where kernels only compile, a file's own tests of their results end its import, not the search.

    Raises ValueError: says which part of the target is wrong, what there is, and why an import
    fails.
    """
    compiles = importlib.util.find_spec("triton") is not None and not interpreter.interpreting()
    with contextlib.ExitStack() as stack:
        # a script may launch kernels while it is imported
        if compiles and dry.active() is None and not redirect.has_cuda():
            stack.enter_context(dry.compiling_for("sm_90"))
        stack.enter_context(hosted())
        return loading.find(target, assertions=dry.active() is None)
