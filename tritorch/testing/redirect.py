"""Host code written for a CUDA device, run where there is none: it asks for CUDA and gets the CPU.

Inside `redirected()` a device named "cuda" is the CPU wherever torch is given one, and code that
asks what it runs on is told of the GPU of `dry.TARGETS` that kernels are compiled for, an H100 by
default.  The answers go to the user's code alone: torch's and Triton's own code, told apart by the
module of the frame that asks, sees the machine as it is, because it would act on the answer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tritorch.testing import absent_gpu, dry, resources

_CPU = torch.device("cpu")

# packages whose code sees the machine as it is
_MACHINERY = {"torch", "functorch", "triton", "tritorch"}
_TOOLS = {"numpy"} | (sys.stdlib_module_names - {"__main__"})
_depth: int = 0


@contextlib.contextmanager
def redirected() -> Iterator[None]:
    """Code that asks for CUDA gets the CPU inside the block; does nothing where there is CUDA.

    A factory's or a conversion's device, `Tensor.cuda`, `Module.cuda`, `torch.cuda`'s functions,
    autocast and Triton's active driver are redirected.  `x.is_cuda` is True and `x.device` cuda:0
    for every tensor in CPU memory, `x.cpu()` copies as it would from a GPU, a stream has always
    finished, and an event measures 1 millisecond.  Blocks nest.  Raises RuntimeError where torch
    or Triton lacks a part that is replaced.
    """
    global _depth
    if _depth or has_cuda():
        yield
        return
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in [*_host_code(), *_tensors(), *_autocast(), *_driver()]:
            stack.enter_context(replaced(owner, name, replacement))
        stack.enter_context(_operators())
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1


def replaced(owner: Any, name: str, replacement: Any) -> contextlib.AbstractContextManager[Any]:
    """Inside the block the attribute `name` of `owner` is another; RuntimeError if it has none."""
    if not hasattr(owner, name):
        raise RuntimeError(f"hosted: {getattr(owner, '__name__', owner)} has no {name} to replace")
    return mock.patch.object(owner, name, replacement)


def has_cuda() -> bool:
    """Whether there is a device after all."""
    return not _depth and torch.cuda.is_available()


def asked_by_user() -> bool:
    """Whether the code that called into this module is neither torch's nor Triton's."""
    frame = sys._getframe(1)
    # a function mode of torch's stands between a question and its answer
    while frame.f_back is not None and (
        frame.f_globals.get("__name__") == __name__ or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] not in _MACHINERY


def place(error: BaseException) -> tuple[str, int]:
    """File and line of the user's innermost statement in a traceback; ("", 0) if none is."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if is_users(str(frame.f_globals.get("__name__"))):
            return frame.f_code.co_filename, line
    return "", 0


def is_users(module: str) -> bool:
    """Whether a module is the user's: neither a tool, nor torch, Triton or tritorch."""
    # the kernels of the library are a user's like any others
    ours = module.startswith("tritorch.kernels.")
    return ours or not (is_tool(module) or module.partition(".")[0] in _MACHINERY)


def is_tool(module: str) -> bool:
    """Whether a module is numpy's or of the standard library."""
    return module.partition(".")[0] in _TOOLS


