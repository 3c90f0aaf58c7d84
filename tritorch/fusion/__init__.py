"""Rewrites the forwards of a model so that layers and the activations behind them are one kernel.

`torch.fx` records each module's own forward, with the modules that it calls as single steps, so
that modules, their names and the hooks on them stay.  Where the record has a layer and then an
activation, the two become one call of `tritorch.nn.fused`.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import linecache
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from tritorch.convert import check_module, convert, names_of, own, report_table, twin_classes
from tritorch.fusion import patterns
from tritorch.fusion.bytecode import names_in, of_forward, place_of_error
from tritorch.fusion.recorded import DeclinedError, record


def fuse(model: Module, inplace: bool = False) -> Module:
    """The model with activations computed by the kernels of the layers before them.

    Fused are a batch norm, with or without an addition behind it, a linear layer, each with any
    activation that the kernels know, and a 2d convolution with a ReLU: activations of torch.nn, of
    `functional` or a tensor's method, in place or not.  In training the kernel of a 2d convolution
    takes the statistics of the batch norm behind it.  Only steps of one forward, between which no
    other value is used, are joined; `fusion_report` says which, and why others are not.

    A model without a layer of tritorch is converted first.  A module with joined steps is the same
    object of a subclass of its class, whose forward is the recorded one; `tritorch.revert` undoes
    both.  A forward is recorded once, for tensors as arguments: with others it runs as it was
    written, and for good once an attribute of its module is set or deleted; and as long as its
    children, those of its lists of modules included, have other names or another order.  Nobody
    notices a change of a global, of an attribute of a child, or of what functions outside of its
    class look at.

    Args:
        model: any module.
        inplace: as in `convert`: change `model` itself, not a copy that shares its parameters,
            buffers and tensors in attributes.

    Returns:
        `model` itself if `inplace`, else the copy.

    Raises:
        TypeError: `model` is no module.
    """
    model = own(model, "fuse", inplace)
    ours = set(twin_classes().values())
    if not any(type(module) in ours for module in model.modules()):
        convert(model, inplace=True)
    for module in model.modules():
        plan = _plan(module)
        if isinstance(plan, _Plan) and plan.fused and not _is_others(module):
            recipe = _Recipe(_written(module), _children(module), *_source(plan.graph))
            with contextlib.suppress(_NoClassError):
                module.__class__ = _fused_class(recipe)
    return model


@dataclass(frozen=True)
class FusionReport:
    """Which layers of a model have the activation behind them in their kernel; prints as a table.

    fused: the layer and what is fused into it, by the layer's qualified name.
    kept: why other batch norms and other layers with an activation behind them are as written, and
        why the forwards of modules that hold layers could not be recorded, with the line if there
        is one.
    """

    fused: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        return report_table("fused", self.fused, self.kept)


def fusion_report(model: Module) -> FusionReport:
    """The state of a model: which of its layers are fused, and why the others are not.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model, "fusion_report")
    fused: dict[str, str] = {}
    kept: dict[str, str] = {}
    for module, names in names_of(model).items():
        plan = _plan(module)
        for name in names:
            if isinstance(plan, str):
                kept[name] = plan
            elif plan is not None:
                prefix = f"{name}." if name else ""
                joined = {prefix + layer: what for layer, what in plan.fused.items()}
                kept |= {prefix + layer: reason for layer, reason in plan.kept.items()}
                if _is_fused(module):
                    fused |= joined
                else:
                    kept |= dict.fromkeys(joined, "not fused")
    return FusionReport(fused, kept)


class _Recipe(NamedTuple):
    """What the class of a fused module is made of, again where one is unpickled."""

    written: type[Module]
    children: tuple[Any, ...]
    source: str
    # what the source refers to besides torch
    names: tuple[tuple[str, Any], ...]


class Fused:
    """Mixed into the class of a module whose forward is a recorded one."""

    recipe: _Recipe
    _tritorch_recorded: Callable[..., Any]

    # the record may depend on what is changed here
    def __setattr__(self, name: str, value: Any) -> None:
        before = value if name in _STATE else getattr(self, name, _ABSENT)
        super().__setattr__(name, value)
        # others leave marks on modules that no forward of theirs names
        written: Any = self.recipe.written
        is_new = before is _ABSENT and name not in names_in(written)
        if before is not value and not is_new:
            unfuse(self)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        unfuse(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return _unpickled, (tuple(self.recipe), *reduced[1][1:]), *reduced[2:]


# what every module has, which no forward should read: hooks, say
_STATE = frozenset({*vars(Module()), *dir(Module)})
_ABSENT = object()
# in the attributes of a module whose class is not ours to change
_UNFUSED = "_tritorch_unfused"


def unfuse(module: object) -> None:
    """Gives a module its own forward back."""
    if not isinstance(module, Fused):
        return
    if _is_others(module):
        vars(module)[_UNFUSED] = True
    else:
        object.__setattr__(module, "__class__", module.recipe.written)


def _is_others(module: object) -> bool:
    """Whether its class is one that somebody made of a fused one."""
    return isinstance(module, Fused) and "recipe" not in vars(type(module))


def _is_fused(module: Module) -> bool:
    """Whether its forward is a recorded one."""
    return (
        isinstance(module, Fused)
        and _UNFUSED not in vars(module)
        and _children(module) == module.recipe.children
        and module.recipe.written.forward is module._tritorch_recorded
    )


def _children(module: Module) -> tuple[Any, ...]:
    """The names of its children, and of those of its lists, dictionaries and sequences of them."""
    names: list[Any] = [tuple(module._modules)]
    for child in module._modules.values():
        if isinstance(child, _LISTS):
            names += _children(child)
    return tuple(names)


# whose items a forward may go through
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)


