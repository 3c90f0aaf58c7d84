"""Finds the object that a user names on the command line, and says what is wrong with the name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tritorch.testing import redirect
from tritorch.testing.errors import RequestError


@dataclass(frozen=True)
class Named:
    """What a target names: an object, and the module in which its user looked for it."""

    value: Any
    module: ModuleType

    def beside(self, name: str, default: Any = None) -> Any:
        """What has the name in that module, or else where the object is defined."""
        home = sys.modules.get(getattr(self.value, "__module__", None) or "")
        found = [getattr(module, name, None) for module in (self.module, home)]
        # a module of a package has its name there
        return next((one for one in found if not isinstance(one, ModuleType | None)), default)


def find(target: str, *, assertions: bool = True) -> Named:
    """What "package.module:attribute" or "path/to/file.py:attribute" names.

    `assertions`: False takes what a file had defined before it failed an assertion.

    Raises RequestError: the target has another form, a part of it does not exist, or an import
    fails.
    """
    where, separator, attributes = target.rpartition(":")
    if not separator or not where or not attributes:
        raise RequestError(
            f"load: expects package.module:function or path/to/file.py:function, "
            f"received {target!r}"
        )
    is_file = where.endswith(".py") or "/" in where or os.sep in where
    module = _file(where, assertions) if is_file else _module(where)
    value: Any = module
    at = where
    for name in attributes.split("."):
        if not hasattr(value, name):
            raise RequestError(f"load: {at} has no {name!r}{_suggest(name, _public(value))}")
        value, at = getattr(value, name), f"{at}{':' if at == where else '.'}{name}"
    return Named(value, module)


def _file(where: str, assertions: bool) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else None
        why = f"no folder {path.parent}" if near is None else f"no such file in {path.parent}"
        raise RequestError(f"load: {where}: {why}{_suggest(path.name, near or [])}")
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, names = root.parent, [root.name, *names]
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    name = ".".join(names)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if len(names) > 1:
        return _import(name, where)
    if loaded is not None or name in sys.stdlib_module_names:
        # another module has the name
        name = f"{name}_{abs(hash(str(path))):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise RequestError(f"load: {where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        if isinstance(error, AssertionError) and not assertions:
            return module
        del sys.modules[name]
        raise _failed(where, error) from error
    return module


def _module(where: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    names = where.split(".")
    found: ModuleType | None = None
    for count, name in enumerate(names, 1):
        whole = ".".join(names[:count])
        if not _exists(whole):
            if found is None:
                raise RequestError(f"load: {where}: there is no module {whole!r} on sys.path")
            below = [info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))]
            raise RequestError(
                f"load: {found.__name__} has no module {name!r}{_suggest(name, below)}"
            )
        found = _import(whole, where)
    assert found is not None
    return found


def _exists(name: str) -> bool:
    if name in sys.modules:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        # its parent is no package
        return False


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:
        raise _failed(where, error) from error


def _failed(where: str, error: BaseException) -> RequestError:
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        raise error
    file, line = redirect.place(error)
    if isinstance(error, SyntaxError):
        file, line = error.filename or file, error.lineno or line
    at = f" ({file}:{line})" if file else ""
    shown = textwrap.shorten(str(error), 300, placeholder="...")
    return RequestError(f"load: {where} fails to import: {type(error).__name__}: {shown}{at}")


def _public(value: Any) -> list[str]:
    return [
        name
        for name, member in inspect.getmembers(value)
        if not name.startswith("_") and not inspect.ismodule(member)
    ]


def _suggest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    shown = ", ".join(sorted(known)[:20]) + (", ..." if len(known) > 20 else "")
    return f"; it has {shown}" if known else ""
