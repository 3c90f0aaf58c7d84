"""Where in the user's source the interpreter is: the innermost statement that is no library's."""

from __future__ import annotations

import ast
import functools
import importlib
import linecache
import sys
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """A line of a source file, counted from 1."""

    file: str
    line: int


def here() -> Place:
    """The innermost line being run that is neither Triton's, numpy's, nor of these checks.

    Triton rewrites a kernel's syntax tree, but keeps its file and lines; a statement of several
    lines is at the one where its running expression begins.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return Place(frame.f_code.co_filename, frame.f_lineno)


@functools.cache
def _is_library(file: str) -> bool:
    # what dataclasses generate has no file
    return file == "<string>" or file.startswith(_libraries())


@functools.cache
def _libraries() -> tuple[str, ...]:
    packages = [str(Path(__file__).parent)]
    for name in ("triton", "numpy"):
        packages.append(str(Path(str(importlib.import_module(name).__file__)).parent))
    return tuple(f"{package}/" for package in packages)


def statement(place: Place) -> str:
    """The text of the innermost statement on that line, on one line; empty without a source."""
    found: ast.stmt | None = None
    for node in _statements(place.file):
        if node.lineno <= place.line <= (node.end_lineno or node.lineno):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            if found is None or node.lineno >= found.lineno:
                found = node
    line = linecache.getline(place.file, place.line).strip()
    # of a loop or a branch the line says enough
    if found is None or hasattr(found, "body"):
        return line
    lines = (linecache.getline(place.file, n) for n in _lines_of(found))
    joined = " ".join(line.split("#")[0].strip() for line in lines).strip()
    return joined.replace("( ", "(").replace(", )", ")").replace(" )", ")") or line


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@functools.cache
def _statements(file: str) -> tuple[ast.stmt, ...]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.stmt))
