"""The section `correctness` of `make gpu`: the whole test suite, on the GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

# of the checkout, where the tests are
_ROOT = Path(__file__).resolve().parent.parent


def run(out: Path, limit: float) -> None:
    """Runs it as `make gpu-test` does, in several processes if it can be, to `tests.json` in `out`.

    `limit`: seconds.
    """
    results = out / "tests.json"
    missing = importlib.util.find_spec("pytest") is None
    if missing or results.exists():
        why = "pytest is not installed" if missing else f"{results} exists"
        print(f"skipped: correctness: {why}", flush=True)
        return
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--device", "cuda"]
    if importlib.util.find_spec("xdist") is not None:
        # kernels are compiled by the host, whose cores one process would not use
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    start = time.time()
    try:
        done = subprocess.run(
            [*command, "--json", str(results)], timeout=limit, check=False, cwd=_ROOT
        )
        print(f"correctness: exit status {done.returncode}, {time.time() - start:.0f} s")
    except subprocess.TimeoutExpired:
        print(f"correctness: stopped after {limit:.0f} s, before its end")
