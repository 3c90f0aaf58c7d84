"""Checks of the functions of tests/checked.py, in few cases: by a call here, and by the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner

import tritorch
from tests import checked
from tritorch.cli import main

ROOT = Path(__file__).resolve().parent.parent
CHECKED = str(ROOT / "tests" / "checked.py")
# one process, few cases
SHORT = ("--inputs", "x[N]", "--arch", "", "--dtypes", "float32")


def check(fn=checked.double, reference=checked.reference, samples="x[N]", **options):
    """In this process alone, and with few cases."""
    options = {"targets": (), "dtypes": [torch.float32]} | options
    return tritorch.check(fn, reference, samples, **options)


def kinds(report):
    return {finding.kind for finding in report.findings}


def call(name, *options):
    return CliRunner().invoke(main, ("check", f"{CHECKED}:{name}", *options))


def line_of(text):
    """The line of tests/checked.py that ends with a comment."""
    lines = Path(CHECKED).read_text().splitlines()
    (number,) = (n for n, line in enumerate(lines, 1) if line.endswith(f"  # {text}"))
    return number


def run(*arguments, cwd, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
