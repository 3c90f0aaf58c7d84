"""Swaps the layers of an existing model for tritorch's, and back.

Only layers are swapped: what a model's own `forward` calls, `F.relu(x)` say, stays as written; some
of it `tritorch.fuse` puts into the layers' kernels.  `tritorch.convert` is the function; `from
tritorch.convert import ConversionReport` works all the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

Selector = str | type[Module]


def convert(
    model: Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    inplace: bool = False,
) -> Module:
    """The model with every layer that has kernels replaced by tritorch's.

    A layer is replaced where its class is exactly torch's: an unknown subclass may compute
    something else and stays, as do lazy, parametrized, weight-normed and quantized layers.
    A replaced layer is the same object of another class, so that parameters, buffers, hooks, flags,
    extra attributes and a second place in the model stay what they are.

    Args:
        model: any module, a single layer included.
        include: what alone is replaced; None is everything.  A string is an `fnmatch` pattern of
            qualified names ("features.*"); a class stands for its instances, torch's and
            tritorch's for each other.  Either covers the modules it names and all below them.
        exclude: what is not replaced, in the same terms; it wins over `include`.
        inplace: change `model` itself.  Otherwise a deep copy is changed, whose parameters,
            buffers and tensors in attributes are the model's own objects: training one trains
            both.  `to()` gives each new buffers, so move a model before converting a copy of it.

    Returns:
        `model` itself if `inplace`, else the copy.

    Raises:
        TypeError: `model` is no module, or a selector neither a string nor a class of modules.
    """
    model = own(model, "convert", inplace)
    for module, reason in _decisions(model, include, exclude):
        if reason is None:
            module.__class__ = twin_classes()[type(module)]
    return model


def revert(model: Module, inplace: bool = False) -> Module:
    """The model with every layer of tritorch replaced by torch's: `convert` and `fuse`, undone.

    Args:
        model: any module.
        inplace: as in `convert`.

    Returns:
        `model` itself if `inplace`, else a copy that shares its parameters and buffers.

    Raises:
        TypeError: `model` is no module.
    """
    # not before it is needed: importing tritorch stays cheap
    from tritorch.fusion import unfuse

    model = own(model, "revert", inplace)
    torchs = {ours: theirs for theirs, ours in twin_classes().items()}
    for module in model.modules():
        unfuse(module)
        kind, layer = type(module), _layer_of(module)
        if kind in torchs:
            module.__class__ = torchs[kind]
        elif layer in torchs:
            # copies of the module share its class
            made = {name: value for name, value in vars(kind).items() if name not in _OF_CLASSES}
            of_classes: Any = type(kind)
            module.__class__ = of_classes(kind.__name__, (torchs[layer],), made)
    return model


# what every class has of its own
_OF_CLASSES = ("__dict__", "__weakref__")


def _layer_of(module: Module) -> type[Module]:
    """Its class, or the one that torch has made a subclass of for its parametrizations."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


@dataclass(frozen=True)
class ConversionReport:
    """Which layers of a model are tritorch's; prints as a table.

    converted: class name of every layer of tritorch, by qualified name ("" is the model itself).
    kept: why each other layer is not one.  A layer is a module without children, or one of a class
        that tritorch replaces, or of a subclass of it.
    """

    converted: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        return report_table("converted", self.converted, self.kept)


def report_table(done: str, changed: Mapping[str, str], kept: Mapping[str, str]) -> str:
    """How many layers were `done` and how many kept, and a line of each."""
    rows = [(name, done, detail) for name, detail in changed.items()]
    rows += [(name, "kept", reason) for name, reason in kept.items()]
    width = max((len(name or "(model)") for name, _, _ in rows), default=0)
    lines = [f"{len(changed)} {done}, {len(kept)} kept"]
    lines += [
        f"{name or '(model)':{width}}  {what:{max(len(done), 4)}}  {detail}"
        for name, what, detail in rows
    ]
    return "\n".join(lines)


