"""Compiles every kernel that a piece of host code launches, for a GPU that is not there.

Inside `compiling_for("sm_90")` the call `kernel[grid](*cpu_tensors)` compiles for that target,
launches nothing and leaves a record.  `resources` reads registers, spills and instructions off a
record; `problems` says in sentences what would stop or slow it on the real device.  A process that
interprets kernels cannot compile them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from tritorch.testing.resources import Resources, of_compiled


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    `backend`, `arch` and `warp_size` are the fields of Triton's GPUTarget.  `shared_memory`: the
    most one block may use, in bytes.  `registers`: the most one thread may use, 32-bit registers.
    `multiprocessors`: those of `product`.  Sources: the table "Technical Specifications per Compute
    Capability" of the CUDA programming guide, the CDNA 3 instruction set reference.
    """

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_memory: int
    multiprocessors: int
    registers: int
    product: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108, 255, "A100"),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132, 255, "H100 SXM"),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148, 255, "B200"),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304, 512, "MI300X"),
    )
}


class CompileError(RuntimeError):
    """A kernel did not compile: names kernel, target and configuration; its cause is Triton's."""


@dataclass(frozen=True)
class Launch:
    """One launch that did not happen: what would have run, and on which grid.

    `constexprs`: the kernel's `tl.constexpr` parameters by name.  `pointers`: the element type of
    each tensor and descriptor in Triton's spelling (`fp16`, `tensordesc<fp16[64, 64]>`), by name; a
    pointer that is None is absent.  `compiled`: Triton's CompiledKernel, with its `asm`.
    `numbers`: the other arguments that are numbers, by name.  `sizes`: bytes of memory of each
    tensor and of what each descriptor describes.
    """

    kernel: str
    grid: tuple[int, int, int]
    compiled: Any = field(repr=False)
    constexprs: dict[str, Any]
    pointers: dict[str, str]
    num_warps: int
    num_stages: int
    numbers: dict[str, int | float] = field(default_factory=dict, repr=False)
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def config(self) -> str:
        """Constexprs, warps, stages and pointer types on one line."""
        return _describe(self.constexprs, self.num_warps, self.num_stages, self.pointers)


@dataclass
class Recorder:
    """What `compiling_for` saw: `launches`, in order."""

    target: Target
    launches: list[Launch] = field(default_factory=list)

    @property
    def kernels(self) -> list[Launch]:
        """The first launch of each distinct compiled kernel."""
        first: dict[str, Launch] = {}
        for launch in self.launches:
            first.setdefault(launch.compiled.hash, launch)
        return list(first.values())


# kept outside Triton, so that every launch can ask `active` without importing it
_recorder: Recorder | None = None

_compiled: dict[str, Any] = {}


def active() -> Target | None:
    """The target that launches compile for, or None outside `compiling_for`."""
    return None if _recorder is None else _recorder.target


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[Recorder]:
    """Inside the block a launch on CPU tensors compiles for `target`, runs nothing, is recorded.

    A kernel that asks for more shared memory than the target has is recorded as well: `problems`
    reports it.  Blocks nest.  Triton's autotuner compiles every configuration, but remembers its
    choice across targets, and then compiles that one alone.  Raises ValueError for an unknown
    target, RuntimeError where Triton interprets and, from the launch, `CompileError`.
    """
    if target not in TARGETS:
        known = ", ".join(TARGETS)
        raise ValueError(f"dry.compiling_for: expects one of {known}, received {target!r}")
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "dry.compiling_for: this process interprets kernels and cannot compile them; "
            "start Python without TRITON_INTERPRET"
        )
    global _recorder
    drivers = triton.runtime.driver
    # the public property would build a default driver, which fails without a GPU
    previous = _recorder, drivers._active, JITFunction._do_compile
    _recorder = Recorder(TARGETS[target])
    drivers.set_active(_Driver(_recorder.target))
    JITFunction._do_compile = _remembered(JITFunction._do_compile)
    try:
        with warnings.catch_warnings():
            # 3.9 says of every process that a default of the next version is another, which where
            # warnings are errors would count as a kernel that does not compile
            warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION is unset", UserWarning)
            yield _recorder
    finally:
        _recorder, drivers._active, JITFunction._do_compile = previous


class _Driver:
    """What Triton asks of a driver, answered for a device that is not there."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        # Triton keys its in-process caches by device, so each target is a device of its own
        return int(re.sub(r"\D", "", self.target.name))

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def once(call: Callable[[], object], **options: object) -> list[float]:
            call()
            return [1.0, 1.0, 1.0]

        return once

    def get_device_properties(self, device: int) -> dict[str, int]:
        # Triton refuses to load a kernel above `max_shared_mem`, which here is to be recorded
        return {
            "max_shared_mem": 1 << 30,
            "multiprocessor_count": self.target.multiprocessors,
            "warpSize": self.target.warp_size,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        # module, function, registers, spills (Triton only passes these two on), threads in a block
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class _Launcher:
    """Records with the recorder active at the launch: Triton keeps launchers longer than that."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: object) -> None:
        name, target = self.source.fn.__name__, self.metadata.target
        if _recorder is None or _recorder.target.arch != target.arch:
            here = "without a dry driver" if _recorder is None else f"for {_recorder.target.name}"
            raise RuntimeError(f"dry: {name} was compiled for {target.arch} and launched {here}")
        # stream, function, metadata twice and two hooks come before the arguments
        numbers, sizes = _values(dict(zip(self.source.fn.arg_names, rest[6:], strict=False)))
        _recorder.launches.append(
            Launch(
                kernel=name,
                grid=(grid_x, grid_y, grid_z),
                compiled=_compiled[self.metadata.hash],
                constexprs=_constexprs(self.source.fn, self.source.constants),
                pointers=_pointers(self.source.signature),
                num_warps=self.metadata.num_warps,
                num_stages=self.metadata.num_stages,
                numbers=numbers,
                sizes=sizes,
            )
        )


