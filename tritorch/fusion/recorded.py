"""Records the forward of one module with `torch.fx`, or says why a record would not be the forward.

The modules that it calls are single steps of the record, never looked into.  A record fixes what
Python decides while it is made, so a forward is declined that decides by more than the classes of
its arguments and the attributes of its module, or whose record would lack something that it does.
What no record can notice is left: a global that changes, an attribute of a child that the forward
looks at, what is done besides to objects that are no module's.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch import nn, ops, toplevel
from tritorch.fusion import bytecode


class DeclinedError(Exception):
    """Says why a forward is not recorded."""


def record(module: Module, written: type[Module]) -> fx.Graph:
    """The forward of class `written` on that module, for tensors as arguments.

    Raises:
        DeclinedError: the record would not do what the forward does.
        Exception: whatever the forward raises that is given no tensors.
    """
    if "forward" in vars(module):
        raise DeclinedError("its forward is replaced on the instance")
    parameters = inspect.signature(written.forward).parameters.values()
    if any(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ):
        raise DeclinedError("its forward has optional arguments")
    kind: Any = written
    named: frozenset[str] = bytecode.names_in(kind)
    codes = bytecode.of_forward(kind)
    for code in codes:
        for name in sorted(_UNSEEN):
            if place := bytecode.place_of_name(code, name):
                raise DeclinedError(f"it may call {name}, which a record does not repeat ({place})")
        if place := bytecode.place_of_try(code):
            raise DeclinedError(
                f"it has a try or match statement: a record has one branch only ({place})"
            )
        if place := bytecode.place_of_is(code):
            raise DeclinedError(f"it compares by `is` with something other than None ({place})")
    for name in sorted(named & (vars(module).keys() - _OF_MODULES)):
        if not _is_fixed(vars(module)[name]):
            found = type(vars(module)[name]).__name__
            raise DeclinedError(f"it may read {name}, a {found}, whose contents can change")
    with torch.enable_grad(), _mode(module, training=True):
        graph = _record(module, written)
    with torch.no_grad(), _mode(module, training=False):
        evaluated = _record(module, written)
    with torch.enable_grad(), _mode(module, training=True), _autocast():
        lowered = _record(module, written)
    source = graph.python_code("self").src
    if source != evaluated.python_code("self").src:
        raise DeclinedError("its forward differs in evaluation or without gradients")
    if source != lowered.python_code("self").src:
        raise DeclinedError("its forward differs under autocast")
    return graph


def iadd(value: Any, other: Any) -> Any:
    """value += other, for the record: operator.iadd is one that torch.fx prints as a statement."""
    value += other
    return value


# what every module has
_OF_MODULES = vars(Module()).keys()
# what an attribute may be that a forward reads: a module, and what cannot change by itself
_FIXED = (
    Module,
    Tensor,
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
)


def _is_fixed(value: Any) -> bool:
    if isinstance(value, tuple | frozenset):
        return all(map(_is_fixed, value))
    return isinstance(value, _FIXED)


# what does something besides, once, or takes an exception for an answer
_UNSEEN = frozenset(("print", "manual_seed", "fork_rng", "suppress"))


@contextlib.contextmanager
def _autocast() -> Iterator[None]:
    """Autocast on every device, without the warnings of a machine that lacks one."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(device) for device in devices]
    for device in devices:
        torch.set_autocast_enabled(device, True)
    try:
        yield
    finally:
        for device, was in zip(devices, before, strict=True):
            torch.set_autocast_enabled(device, was)


@contextlib.contextmanager
def _unchanged(modules: list[Module]) -> Iterator[None]:
    """Declines a forward that changes one of these, which it would do once and never again."""
    before = [(one, _contents(one), _copies(one)) for one in modules]
    changed = False
    try:
        yield
    finally:
        for one, contents, copies in before:
            if _contents(one) != contents:
                changed = True
                vars(one).clear()
                vars(one).update(copies)
    if changed:
        raise DeclinedError("its forward changes a module that it calls")


@contextlib.contextmanager
def _mode(module: Module, training: bool) -> Iterator[None]:
    before = [(vars(one), one.training) for one in module.modules()]
    for attributes, _ in before:
        attributes["training"] = training
    try:
        yield
    finally:
        for attributes, was in before:
            attributes["training"] = was


def _record(module: Module, written: type[Module]) -> fx.Graph:
    # what the forward does to its module is done to a copy, and seen
    stand_in = written.__new__(written)
    vars(stand_in).update(_copies(module))
    below = [one for one in module.modules() if one is not module]
    drawn, numpys, torchs = random.getstate(), _state_of_numpy(), torch.get_rng_state()
    # other threads may draw meanwhile, but not seed
    seed = torch.initial_seed()
    try:
        with _unchanged(below), _NoTensors():  # type: ignore[no-untyped-call]
            graph = _Recorder().trace(stand_in)
        if random.getstate() != drawn or _state_of_numpy() != numpys:
            raise DeclinedError("its forward draws random numbers in Python")
        if torch.initial_seed() != seed:
            raise DeclinedError("its forward seeds torch's generator")
    finally:
        random.setstate(drawn)
        if torch.initial_seed() != seed:
            torch.set_rng_state(torchs)
        if numpys is not None:
            sys.modules["numpy"].random.set_state(numpys)
    if _contents(stand_in) != _contents(module):
        raise DeclinedError("its forward changes attributes of its module")
    for node in graph.nodes:
        node.type = None
    return graph