def conversion_report(
    model: Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> ConversionReport:
    """The state of a model: which of its layers are tritorch's, and why the others are not.

    `include` and `exclude`, as given to `convert`, only serve to name them as the reason.

    Raises:
        TypeError: `model` is no module, or a selector neither a string nor a class of modules.
    """
    check_module(model, "conversion_report")
    ours = set(twin_classes().values())
    names = names_of(model)
    converted = {
        name: _layer_of(module).__name__
        for module in model.modules()
        if _layer_of(module) in ours
        for name in names[module]
    }
    kept = {
        name: reason or "not converted"
        for module, reason in _decisions(model, include, exclude)
        for name in names[module]
    }
    return ConversionReport(converted, kept)


def twin_classes() -> dict[type[Module], type[Module]]:
    """Our class by torch's."""
    # not before it is needed: importing tritorch stays cheap
    from tritorch import nn, ops  # noqa: F401  (ops declares what the layers are)
    from tritorch.registry import specs

    layers = [layer for spec in specs() for layer in spec.layers]
    return {getattr(torch.nn, layer): getattr(nn, layer) for layer in layers}


def check_module(model: Module, function: str) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"{function}: model must be a Module, not {type(model).__name__}")


def own(model: Module, function: str, inplace: bool) -> Module:
    check_module(model, function)
    if inplace:
        return model
    shared = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def names_of(model: Module) -> dict[Module, list[str]]:
    """Every qualified name of every module: a shared one has several."""
    names: dict[Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _decisions(
    model: Module,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
) -> Iterator[tuple[Module, str | None]]:
    """Every layer that is not ours, with the reason to keep it; None is no reason."""
    twins = twin_classes()
    included = None if include is None else _covered(model, _selectors(include), twins)
    excluded = {} if exclude is None else _covered(model, _selectors(exclude), twins)
    for module in model.modules():
        kind = type(module)
        if kind in twins:
            reason = _obstacle(module)
            if reason is None and module in excluded:
                reason = f"excluded by {excluded[module]}"
            elif reason is None and included is not None and module not in included:
                reason = "not included"
            yield module, reason
        elif _layer_of(module) not in twins.values():
            reason = _foreign(module, twins)
            if reason is not None:
                yield module, reason


def _obstacle(module: Module) -> str | None:
    """Why a layer of torch's own class cannot simply change its class."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    hooked = [name for name in ("weight", "bias") if isinstance(vars(module).get(name), Tensor)]
    # weight_norm, spectral_norm and pruning keep the parameter under another name
    return f"its {hooked[0]} is computed by a hook" if hooked else None


def _foreign(module: Module, twins: Mapping[type[Module], type[Module]]) -> str | None:
    """Why a layer of another class stays; None for a container."""
    kind = type(module)
    base = next((base for base in kind.__mro__ if base in twins), None)
    if parametrize.is_parametrized(module):
        return "parametrized"
    if isinstance(module, LazyModuleMixin):
        return "lazy: its shapes are not known yet"
    if ".quantized." in f"{kind.__module__}." or ".qat." in f"{kind.__module__}.":
        return "quantized"
    if base is not None:
        return f"{kind.__name__} is a subclass of {base.__name__} that may compute something else"
    container = isinstance(module, torch.nn.Sequential | torch.nn.ModuleList | torch.nn.ModuleDict)
    if next(module.children(), None) is None and not container:
        return f"no kernel for {kind.__name__}"
    return None


def _selectors(given: Selector | Iterable[Selector]) -> tuple[Selector, ...]:
    selectors: tuple[Selector, ...]
    if isinstance(given, Iterable) and not isinstance(given, str):
        selectors = tuple(given)
    else:
        selectors = (given,)
    for selector in selectors:
        if not isinstance(selector, str) and not (
            isinstance(selector, type) and issubclass(selector, Module)
        ):
            raise TypeError(
                "convert: a selector is a pattern of qualified names or a class of modules, "
                f"received {selector!r}"
            )
    return selectors


def _covered(
    model: Module, selectors: tuple[Selector, ...], twins: Mapping[type[Module], type[Module]]
) -> dict[Module, str]:
    """The modules that a selector names and all below them, each with the selector."""
    covered: dict[Module, str] = {}
    for module, names in names_of(model).items():
        kind = twins.get(type(module), type(module))
        for selector in selectors:
            if isinstance(selector, str):
                matches = any(fnmatchcase(name, selector) for name in names)
                shown = repr(selector)
            else:
                matches = issubclass(kind, selector)
                shown = selector.__name__
            if matches:
                covered |= {below: shown for below in module.modules() if below not in covered}
    return covered
