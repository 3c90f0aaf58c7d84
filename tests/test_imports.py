"""What importing tritorch must not import, and what works where it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_TRITON = """
import sys
for name in ("triton", "click", "rich", "matplotlib"):
    sys.modules[name] = None
import torch
import tritorch
import tritorch.data
import tritorch.nn
import tritorch.ops
import tritorch.optim
x, weight = torch.randn(2, 3), torch.randn(4, 3)
assert torch.equal(tritorch.ops.linear(x, weight), torch.nn.functional.linear(x, weight))
"""

IMPORTED = """
import sys
{first}
import {modules}
heavy = ("triton", "click", "rich", "matplotlib", "pytest")
print(*sorted({{name.split(".")[0] for name in sys.modules}}.intersection(heavy)))
"""

# binding needs torch's FLOP counter, which imports triton for itself
FLOP_COUNTER = """
sys.modules["triton"] = None
import torch.utils.flop_counter
del sys.modules["triton"]
"""


def run(script: str, folder: Path) -> str:
    """What a fresh interpreter prints for `script`, with the checkout on its path."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tritorch_works_where_triton_is_not_installed(tmp_path):
    assert run(WITHOUT_TRITON, tmp_path) == ""


@pytest.mark.parametrize(
    ("modules", "first"),
    [("tritorch", ""), ("tritorch.nn, tritorch.ops, tritorch.optim", FLOP_COUNTER)],
    ids=["tritorch", "all-of-it"],
)
def test_import_of_tritorch_imports_no_heavy_package(modules, first, tmp_path):
    assert run(IMPORTED.format(modules=modules, first=first), tmp_path) == ""
