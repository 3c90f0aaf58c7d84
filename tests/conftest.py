"""Which rung runs: reference (default), interpret, compile, or the whole suite on a GPU with
--device cuda.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest

RUNGS = ("reference", "interpret", "compile", "cuda")
# tests that a rung runs, by mark; a GPU runs the kernels' tests on itself and the reference path's
# on the CPU
MARKS = {
    "reference": {"reference"},
    "interpret": {"interpret"},
    "compile": {"compile"},
    "cuda": {"reference", "interpret", "cuda"},
}
# files about one mode of Triton, which another mode cannot even import
ONLY = {
    "test_interpreter.py": "interpret",
    "test_interpreter_calls.py": "interpret",
    "test_interpreter_numbers.py": "interpret",
    "test_shortcuts.py": "interpret",
    "test_battery_kernels.py": "interpret",
    "test_detectors.py": "interpret",
    "test_detectors_context.py": "interpret",
    "test_detectors_lanes.py": "interpret",
    "test_detectors_programs.py": "interpret",
    "test_hosting.py": "interpret",
    "test_hosting_kernels.py": "interpret",
    "test_hints.py": "interpret",
    "test_promises.py": "interpret",
    "test_memory.py": "interpret",
    "test_gpu_limits.py": "compile",
    "test_gpu_limits_errors.py": "compile",
    "test_dry.py": "compile",
    "test_compile.py": "compile",
    "test_conv_tma_compiled.py": "compile",
    # their tiles are those of the interpreter
    "test_conv_tma.py": "interpret",
    "test_conv_weight_tma.py": "interpret",
    "test_conv_batch_norm.py": ("interpret", "compile"),
    "test_launch.py": "compile",
    "test_inspection.py": "compile",
    "test_gate.py": "compile",
    "test_check_command.py": "compile",
    "test_check_scripts.py": "compile",
    "test_checking.py": "interpret",
    "test_checking_errors.py": "interpret",
    "test_lab.py": ("interpret", "compile"),
    # builds a wheel, which a machine that only has a GPU need not be able to
    "test_packaging.py": "reference",
    # what the lab says is of the interpreter
    "test_docs.py": ("reference", "interpret"),
}


def pytest_addoption(parser):
    parser.addoption("--rung", choices=RUNGS[:-1], default="reference", help="which tests run")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: all on a GPU")
    parser.addoption("--json", default=None, help="write every test's outcome to this file")
    parser.addoption(
        "--go-on", action="store_true", help="keep what passed in the file of --json, run the rest"
    )


def rung_of(config):
    return "cuda" if config.getoption("--device") == "cuda" else config.getoption("--rung")


def pytest_configure(config):
    global _TO, _REPLACES
    if hasattr(config, "workerinput"):
        # workers of xdist report to the process that started them
        _PASSED.update(dict.fromkeys(config.workerinput.get("passed", ())))
    else:
        _TO = config.getoption("--json")
        if config.getoption("--go-on"):
            _PASSED.update(_passed(_TO))
            _REPLACES = True
    # Triton reads it once, when it is imported
    os.environ["TRITON_INTERPRET"] = "1" if rung_of(config) == "interpret" else "0"
    if rung_of(config) == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no GPU")


def _passed(file):
    """The rows of tests that passed in an earlier run of this commit on this GPU."""
    if file is None:
        raise pytest.UsageError("--go-on: there is no --json to go on with")
    if not Path(file).exists():
        return {}
    from tritorch.bench.environment import environment

    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        then, rows = found["environment"], found["rows"]
    except (ValueError, LookupError, TypeError) as error:
        raise pytest.UsageError(f"--go-on: {file} holds no result of tests: {error!r}") from error
    here = environment()
    for name in ("commit", "gpu", "torch", "triton"):
        if then[name] != here[name]:
            raise pytest.UsageError(
                f"--go-on: {file} is of {name} {then[name]}, this is {here[name]}"
            )
    if here["commit"] is None or then["dirty"] or here["dirty"]:
        raise pytest.UsageError(f"--go-on: nobody knows whether {file} is of this code")
    # one whose teardown failed has two rows
    others = {row["test"] for row in rows if row["outcome"] != "passed"}
    return {row["test"]: row for row in rows if row["test"] not in others}


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    # all workers must find the same tests, whenever they start
    node.workerinput["passed"] = list(_PASSED)


def pytest_ignore_collect(collection_path: Path, config):
    only = ONLY.get(collection_path.name, RUNGS)
    return True if rung_of(config) not in (only if isinstance(only, tuple) else (only,)) else None


def pytest_collection_modifyitems(config, items):
    wanted = MARKS[rung_of(config)]
    kept, others = [], []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()} & set(RUNGS)
        if not marks:
            raise pytest.UsageError(f"{item.nodeid} names no rung: mark it with one of {RUNGS}")
        (kept if marks & wanted and item.nodeid not in _PASSED else others).append(item)
    if others:
        # not skipped: a test of another rung is no result of this one
        config.hook.pytest_deselected(items=others)
        items[:] = kept


@pytest.fixture(autouse=True)
def full_products(request):
    """Kernels are judged as float32: on a GPU torch's default is TF32 for convolutions."""
    if request.node.get_closest_marker("interpret") is None:
        yield
        return
    import torch

    products = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [flags.fp32_precision for flags in products]
    for flags in products:
        flags.fp32_precision = "ieee"
    yield
    for flags, precision in zip(products, before, strict=True):
        flags.fp32_precision = precision


@pytest.fixture
def no_gpu(monkeypatch):
    """For what is hosted: where there is a GPU after all, torch says that there is none."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # what loads a script puts its folder there
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="session")
def device(request):
    """Where the kernels' tests put their tensors."""
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def rung(request):
    return rung_of(request.config)


def pytest_runtest_logreport(report):
    global _WRITTEN, _REPLACES
    _REPORTS.append(report)
    # a run that is killed has told what it found
    if _TO is not None and time.monotonic() - _WRITTEN > _EVERY:
        _write(None)
        _WRITTEN, _REPLACES = time.monotonic(), True


_REPORTS: list[pytest.TestReport] = []
# by name, what an earlier run has found
_PASSED: dict[str, dict[str, object]] = {}
_TO: str | None = None
# whether the file is this run's own, or one that it goes on with
_REPLACES = False
_WRITTEN = 0.0
# seconds between two times that a run writes what it has
_EVERY = 30.0


def _write(exit_status):
    from tritorch.bench.environment import write_result

    rows = [*_PASSED.values()] + [
        {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            **({"failure": report.longreprtext[-2000:]} if report.failed else {}),
        }
        for report in _REPORTS
        if report.when == "call" or report.outcome != "passed"
    ]
    counts = {
        name: sum(r["outcome"] == name for r in rows) for name in ("passed", "failed", "skipped")
    }
    more = {"counts": counts, "exit_status": exit_status}
    write_result(_TO, "tests", rows, overwrite=_REPLACES, **more)


def pytest_sessionfinish(session, exitstatus):
    # that nothing was left to run is no failure of a run that goes on
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and _PASSED:
        session.exitstatus = exitstatus = pytest.ExitCode.OK
    if _TO is not None:
        _write(int(exitstatus))
