"""Calls functions whose parameters and results may have any names and forms."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritorch.registry import Argument


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls `function` with `arguments` by name or, where it names them otherwise, in their order.

    What it takes by keyword alone is passed by keyword in either case.
    """
    try:
        signature = inspect.signature(function)
        signature.bind(**arguments)
    except ValueError:
        # functions of torch that are written in C++ have no signature
        return function(*arguments.values())
    except TypeError:
        by_keyword = {
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and name in arguments
        }
        return function(
            *(value for name, value in arguments.items() if name not in by_keyword),
            **{name: arguments[name] for name in by_keyword},
        )
    return function(**arguments)


def outputs_of(result: Any, name: str = "the function") -> tuple[Tensor, ...]:
    """The tensors of a result: of tuples, lists and dicts (by sorted keys) too, without None.

    A number becomes a tensor of no dimensions.  Raises TypeError for anything else, and for
    complex numbers.
    """
    if result is None:
        return ()
    if isinstance(result, Tensor):
        if result.is_complex():
            raise TypeError(f"{name} returns {result.dtype}, where real numbers are expected")
        return (result,)
    if isinstance(result, bool | int | float):
        return (torch.tensor(result, dtype=torch.float64 if type(result) is float else None),)
    if isinstance(result, Mapping):
        result = [result[key] for key in sorted(result)]
    if isinstance(result, tuple | list):
        return tuple(output for one in result for output in outputs_of(one, name))
    raise TypeError(
        f"{name} returns {type(result).__name__}, where tensors are expected, "
        "alone or in tuples, lists and dicts"
    )


def map_tensors(value: Argument, function: Callable[[Tensor], Tensor]) -> Argument:
    """Applies `function` to a tensor, or to each tensor of a list; leaves other arguments."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list):
        return [function(tensor) for tensor in value]
    return value


def tensors_of(value: Argument) -> list[Tensor]:
    """The tensors of an argument: itself, or those of a list."""
    if isinstance(value, Tensor):
        return [value]
    return value if isinstance(value, list) else []
