"""Subclasses of tensors that override torch's functions hear of ours as of torch's.

A subclass is given a function as a whole, calls it with overrides disabled, and makes its own of
the result.  If each step inside of our function made a subclass, autograd functions would return
views, into which torch writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_is_enabled = torch._C._is_torch_function_enabled
_disabled = torch._C._disabled_torch_function_impl


def overridable(op: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorates an op, not one of `repeated`, that subclasses override."""

    @functools.wraps(op)
    def overridden(*arguments: _Given.args, **named: _Given.kwargs) -> _Result:
        result: _Result = call(overridden, op, arguments, named)
        return result

    return overridden


def call(
    public: Callable[..., Any],
    op: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Any:
    """`op` of these arguments, or what the subclasses among them make of a call of `public`, which
    is called again with overrides disabled.
    """
    if torch.compiler.is_compiling():
        return op(*arguments, **named)
    given = (*arguments, *named.values())
    if _is_enabled() and _are_overridden(given):
        return handle_torch_function(public, given, *arguments, **named)
    return op(*arguments, **named)


def _are_overridden(arguments: Iterable[Any]) -> bool:
    """Whether a subclass among them wants to hear of functions, and computes no ops by itself."""
    kinds = {type(one) for one in arguments if isinstance(one, Tensor)} - _TENSORS
    return any(kind.__torch_function__ is not _disabled for kind in kinds) and not any(
        kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in kinds
    )
