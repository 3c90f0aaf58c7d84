"""The tables that are shipped: their rows are what a GPU measured, and they compile."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest

from tritorch import launch, tuned
from tritorch.bench.recording import record
from tritorch.bench.resnet50 import Shapes
from tritorch.testing import configurations, dry

pytestmark = pytest.mark.compile

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tritorch" / "data" / "tuned").glob("*.json"))
each_table = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
# what a table may say beside what the entries of the kernel's own have
TILE_OF_PIXELS = {"BLOCK_N", "BLOCK_P", "BLOCK_Q"}


def test_there_are_tables():
    assert FILES


@each_table
def test_a_table_is_of_its_gpu_and_says_where_it_comes_from(file):
    content = json.loads(file.read_text())
    source = json.loads((ROOT / content["source"]).read_text())["environment"]
    assert tuned.shipped(content["gpu"]) == file
    assert {name: content[name] for name in ("gpu", "date", "commit")} == {
        name: source[name] for name in ("gpu", "date", "commit")
    }


@each_table
def test_rows_are_of_kernels_that_exist(file):
    functions = {}
    for module in (ROOT / "kernels").glob("*.py"):
        for name, table in configurations.tables(module.stem).items():
            choose = getattr(importlib.import_module(f"tritorch.kernels.{module.stem}"), name)
            functions[name] = choose, table
    rows = json.loads(file.read_text())["rows"]
    for row in rows:
        choose, table = functions[row["function"]]
        assert len(row["sizes"]) == len(inspect.signature(choose).parameters)
        entries = [entry for some in table.values() for entry in some]
        names = set(entries[0].kwargs)
        if row["function"] == "conv2d_tma_config":
            names |= TILE_OF_PIXELS & set(row["kwargs"])
        assert set(row["kwargs"]) == names
    assert len(tuned.read(file)) == len(rows)


@each_table
def test_no_row_is_slower_than_what_else_was_measured(file):
    """Than the kernel's own choice of that day, and than the portable kernel; summed over the cases
    that ask the same.
    """
    content = json.loads(file.read_text())
    times = {}
    for row in json.loads((ROOT / content["source"]).read_text())["rows"]:
        case = times.setdefault(f"{row['name']} {row['pass']} {row['batch']}", {})
        case[row["configuration"]] = row["median_us"]
    for row in content["rows"]:
        assert row["cases"]
        for case, us in row["cases"].items():
            assert us in times[case].values()
        total = sum(row["cases"].values())
        assert row["median_us"] == pytest.approx(total / len(row["cases"]), abs=1e-3)
        for other in ("default", "portable"):
            measured = [times[case][other] for case in row["cases"] if other in times[case]]
            assert not measured or total <= sum(measured), (row, other)


@each_table
def test_rows_compile_without_a_spill(file, monkeypatch):
    """Each configuration in each form in which ResNet-50 or a square product launches it."""
    table = tuned.read(file)
    launched, seen = launch.Prepared.__call__, set()

    def run(self, *tensors, floats=()):
        form = self.kernel.__name__, str(self.config), str(self.constants)
        if form not in seen and any(self.config is one for one in wanted):
            seen.add(form)
            launched(self, *tensors, floats=floats)

    wanted = list(table.values())
    monkeypatch.setattr(launch.Prepared, "__call__", run)
    kernels = []
    with tuned.using(table):
        for case in cases():
            for wants in case.passes.values():
                function = case.implementations["tritorch"]
                kernels += record(function, case.arguments, "sm_90", gradients=wants).launches
    compiled = {config for _, config, _ in seen}
    assert compiled == {str(config) for config in wanted}
    assert len(kernels) == len(seen)
    for kernel in kernels:
        assert dry.problems(kernel, "sm_90") == []
        assert dry.resources(kernel).count("HGMMA") > 0


def cases():
    for batch in (256, 32):
        yield from Shapes(batch).convolutions()
    yield from (case for case in Shapes(256).products() if case.name.startswith("square"))
