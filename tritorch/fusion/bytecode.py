"""What the methods of a module's class name and do, as Python has compiled them."""

from __future__ import annotations

import dis
import functools
import itertools
import types
from collections.abc import Iterable
from typing import Any

from torch.nn import Module


@functools.cache
def names_in(written: Any) -> frozenset[str]:
    """What its methods name, attributes or strings, but for what only builds it."""
    return names_of(itertools.chain(*_methods(written).values()))


def names_of(codes: Iterable[types.CodeType]) -> frozenset[str]:
    """Names and strings in them."""
    names: set[str] = set()
    for code in codes:
        names.update(code.co_names, (one for one in code.co_consts if isinstance(one, str)))
    return frozenset(names)


@functools.cache
def of_forward(written: Any) -> tuple[types.CodeType, ...]:
    """The code of its forward, and of the methods of its class that this reaches by their names."""
    methods, reached = _methods(written), list[types.CodeType]()
    # Python calls those with underscores by itself
    wanted = {"forward", *(name for name in methods if name.startswith("__"))}
    while wanted & methods.keys():
        codes = [code for name in wanted for code in methods.pop(name, ())]
        reached += codes
        wanted = set(names_of(codes))
    return tuple(reached)


def _methods(written: Any) -> dict[str, list[types.CodeType]]:
    """By name the code of its methods, with what decorators have wrapped and the functions in them,
    but for what only builds it.
    """
    methods: dict[str, list[types.CodeType]] = {}
    for kind in written.__mro__[: written.__mro__.index(Module)]:
        for name, value in vars(kind).items():
            function = getattr(value, "fget", getattr(value, "__func__", value))
            while name != "__init__" and isinstance(function, types.FunctionType):
                codes = [function.__code__]
                # those that are found on the way are gone through too
                for code in codes:
                    codes += [one for one in code.co_consts if isinstance(one, types.CodeType)]
                methods.setdefault(name, []).extend(codes)
                function = getattr(function, "__wrapped__", None)
    return methods


def tries(code: types.CodeType) -> bool:
    """Whether it has a try statement, what it handles besides the ends of `with` blocks; or one
    that matches sequences, which no value is one of.
    """
    names = [one.opname for one in dis.get_instructions(code)]
    # Python 3.10 has no PUSH_EXC_INFO
    handlers = names.count("PUSH_EXC_INFO") + names.count("SETUP_FINALLY")
    ends = names.count("WITH_EXCEPT_START") if "PUSH_EXC_INFO" in names else 0
    return handlers > ends or not {"MATCH_SEQUENCE", "MATCH_MAPPING"}.isdisjoint(names)


def identifies(code: types.CodeType) -> bool:
    """Whether it asks by `is` for something else than None."""
    steps = list(dis.get_instructions(code))
    return any(
        step.opname == "IS_OP" and (before.opname, before.argval) != ("LOAD_CONST", None)
        for before, step in itertools.pairwise(steps)
    )