def for_users(original: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """`answer` for user code inside `redirected`, `original` for others and afterwards."""

    @functools.wraps(original, updated=())
    def asked(*args: Any, **kwargs: Any) -> Any:
        return (answer if _depth and asked_by_user() else original)(*args, **kwargs)

    return asked


def _device(value: Any) -> Any:
    """The CPU for a CUDA device under any of its names, anything else unchanged."""
    if isinstance(value, str):
        return "cpu" if value.partition(":")[0] == "cuda" else value
    if isinstance(value, torch.device):
        return _CPU if value.type == "cuda" else value
    # a bare number is the index of a GPU
    return _CPU if type(value) is int else value


def _redirecting(function: Callable[..., Any], position: int | None = None) -> Callable[..., Any]:
    """`function` with its device redirected: a keyword, and the argument number `position`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _depth:
            # a user's module may keep what it found here when it was imported
            return function(*args, **kwargs)
        for name in _KEYWORDS & kwargs.keys():
            kwargs[name] = _device(kwargs[name])
        # page-locked memory needs CUDA
        kwargs.pop("pin_memory", None)
        if position is not None:
            here = slice(position, position + 1)
            args = (*args[:position], *map(_device, args[here]), *args[position + 1 :])
        return function(*args, **kwargs)

    return call


_KEYWORDS = {"device", "device_type", "map_location"}


def _tensors() -> Iterator[tuple[Any, str, Any]]:
    """Factories, conversions and properties of tensors.

    Not a TorchFunctionMode: torch takes a mode off its stack while it handles a call, so the user's
    code that an operator or `backward` calls would run without it.
    """
    context = importlib.import_module("torch.utils._device")
    # torch remembers what this returns, which must not be what is replaced below
    constructors = context._device_constructors()
    names = {function.__name__ for function in constructors} | {"load"}
    names |= {name for name in dir(torch) if name.endswith("_like")}
    for name in sorted(names):
        if callable(getattr(torch, name, None)):
            yield torch, name, _redirecting(getattr(torch, name))
    for name in ("empty", "empty_strided", "full", "ones", "tensor", "zeros"):
        yield Tensor, f"new_{name}", _redirecting(getattr(Tensor, f"new_{name}"))
    for name, get, answer in (
        ("device", Tensor.device, absent_gpu.DEVICE),
        ("is_cpu", Tensor.is_cpu, False),
        ("is_cuda", Tensor.is_cuda, True),
    ):
        yield Tensor, name, property(for_users(_getter(get), _answer(get, answer)))
    index = Tensor.get_device
    yield Tensor, "get_device", for_users(index, lambda x: 0 if index(x) < 0 else index(x))
    yield Tensor, "cuda", lambda self, *args, **options: self
    yield Tensor, "pin_memory", lambda self, *args: self
    yield Tensor, "record_stream", lambda self, stream: None
    yield Tensor, "to", _copying(_redirecting(Tensor.to, 1), _names_cpu)
    yield Tensor, "cpu", _copying(Tensor.cpu, lambda args, options: True)

    def default(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in constructors and kwargs.get("device") is None:
            kwargs["device"] = _device(self.device)
        return func(*args, **kwargs)

    yield context.DeviceContext, "__torch_function__", default


def _getter(get: Any) -> Callable[[Tensor], Any]:
    return lambda x: get.__get__(x)


def _answer(get: Any, answer: Any) -> Callable[[Tensor], Any]:
    # a meta tensor keeps its device, so that what is made beside it has no memory either
    device = Tensor.device.__get__
    meta_too = answer is True
    return lambda x: answer if meta_too or device(x).type == "cpu" else get.__get__(x)


def _copying(
    convert: Callable[..., Tensor], to_host: Callable[[Any, Any], bool]
) -> Callable[..., Tensor]:
    """`convert`, whose copy in the host's memory does not change with the original."""

    @functools.wraps(convert)
    def call(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = convert(self, *args, **kwargs)
        copies = result is self and asked_by_user() and to_host(args, kwargs)
        return result.clone() if copies else result

    return call


def _names_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    named = [*args[:1], kwargs.get("device")]
    return any(isinstance(one, str | torch.device) and str(one) == "cpu" for one in named)


def _host_code() -> Iterator[tuple[Any, str, Any]]:
    for path, answers in absent_gpu.ANSWERS.items():
        owner = functools.reduce(getattr, path.split("."), torch)
        for name, answer in answers.items():
            # the oldest and the newest torch lack some
            if hasattr(owner, name):
                # a class stays one: annotations and isinstance name it
                given = isinstance(answer, type)
                yield owner, name, answer if given else for_users(getattr(owner, name), answer)
    yield torch, "get_device_module", for_users(torch.get_device_module, _device_module)
    yield torch, "compile", for_users(torch.compile, _uncompiled)
    yield torch, "Generator", _generator(torch.Generator)
    yield torch.version, "cuda", "12.8"


def _driver() -> Iterator[tuple[Any, str, Any]]:
    if importlib.util.find_spec("triton") is not None:
        drivers = importlib.import_module("triton.runtime.driver").driver
        yield drivers, "_active", _Driver(drivers._active or dry._Driver(absent_gpu.target()))


class _Driver:
    """The driver of a GPU that is not there, which tells user code what the GPU would."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.utils = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def get_active_torch_device(self) -> torch.device:
        return absent_gpu.DEVICE if asked_by_user() else _CPU

    def get_current_device(self) -> int:
        return 0 if asked_by_user() else self._inner.get_current_device()

    def get_device_interface(self) -> Any:
        return torch.cuda

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        module, function, *rest = self._inner.load_binary(name, binary, shared, device)
        # host code divides by the registers of a kernel to find how many blocks fit
        cuda = absent_gpu.target().backend == "cuda"
        return module, function, resources.usage(binary)[0] if cuda else 128, *rest[1:]

    def get_device_properties(self, device: int) -> dict[str, int]:
        known: dict[str, int] = self._inner.get_device_properties(device)
        if not asked_by_user():
            return known
        limits = {
            "max_shared_mem": absent_gpu.target().shared_memory,
            "max_num_regs": absent_gpu.REGISTERS,
        }
        return known | limits | absent_gpu.CLOCKS


def _device_module(device: torch.device | str | None = None) -> Any:
    kind = "cuda" if device is None else torch.device(device).type
    return getattr(torch, kind)


def _uncompiled(model: Any = None, **options: Any) -> Any:
    # the interpreter is nothing that a compiler of Python can trace
    return model if model is not None else lambda function: function


def _generator(original: Any) -> Any:
    class Kind(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)

    class Generator(metaclass=Kind):
        def __new__(cls, device: Any = "cpu") -> Any:
            return original(_device(device))

    return Generator


@contextlib.contextmanager
def _operators() -> Iterator[None]:
    """Lets custom operators that have a kernel for CUDA alone take tensors of the CPU."""
    registered = []
    try:
        for operator in list(importlib.import_module("torch._library.custom_ops").OPDEFS.values()):
            kernels = operator._backend_fns
            if "cuda" in kernels and not kernels.keys() & {"cpu", None}:
                # torch has no way to take back a single kernel but this
                library = type(operator._lib)(operator._namespace, "FRAGMENT")
                registered.append(library)
                library.impl(operator._name, kernels["cuda"], "CPU")
        yield
    finally:
        for library in registered:
            library._destroy()


def _autocast() -> Iterator[tuple[Any, str, Any]]:
    mode = importlib.import_module("torch.amp.autocast_mode")
    begin = mode.autocast.__init__

    def begin_redirected(
        self: Any, device_type: str, dtype: Any = None, *rest: Any, **named: Any
    ) -> None:
        if device_type == "cuda" and dtype is None:
            dtype = torch.float16
        begin(self, _device(device_type), dtype, *rest, **named)

    yield mode.autocast, "__init__", begin_redirected
    # decorators of autograd functions ask again at every call
    yield mode, "_cast", _redirecting(mode._cast, 1)
    enabled = torch.is_autocast_enabled
    yield torch, "is_autocast_enabled", lambda device_type="cuda": enabled(_device(device_type))
    dtype_of = torch.get_autocast_dtype
    yield torch, "get_autocast_dtype", lambda device_type: dtype_of(_device(device_type))
    yield torch, "get_autocast_gpu_dtype", lambda: dtype_of("cpu")