def _values(arguments: dict[str, Any]) -> tuple[dict[str, int | float], dict[str, int]]:
    """The numbers among the arguments, and the bytes of its tensors; tuples count one by one."""
    numbers: dict[str, int | float] = {}
    sizes: dict[str, int] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple | list):
            within = _values({f"{name}[{i}]": element for i, element in enumerate(value)})
            numbers |= within[0]
            sizes |= within[1]
        elif isinstance(value, torch.Tensor):
            # what is expanded lies in memory once
            lengths = [n for n, step in zip(value.shape, value.stride(), strict=True) if step]
            sizes[name] = math.prod(lengths) * value.element_size()
        elif hasattr(value, "block_shape"):
            sizes[name] = math.prod(value.shape) * value.base.element_size()
        elif isinstance(value, int | float):
            numbers[name] = value
    return numbers, sizes


def _remembered(compile: Callable[..., Any]) -> Callable[..., Any]:
    """`JITFunction._do_compile` that keeps what it compiled and says what it could not compile."""
    signature = inspect.signature(compile)

    @functools.wraps(compile)
    def remembered(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            compiled = compile(kernel, *args, **kwargs)
        except Exception as error:
            given = signature.bind(kernel, *args, **kwargs).arguments
            options = given["options"]
            config = _describe(
                _constexprs(kernel, given["constexprs"]),
                options.num_warps,
                options.num_stages,
                _pointers(given["signature"]),
            )
            target = active()
            name = "another target" if target is None else target.name
            raise CompileError(
                f"{kernel.__name__} does not compile for {name} with {config}: {error}"
            ) from error
        _compiled[compiled.hash] = compiled
        return compiled

    return remembered


def _constexprs(kernel: Any, constants: dict[tuple[int, ...], Any]) -> dict[str, Any]:
    # Triton also makes constants of None and of the integer one, which configure nothing
    return {
        kernel.arg_names[path[0]]: getattr(value, "value", value)
        for path, value in constants.items()
        if kernel.params[path[0]].is_constexpr
    }


def _pointers(signature: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            found |= _pointers({f"{name}[{i}]": element for i, element in enumerate(kind)})
        elif kind.startswith(("*", "tensordesc")):
            found[name] = kind.removeprefix("*")
    return found


def _describe(
    constexprs: dict[str, Any], num_warps: int, num_stages: int, pointers: dict[str, str]
) -> str:
    settings = constexprs | {"num_warps": num_warps, "num_stages": num_stages}
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    return f"{shown} on ({', '.join(f'{name} {kind}' for name, kind in pointers.items())})"


_MATRIX_PRODUCT = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_(s?mfma|wmma|smfmac))")
# a 16-bit product in Triton's own intermediate language, before any target has had its say
_SIXTEEN_BIT_DOT = re.compile(r"\btt\.dot\b[^\n]*: tensor<[0-9x]+x(?:bf16|f16)")


def resources(kernel: Any) -> Resources:
    """The resources of a `Launch`, or of Triton's own CompiledKernel."""
    return of_compiled(kernel.compiled if isinstance(kernel, Launch) else kernel)


def problems(launch: Launch, target: str | Target) -> list[str]:
    """What would stop or cripple this kernel on `target`, one sentence each; empty if nothing."""
    limits = TARGETS[target] if isinstance(target, str) else target
    used = resources(launch)
    found = []
    if used.shared > limits.shared_memory:
        found.append(f"needs {used.shared} bytes of shared memory of {limits.shared_memory}")
    if used.registers > limits.registers:
        found.append(f"needs {used.registers} registers per thread of {limits.registers}")
    if used.spilled_bytes or used.spilled:
        kind = "local-memory instructions" if limits.backend == "cuda" else "spilled registers"
        found.append(
            f"spills: {used.spilled_bytes} bytes of stack per thread, {used.spills} {kind}"
        )
    assembly = launch.compiled.asm
    dots = len(_SIXTEEN_BIT_DOT.findall(assembly["ttir"]))
    # PTX says it as well as machine code, which takes ten times as long to disassemble as this to
    # read
    if dots and not _MATRIX_PRODUCT.search(assembly.get("ptx") or assembly["amdgcn"]):
        found.append(f"has {dots} 16-bit dot products and no tensor-core instruction")
    return [f"{launch.kernel} on {limits.name} {text} ({launch.config})" for text in found]
