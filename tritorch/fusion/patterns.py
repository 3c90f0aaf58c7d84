"""Steps of a record that one kernel computes: a layer, perhaps an addition, an activation.

An activation reads nothing but what is before it, and moves up to the layer; with an addition it is
the norm that moves down to it, past what nothing must change that it reads.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from tritorch import nn, ops, toplevel
from tritorch.convert import names_of
from tritorch.fusion.recorded import iadd
from tritorch.nn import fused
from tritorch.ops.activation import REFERENCES
from tritorch.ops.activation_function import needs_output


class _Activation(NamedTuple):
    """An activation of the kernels, and what computes it if that is a module: its name."""

    name: str
    module: str | None = None


class Pattern(NamedTuple):
    """Steps that one kernel computes: a layer, perhaps an addition, an activation."""

    layer: fx.Node
    addition: fx.Node | None
    step: fx.Node
    activation: _Activation

    @property
    def title(self) -> str:
        return f"{'addition, ' if self.addition else ''}{self.activation.name}"


def find(module: Module, node: fx.Node, layer: Module) -> Pattern | str | None:
    """The steps from that layer on, or why they stay apart; None for no activation behind it."""
    is_norm = isinstance(layer, _BatchNorm)
    user, last = _only_user(node), node
    addition: fx.Node | None = None
    if is_norm and user is not None and user.target is fused.residual_activated:
        return f"{user.args[0]} is fused with the addition to it"
    if is_norm and user is not None and _is_addition(user):
        last = addition = user
        user = _only_user(addition)
    activation = None if user is None else _activation(module, user, last)
    if user is None or activation is None:
        used = "its result is used more than once"
        nothing = used if len(last.users) > 1 else "no activation follows"
        return nothing if is_norm else None
    if isinstance(activation, str):
        return activation
    reason = _obstacle(module, node, layer, activation.name)
    if reason is None and addition is not None:
        reason = _addition_obstacle(module, node, addition, activation.name)
    return reason or Pattern(node, addition, user, activation)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


# what else the function that a step calls may be given, by its name
_OPTIONS = {"leaky_relu": ("negative_slope", "inplace"), "gelu": ("approximate",)}
_FUNCTIONS = {
    getattr(home, spelling): name
    for home in (torch, F, ops, nn.functional, toplevel)
    for name in REFERENCES
    for spelling in (name, f"{name}_")
    if hasattr(home, spelling)
}
_METHODS = {
    spelling: name
    for name in REFERENCES
    for spelling in (name, f"{name}_")
    if hasattr(Tensor, spelling)
}


def _activation(module: Module, node: fx.Node, input: fx.Node) -> _Activation | str | None:
    """Which one the step computes of `input` alone, None if none; or why it is not the kernels'."""
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if not fused.is_activation(layer):
            return None
        name = fused.activation_name(layer)
        if name is None:
            return f"the kernels have no {layer}"
        if not fused.is_plain(layer):
            return f"{node.target} has hooks, or its forward is replaced"
        return _Activation(name, str(node.target))
    names: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
    found = names.get(node.target) if node.op in ("call_function", "call_method") else None
    if found is None:
        return None
    options = _OPTIONS.get(found, ("inplace",))
    given = dict(zip(("input", *options), node.args, strict=False)) | node.kwargs
    if given.pop("input", None) is not input:
        return None
    given.pop("inplace", None)
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    if found == "gelu" and given.pop("approximate", "none") == "tanh":
        found = "gelu_tanh"
    if given.pop("negative_slope", 0.01) != 0.01 or given:
        return f"the kernels have no {found}({shown})"
    return _Activation(found)


def _is_addition(node: fx.Node) -> bool:
    """Whether the step adds two values and does nothing else."""
    if len(node.args) != 2 or not all(isinstance(value, fx.Node) for value in node.args):
        return False
    alpha = node.kwargs.keys() == {"alpha"} and node.kwargs["alpha"] == 1
    if node.kwargs and not alpha:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in (operator.add, torch.add, iadd)


def _obstacle(module: Module, node: fx.Node, layer: Module, activation: str) -> str | None:
    """Why a layer cannot take the activation behind it."""
    if type(layer) not in fused.LAYERS:
        return f"{type(layer).__name__} is not a layer of tritorch"
    if not fused.takes(layer, activation):
        return f"{type(layer).__name__} takes no {activation}"
    if not fused.is_plain(layer):
        return "it has hooks, or its forward is replaced"
    if len(node.args) != 1 or node.kwargs:
        return "it is called with more than one argument"
    names = names_of(module)[layer]
    if len(names) > 1 or sum(one.target in names for one in node.graph.nodes) > 1:
        return "it is used in more than one place"
    return None


