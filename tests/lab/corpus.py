"""The kernels that the correctness lab is judged by: correct ones, and ones with one defect each.

A file holds kernels, a function of the file's name that launches them, and its plain-PyTorch
`reference`.  Constants say what a user would tell a check: INPUTS, and where what it finds out by
itself does not fit DTYPES and NON_FINITE.  A broken one says in DEFECT what kind of finding it
deserves, and the line at fault ends in `MARK` if findings of that kind have a line.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from tritorch.testing import hosting

ROOT = Path(__file__).resolve().parent.parent.parent
MARK = "# defect"
# the first Triton that a file is not for: 3.7 warns of block pointers, 3.9 has none
BEFORE = {"block_pointers": (3, 7)}


@dataclass(frozen=True)
class Kernel:
    """One file of the corpus."""

    path: Path

    def __str__(self) -> str:
        return self.path.stem

    @property
    def target(self) -> str:
        """What `tritorch.check` finds the function by."""
        return f"{self.path}:{self.path.stem}"

    @property
    def defect(self) -> str:
        """The kind of finding that it deserves; empty for a correct kernel."""
        found = re.search(r'^DEFECT = "(.+)"$', self.path.read_text(), re.MULTILINE)
        return found[1] if found else ""

    @property
    def line(self) -> int:
        """The line of the defect, 0 where none is marked."""
        lines = self.path.read_text().splitlines()
        return next((i for i, line in enumerate(lines, 1) if line.endswith(MARK)), 0)

    def module(self) -> ModuleType:
        """The module, imported as a check imports it."""
        return sys.modules[hosting.load(self.target).__module__]

    def function(self) -> Any:
        """The function that launches the kernels."""
        return hosting.load(self.target)


def kernels(folder: str) -> list[Kernel]:
    """Every kernel in a folder of the checkout that the installed Triton is for, by name."""
    found = [Kernel(path) for path in sorted((ROOT / folder).glob("*.py"))]
    try:
        installed = tuple(int(part) for part in version("triton").split(".")[:2])
    except PackageNotFoundError:
        # rungs that need Triton do not run here, and others only ask for names
        return found
    return [kernel for kernel in found if installed < BEFORE.get(str(kernel), (99,))]
