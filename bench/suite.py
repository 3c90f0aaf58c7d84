"""The section `correctness` of `make gpu`: the whole test suite, on the GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# of the checkout, where the tests are
_ROOT = Path(__file__).resolve().parent.parent
# seconds that a run may take to write what it has when it is stopped
_GRACE = 20.0
# kernels are compiled by the host, whose cores one process would not use
_MOST = 16


def run(out: Path, limit: float) -> None:
    """Runs it as `make gpu-test` does, in several processes if it can be, to `tests.json` in `out`.

    A run that did not reach its end is gone on with.  `limit`: seconds.
    """
    results = out / "tests.json"
    if importlib.util.find_spec("pytest") is None:
        print("skipped: correctness: pytest is not installed", flush=True)
        return
    if is_whole(results):
        print(f"skipped: correctness: {results} is of a whole run", flush=True)
        return
    command = [sys.executable, "-m", "pytest", "tests", "-q", "--device", "cuda", "--go-on"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(_MOST, (os.cpu_count() or 1) - 1)))]
    start = time.time()
    # a process group of its own, whose members are ended together
    with subprocess.Popen(
        [*command, "--json", str(results)],
        cwd=_ROOT,
        start_new_session=True,
        # a process started with `&` ignores the interrupt that is to stop it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as tests:
        try:
            status = tests.wait(limit)
            print(f"correctness: exit status {status}, {time.time() - start:.0f} s")
        except subprocess.TimeoutExpired:
            _stop(tests)
            print(f"correctness: stopped after {limit:.0f} s, before its end")
        except KeyboardInterrupt:
            _stop(tests)
            raise


def is_whole(results: Path) -> bool:
    """Whether the file holds the outcomes of a run that reached its end."""
    try:
        # pytest's statuses of such a run: all passed, some failed
        return json.loads(results.read_text(encoding="utf-8"))["exit_status"] in (0, 1)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _stop(tests: subprocess.Popen[bytes]) -> None:
    # pytest alone: it writes what it has, and ends its workers
    tests.send_signal(signal.SIGINT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            tests.wait(_GRACE)
    finally:
        # and whatever it has left, at a second interrupt too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(tests.pid, signal.SIGKILL)