def _state_of_numpy() -> Any:
    """That of its global generator, as something that can be compared; None without it."""
    if "numpy" not in sys.modules:
        return None
    kind, keys, *rest = sys.modules["numpy"].random.get_state()
    return (kind, tuple(keys.tolist()), *rest)


def _copies(module: Module) -> dict[str, Any]:
    return {name: _copied(value) for name, value in vars(module).items()}


def _copied(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict | list | set) else value


def _contents(module: Module) -> dict[str, Any]:
    """What its attributes are, and what is in those that can be added to."""
    contents: dict[str, Any] = {}
    for name, value in vars(module).items():
        if isinstance(value, dict):
            contents[name] = [(key, id(one)) for key, one in value.items()]
        elif isinstance(value, list | set):
            contents[name] = [id(one) for one in value]
        else:
            contents[name] = id(value)
    return contents


class _NoTensors(TorchDispatchMode):
    """Notices what is computed while a forward is recorded instead of becoming a part of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise DeclinedError(f"its forward calls {func} without any of its arguments")


_CLASS = "its forward tests the class of a tensor"


class _Asked:
    """Declines what tells Python, and no record, something of a value."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # what is written in C believes the answer, and reads a tensor where there is none
        raise DeclinedError(_CLASS)

    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        # that of torch.fx asks of each argument whether it is of this class
        return fx.Proxy.__torch_function__(*args, **kwargs)

    def __hash__(self) -> int:
        raise DeclinedError("its forward hashes a tensor or its attribute")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # torch.fx would go on with the original
        raise DeclinedError("its forward copies a tensor by copy.deepcopy")

    def __repr__(self) -> str:
        raise DeclinedError("its forward formats a tensor or its attribute as text")

    __str__ = __repr__

    def __format__(self, how: str) -> str:
        return repr(self)


# what may be None, which a forward can ask without a step of the record
_MAYBE_NONE = frozenset(
    (
        "grad",
        "grad_fn",
        "_grad",
        "_grad_fn",
        "_base",
        "_backward_hooks",
        "_post_accumulate_grad_hooks",
    )
)
# of what class an attribute is that torch's functions take for what it is
_CLASSES = {
    "shape": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
    "layout": torch.layout,
}


class _Value(_Asked, fx.Proxy):
    """A value of the record."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no {name}")
        return _Attribute.of(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise DeclinedError(f"its forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})


class _Attribute(_Asked, fx.proxy.Attribute):
    """An attribute of a value, or a method."""

    @classmethod
    def of(cls, value: fx.Proxy, name: str) -> _Attribute:
        if name in _MAYBE_NONE:
            raise DeclinedError(f"its forward may ask whether {name} is None")
        return cls(value, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.attr in _CLASSES:
            return _CLASSES[self.attr]
        # of the one above `super()` gives that of `super` itself
        raise DeclinedError(_CLASS)

    def __getattr__(self, name: str) -> Any:
        return _Attribute.of(self, name)


def _declines(method: str) -> Any:
    def decline(self: _Value, other: Any) -> None:
        raise DeclinedError(f"its forward changes a tensor in place by {method}")

    return decline


# torch.fx would record `x *= y` as x * y, of which other names for x know nothing
for _method in ("isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Value, f"__{_method}__", _declines(f"__{_method}__"))


# our functions ask for shapes; as torch's they are to be steps of the record
_HOMES = (ops, nn.functional, toplevel)
_FUNCTIONS = tuple(
    value
    for home in _HOMES
    for name, value in vars(home).items()
    if inspect.isfunction(value) and not name.startswith("_")
)


class _Recorder(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_functions=_FUNCTIONS)
        self._autowrap_search += _HOMES
        self._surroundings = _surroundings()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) in (_Value, _Attribute) else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise DeclinedError("its forward enters a context such as no_grad or autocast")
        return super().create_node(*args, **kwargs)


def _surroundings() -> tuple[Any, ...]:
    """What a context manager may change that the record would not."""
    torchs: Any = torch._C
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
        torchs._autograd._top_saved_tensors_default_hooks(True),
        *(
            getattr(torchs, f"_get_{flag}")()
            for flag in (
                "cudnn_enabled",
                "cudnn_benchmark",
                "cudnn_deterministic",
                "mkldnn_enabled",
                "flash_sdp_enabled",
                "mem_efficient_sdp_enabled",
                "math_sdp_enabled",
            )
        ),
        torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
    )
