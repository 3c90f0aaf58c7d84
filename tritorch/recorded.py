"""Records the forward of one module with `torch.fx`, or says why a record would not be the forward.

The modules that it calls are single steps of the record, never looked into.  A record fixes what
Python decides while it is made, so a forward is declined that decides by more than the classes of
its arguments and the attributes of its module, or whose record would lack something that it does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch import nn, ops, toplevel


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
    with torch.enable_grad(), _mode(module, training=True):
        graph = _record(module, written)
    with torch.no_grad(), _mode(module, training=False):
        other = _record(module, written)
    if graph.python_code("self").src != other.python_code("self").src:
        raise DeclinedError("its forward is another one in evaluation, or without gradients")
    return graph


def iadd(value: Any, other: Any) -> Any:
    """value += other, for the record: operator.iadd is one that torch.fx prints as a statement."""
    value += other
    return value


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
    vars(stand_in).update({name: _copied(value) for name, value in vars(module).items()})
    drawn = random.getstate()
    with _NoTensors():  # type: ignore[no-untyped-call]
        graph = _Recorder().trace(stand_in)
    if random.getstate() != drawn:
        random.setstate(drawn)
        raise DeclinedError("its forward draws random numbers in Python")
    if _contents(stand_in) != _contents(module):
        raise DeclinedError("its forward changes attributes of its module")
    for node in graph.nodes:
        node.type = None
    return graph


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
        raise DeclinedError(f"its forward calls {func} on no value that it is given")


class _Value(fx.Proxy):
    """A value of the record.  Arguments are tensors; of other values nobody may ask the class."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if self.node.op in ("placeholder", "get_attr"):
            return Tensor
        raise DeclinedError("its forward asks for the class of a value that it computes")

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})


def _declines(method: str) -> Any:
    def decline(self: _Value, other: Any) -> None:
        raise DeclinedError(f"its forward changes a value by {method}")

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
        return a.node if type(a) is _Value else super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _surroundings() != self._surroundings:
            raise DeclinedError("its forward enters a context: no_grad or autocast, say")
        return super().create_node(*args, **kwargs)


def _surroundings() -> tuple[Any, ...]:
    """What a context manager may change that the record would not."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )
