"""What the methods of a module's class name and do, as Python has compiled them."""

from __future__ import annotations

import dis
import functools
import itertools
import os
import types
from collections.abc import Iterable, Iterator
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


def place_of_name(code: types.CodeType, name: str) -> str | None:
    """Where it names this, as an attribute, a global or a string."""
    named = {*dis.hasname, *dis.hasconst}
    steps = (step for step in dis.get_instructions(code) if step.opcode in named)
    return _first(code, (step for step in steps if step.argval == name))


def place_of_try(code: types.CodeType) -> str | None:
    """Where it has a try statement, or a pattern of sequences or mappings, which no value fits.

    What Python compiles for the end of a `with` block is no try statement.
    """
    steps = list(dis.get_instructions(code))
    following = (*(step.opname for step in steps[1:]), None)
    # Python 3.10 has no PUSH_EXC_INFO
    start = "PUSH_EXC_INFO" if any(s.opname == "PUSH_EXC_INFO" for s in steps) else "SETUP_FINALLY"
    return _first(
        code,
        (
            step
            for step, after in zip(steps, following, strict=True)
            if (step.opname == start and after != "WITH_EXCEPT_START")
            or step.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING")
        ),
    )


def place_of_is(code: types.CodeType) -> str | None:
    """Where it asks by `is` for something else than None."""
    pairs = itertools.pairwise(dis.get_instructions(code))
    return _first(
        code,
        (
            step
            for before, step in pairs
            if step.opname == "IS_OP" and (before.opname, before.argval) != ("LOAD_CONST", None)
        ),
    )


def _first(code: types.CodeType, steps: Iterator[dis.Instruction]) -> str | None:
    step = next(steps, None)
    if step is None:
        return None
    # a handler's first steps have no line
    lines = (line for _, end, line in code.co_lines() if end > step.offset and line)
    return place(code, next(lines, code.co_firstlineno))


def place(code: types.CodeType, line: int) -> str:
    """A line of a file, as reports name it."""
    return f"{os.path.basename(code.co_filename)}:{line}"