class _NoClassError(TypeError):
    """Of a module whose class cannot have subclasses."""


def _unpickled(recipe: Any, *arguments: Any) -> Module:
    kind = _fused_class(_Recipe(*recipe))
    made: Module = kind.__new__(kind, *arguments)
    return made


@functools.cache
def _fused_class(recipe: _Recipe) -> type[Module]:
    written, _, source, names = recipe
    title = f"Fused{written.__name__}"
    file = f"<{title} {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace: dict[str, Any] = {"torch": torch, **dict(names)}
    exec(compile(source, file, "exec"), namespace)
    recorded = namespace["forward"]

    @functools.wraps(written.forward)
    def forward(self: Module, *args: Any, **kwargs: Any) -> Any:
        if not _is_fused(self):
            return written.forward(self, *args, **kwargs)
        for value in (*args, *kwargs.values()):
            if not isinstance(value, Tensor):
                return written.forward(self, *args, **kwargs)
        return recorded(self, *args, **kwargs)

    members = {
        # another one may take its place
        "_tritorch_recorded": staticmethod(written.forward),
        "__module__": written.__module__,
        "__doc__": written.__doc__,
        "forward": forward,
        "recipe": recipe,
    }
    try:
        return type(title, (Fused, written), members)
    except Exception as error:
        # __init_subclass__ or a metaclass that wants more
        raise _NoClassError(str(error)) from error


def _source(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The forward as a program, and what it refers to besides torch."""
    made = graph.python_code("self")
    (code,) = (
        constant
        for constant in compile(made.src, "<recorded>", "exec").co_consts
        if isinstance(constant, types.CodeType)
    )
    named = set(code.co_names) - {"torch"}
    return made.src, tuple((name, made.globals[name]) for name in sorted(named & set(made.globals)))


class _Plan(NamedTuple):
    """A recorded forward with its steps joined; the mappings are by the names of its layers."""

    graph: fx.Graph
    fused: dict[str, str]
    kept: dict[str, str]


def _plan(module: Module) -> _Plan | str | None:
    """What becomes of a module's forward, or why it cannot be recorded; None without layers."""
    layers = dict(_layers(module))
    written: Any = _written(module)
    if not layers or written.forward is Module.forward:
        return None
    try:
        graph = record(module, written)
    # whatever a forward raises that is given no tensors
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not isinstance(error, DeclinedError):
            reason = f"torch.fx cannot trace it: {reason}"
        place = place_of_error(error, of_forward(written))
        return reason if place is None else f"{reason} ({place})"
    called = [node for node in graph.nodes if node.op == "call_module"]
    plan = _Plan(graph, {}, {})
    # the later of two norms that are added takes the addition
    for node in reversed(called):
        layer = module.get_submodule(node.target)
        found = patterns.find(module, node, layer) if isinstance(layer, _LAYERS) else None
        if isinstance(found, str):
            plan.kept[node.target] = found
        elif found is not None:
            plan.fused[node.target] = found.title
            patterns.join(graph, found)
    fused, kept = (dict(reversed(found.items())) for found in plan[1:])
    for node in list(graph.nodes):
        source = patterns.find_convolution(module, node)
        if source is not None:
            fused[str(source.target)] = f"statistics of {patterns.norm_of(node)}"
            patterns.join_convolution(graph, source, node)
    targets = {node.target for node in called}
    for name, layer in layers.items():
        if isinstance(layer, _BatchNorm) and name not in targets:
            kept[name] = "its module's forward does not call it"
    return _Plan(graph, fused, kept)


_LAYERS = (_BatchNorm, torch.nn.Linear, torch.nn.Conv2d)


def _layers(module: Module) -> Iterator[tuple[str, Module]]:
    """The layers that a module holds, itself or in lists, by their names in it."""
    for name, child in module.named_children():
        if isinstance(child, _LAYERS):
            yield name, child
        elif isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from ((f"{name}.{below}", layer) for below, layer in _layers(child))


def _written(module: Module) -> type[Module]:
    return module.recipe.written if isinstance(module, Fused) else type(module)
