"""`import tritorch.x` where tritorch has no module x: torch's module x, the same object."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class TorchFinder(MetaPathFinder, Loader):
    """Stands before the ordinary finders, which would load a second copy of a module of torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith("tritorch."):
            return None
        parent = name.rpartition(".")[0]
        # a parent that is torch's under our name has no module of ours
        if sys.modules[parent].__name__ == parent:
            own = vars(sys.modules[parent]).get("__path__", [])
            if PathFinder.find_spec(name, own) is not None:
                return None
        return ModuleSpec(name, self) if _exists(_torchs(name)) else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # the import statement takes what stands here afterwards
        sys.modules[module.__name__] = importlib.import_module(_torchs(module.__name__))


def _torchs(name: str) -> str:
    return "torch" + name.removeprefix("tritorch")


def _exists(torchs: str) -> bool:
    if torchs in sys.modules:
        return True
    try:
        return importlib.util.find_spec(torchs) is not None
    except ModuleNotFoundError as error:
        # torch has no such package; that one of its packages needs another is not for us to say
        if error.name is not None and torchs.startswith(f"{error.name}."):
            return False
        raise
