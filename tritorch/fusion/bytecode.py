"""What the methods of a module's class name and do, as Python has compiled them."""

from __future__ import annotations

import dis
import functools
import itertools
import os
import traceback
import types
from collections.abc import Collection, Iterable, Iterator
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
    return _first(code, (step.offset for step in steps if step.argval == name))


def place_of_try(code: types.CodeType) -> str | None:
    """Where it handles what a try statement raises, or has a pattern of sequences or mappings,
    which no value fits.
    """
    return _first(code, _of_try(code))


def _of_try(code: types.CodeType) -> Iterator[int]:
    for step, after in itertools.pairwise(dis.get_instructions(code)):
        # what Python compiles for the end of a `with` block is no try statement
        handles = step.opname == "PUSH_EXC_INFO" and after.opname != "WITH_EXCEPT_START"
        if handles or step.opname in ("MATCH_SEQUENCE", "MATCH_MAPPING"):
            yield step.offset
        # what Python 3.10 has instead names its handler
        if step.opname == "SETUP_FINALLY":
            yield step.argval


def place_of_is(code: types.CodeType) -> str | None:
    """Where it asks by `is` for something else than None."""
    pairs = itertools.pairwise(dis.get_instructions(code))
    return _first(
        code,
        (
            step.offset
            for before, step in pairs
            if step.opname == "IS_OP" and (before.opname, before.argval) != ("LOAD_CONST", None)
        ),
    )


def _first(code: types.CodeType, offsets: Iterator[int]) -> str | None:
    """The place of the first of these steps."""
    offset = next(offsets, None)
    if offset is None:
        return None
    # the first steps of a handler have no line
    lines = (line for _, end, line in code.co_lines() if end > offset and line)
    return place(code, next(lines, code.co_firstlineno))


def place(code: types.CodeType, line: int) -> str:
    """A line of a file, as reports name it."""
    return f"{os.path.basename(code.co_filename)}:{line}"


def place_of_error(error: Exception, codes: Collection[types.CodeType]) -> str | None:
    """Where one of these, or a function of its package that it calls, was when an error was raised:
    the last line before those of others.
    """
    found = package = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        own = frame.f_code in codes
        home = frame.f_globals.get("__name__", "").partition(".")[0]
        # of torch's own modules the functions below are those that record
        if own or (found is not None and home == package != "torch"):
            found, package = place(frame.f_code, line), home
        # those of torch come before the forward, too
        elif found is not None:
            break
    return found
