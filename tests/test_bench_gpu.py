"""The run that asks a GPU everything, on the CPU: it goes on after whatever happens to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritorch.bench import gpu
from tritorch.bench.environment import environment
from tritorch.bench.sections import WEIGHTS, Setting, planned

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--batch", "2", "--shrink", "32"]
# the classes of a run that are looked at, and few cases
HEAD = """
import os, time
import torch
from tritorch.bench import gpu, rows, sections
torch.set_num_threads(1)
measured = rows.Bench.rows
whole = sections.planned
few = lambda section, setting: whole(section, setting)[:3]
sections.planned = gpu.planned = few
"""


def run(out: Path, patch: str = "", sections: str = "host", *more: str) -> tuple[dict, str]:
    """The result file of a run in a process of its own, and what it printed."""
    arguments = [*SMALL, "--out", str(out), "--sections", sections, *more]
    script = f"{HEAD}\n{patch}\nraise SystemExit(gpu.main({arguments!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((out / "gpu.json").read_text()), done.stdout


def ops(result: dict) -> list[str]:
    return [row["op"] for row in result["rows"] if row["implementation"] == "tritorch"]


FIELDS = {
    "op",
    "shape",
    "dtype",
    "layout",
    "pass",
    "implementation",
    "baseline",
    "median_us",
    "speedup",
    "verified",
}


def test_every_section_gives_rows_and_the_next_run_repeats_none(tmp_path):
    sections = "ceilings,conv,matmul,train,pointwise,host,layers"
    result, said = run(tmp_path / "out", "", sections, "--seconds", "60")
    assert {row["section"] for row in result["rows"]} == set(sections.split(","))
    for row in result["rows"]:
        assert row.keys() >= FIELDS
        assert row["verified"], row
        assert (row["speedup"] is None) == (row["baseline"] == ""), row
    assert {row["pass"] for row in result["rows"]} >= {
        "forward",
        "grad_input",
        "grad_weight",
        "backward",
        "train_step",
        "host",
    }
    assert "conv conv2d grad_input tritorch: 3 shapes" in said
    again, _ = run(tmp_path / "out", "", sections, "--seconds", "60")
    assert again["rows"] == result["rows"]


def test_what_fails_costs_no_more_than_itself(tmp_path):
    """A section, a case, a GPU that gives up, and a process."""
    patch = """
def no_ceilings(self):
    raise ValueError("no such machine")
def fails(self, case, which, slots):
    if case.op == "conv2d":
        raise ValueError("unlucky")
    if case.op == "batch_norm":
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    if case.op == "relu":
        os._exit(1)
    return measured(self, case, which, slots)
sections.Runner._ceilings = no_ceilings
rows.Bench.rows = fails
sections.planned = gpu.planned = lambda section, setting: whole(section, setting)[:4]
"""
    result, said = run(tmp_path / "out", patch, "ceilings,host")
    assert ops(result) == ["linear"]
    reasons = {one["what"]: one["why"] for one in result["skipped"]}
    assert reasons == {
        "the rest": "ValueError('no such machine')",
        "conv2d host [8, 64, 8, 8]": "ValueError: unlucky",
        "batch_norm host forward": "the process ended",
        "relu host forward": "the process ended",
    }
    assert "failed: host: relu host forward: the process ended" in said


def test_what_hangs_is_ended(tmp_path):
    patch = """
gpu._PATIENCE = 4.0
def hangs(self, case, which, slots):
    if case.op == "conv2d":
        time.sleep(1000)
    return measured(self, case, which, slots)
rows.Bench.rows = hangs
"""
    result, said = run(tmp_path / "out", patch)
    assert ops(result) == ["batch_norm", "relu"]
    assert "nothing was heard of it any more" in said


def test_a_budget_is_kept_and_what_was_skipped_is_said(tmp_path):
    patch = """
def slow(self, case, which, slots):
    time.sleep(2)
    return measured(self, case, which, slots)
rows.Bench.rows = slow
"""
    result, said = run(tmp_path / "out", patch, "host", "--seconds", "4")
    assert 1 <= len(ops(result)) <= 2
    assert {one["why"] for one in result["skipped"]} == {"no time left"}
    assert "skipped: host" in said


def test_results_of_another_commit_are_not_mixed_in(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    old = {"schema": 1, "environment": environment() | {"commit": "0" * 40}, "rows": []}
    (out / "gpu.json").write_text(json.dumps(old))
    with pytest.raises(AssertionError, match=r"holds results of commit 0+"):
        run(out, "", "ceilings")
    assert json.loads((out / "gpu.json").read_text()) == old


def test_unknown_section_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path), "--sections", "conv,covn"])
    assert "unknown covn" in capsys.readouterr().err


def test_conv_is_resnet50s_23_shapes_three_passes_each():
    cases = planned("conv", Setting())
    assert len(cases) == 23
    assert sum(len(case.passes) for case in cases) == 23 * 3 - 1
    assert sum(case.count for case in cases) == 53
    flops = sum(case.count * case.cost["forward"].flops for case in cases)
    # performance.md's sum, which other people's tables have too: 4.09 GFLOP a multiply-add image
    assert flops == pytest.approx(2.093e12, rel=1e-3)


def test_layers_has_every_op_that_has_a_spec():
    from tritorch.registry import specs

    cases = planned("layers", Setting(small=True, shrink=32))
    assert [case.op for case in cases] == [spec.name for spec in specs()]
    for spec, case in zip(specs(), cases, strict=True):
        differentiable = any(name != "target" for name in spec.gradients)
        assert ("backward" in case.passes) == differentiable


def test_the_most_valuable_sections_run_first():
    assert list(WEIGHTS)[:3] == ["ceilings", "conv", "matmul"]