# of new memory, which nothing else in a forward can write to
_FRESH = frozenset(
    getattr(home, layer)
    for home in (torch.nn, nn)
    for layer in ("Linear", *(f"Conv{t}{n}d" for t in ("", "Transpose") for n in (1, 2, 3)))
)


def _addition_obstacle(
    module: Module, node: fx.Node, addition: fx.Node, activation: str
) -> str | None:
    """Why a norm cannot be computed where the addition behind it is."""
    residual = _residual(node, addition)
    if residual is node:
        return "it is added to itself"
    if _is_inplace(addition) and addition.args[0] is not node:
        return "it is added in place to another value"
    steps = list(node.graph.nodes)
    before = steps[: steps.index(addition)]
    between = before[before.index(node) + 1 :]
    behind = steps[steps.index(addition) + 1 :]
    # autograd would keep what is added, which an addition alone does not need
    if not needs_output(activation) and any(user in behind for user in residual.users):
        return "the tensor that is added to it is used afterwards"
    if all(step.op in ("get_attr", "placeholder") for step in between):
        return None
    source = node.args[0]
    if (
        isinstance(source, fx.Node)
        and source.op == "call_module"
        and type(module.get_submodule(str(source.target))) in _FRESH
        and fused.is_plain(module.get_submodule(str(source.target)))
        and _only_user(source) is node
        # what was read before has another name by now
        and not any(str(step.target).startswith(f"{node.target}.") for step in before)
    ):
        return None
    return "its input or statistics may change before the addition"


def _residual(norm: fx.Node, addition: fx.Node) -> Any:
    first, second = addition.args
    return second if first is norm else first


def _is_inplace(addition: fx.Node) -> bool:
    return addition.target in (iadd, "add_")


def join(graph: fx.Graph, pattern: Pattern) -> None:
    """Puts one call in the place of the steps."""
    layer, addition, step, activation = pattern
    with graph.inserting_before(addition or layer):
        name = activation.module
        called: tuple[Any, ...] = (
            graph.get_attr(str(layer.target)),
            activation.name if name is None else graph.get_attr(name),
            layer.args[0],
        )
        if addition is None:
            joined = graph.call_function(fused.activated, called)
        else:
            called += (_residual(layer, addition), _is_inplace(addition))
            joined = graph.call_function(fused.residual_activated, called)
    step.replace_all_uses_with(joined)
    for old in (step, addition, layer):
        if old is not None:
            graph.erase_node(old)


# of new memory, which nothing but their users can change
_STEPS = (fused.activated, fused.residual_activated, fused.convolved)


def find_convolution(module: Module, node: fx.Node) -> fx.Node | None:
    """The convolution whose kernel can take the statistics of that norm, or of a joined one."""
    name = norm_of(node)
    if name is None or type(module.get_submodule(name)) is not nn.BatchNorm2d:
        return None
    source = node.args[0 if node.op == "call_module" else 2]
    if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.args) != 1:
        return None
    convolution = module.get_submodule(str(source.target))
    if not fused.is_convolution(convolution) or convolution.bias is not None or source.kwargs:
        return None
    if not fused.is_plain(convolution) or _only_user(source) is not node:
        return None
    return source if _may_move(module, source, node) else None


def norm_of(node: fx.Node) -> str | None:
    """The name of the layer that a step calls, alone or joined with what is behind it."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        return str(node.target)
    if node.target in (fused.activated, fused.residual_activated):
        layer: Any = node.args[0]
        return str(layer.target)
    return None


def _may_move(module: Module, source: fx.Node, node: fx.Node) -> bool:
    """Whether nothing between two steps can change what the first one reads."""
    steps = list(node.graph.nodes)
    before = steps[: steps.index(node)]
    between = before[before.index(source) + 1 :]
    if all(step.op in ("get_attr", "placeholder") for step in between):
        return True
    read = source.args[0]
    if not isinstance(read, fx.Node) or _only_user(read) is not source:
        return False
    if any(str(step.target).startswith(f"{source.target}.") for step in before):
        return False
    is_layer = read.op == "call_module" and type(module.get_submodule(str(read.target))) in _FRESH
    return is_layer or read.target in _STEPS


def join_convolution(graph: fx.Graph, source: fx.Node, node: fx.Node) -> None:
    """Puts one call in the place of a convolution and of what its norm was joined to."""
    with graph.inserting_before(node):
        convolution = graph.get_attr(str(source.target))
        called: tuple[Any, ...]
        if node.op == "call_module":
            called = (convolution, graph.get_attr(str(node.target)), None, source.args[0])
        else:
            norm, activation, _, *rest = node.args
            called = (convolution, norm, activation, source.args[0], *rest)
        joined = graph.call_function(fused.convolved, called)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    graph.erase_node(source)
