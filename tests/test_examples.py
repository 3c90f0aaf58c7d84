"""Every example runs as a user runs it, and prints what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent


def output_of(name, *options):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name), *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_swap_layers_trains_like_its_twin():
    printed = output_of("swap_layers.py", "--steps", "3", "--device", "cpu")
    assert "5 converted, 1 kept" in printed
    assert re.search(r"^dropout +kept +no kernel for Dropout2d$", printed, re.M)
    rows = re.findall(r"^ +\d+ +(\d\.\d+) +(\d\.\d+)$", printed, re.M)
    assert len(rows) == 3
    for ours, theirs in rows:
        assert float(ours) == pytest.approx(float(theirs), rel=0, abs=1.01e-5)
    losses = [float(ours) for ours, _ in rows]
    assert losses[-1] < losses[0]


def test_every_example_is_listed():
    examples = ROOT / "examples"
    listed = re.findall(r"\]\(((?:models/)?\w+\.py)\)", (examples / "README.md").read_text())
    files = [*examples.glob("*.py"), *examples.glob("models/*.py")]
    assert sorted(listed) == sorted(file.relative_to(examples).as_posix() for file in files)
