"""Kernels are compiled before they are timed, for shapes whose memory nobody touches."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from tests.test_bench_gpu import run
from tritorch import backend, launch, tuned
from tritorch.bench import precompile
from tritorch.bench.cases import OURS, workloads
from tritorch.bench.launches import resources
from tritorch.testing import dry

pytestmark = pytest.mark.compile


def test_a_case_is_compiled_for_all_its_passes(monkeypatch):
    built = []
    monkeypatch.setattr(precompile, "_launcher", lambda compiled: built.append(compiled))
    case = next(workloads(["relu"]))
    assert precompile.compile_case(case, "sm_90") == ""
    names = {compiled.metadata.name for compiled in built}
    assert names == {"activation_forward_kernel", "activation_backward_kernel"}
    assert {compiled.metadata.target.arch for compiled in built} == {90}


def test_what_was_measured_is_compiled(monkeypatch):
    """A launch on the GPU would take that, and compile it while it is timed."""
    built = []
    monkeypatch.setattr(precompile, "_launcher", lambda compiled: built.append(compiled))
    case = next(workloads(["matmul"]))
    assert precompile.compile_case(case, "sm_90") == ""
    own = [compiled.hash for compiled in built]
    with (
        backend.use("triton"),
        dry.compiling_for("sm_90"),
        launch.choices() as chosen,
        launch.questions() as asked,
    ):
        case.implementations[OURS](**precompile._unwritten(case))
    # whether programs share tiles is asked after that
    (key, _), [(_, config)] = asked, chosen
    other = copy.copy(config)
    other.num_stages = config.num_stages - 1
    built.clear()
    assert precompile.compile_case(case, "sm_90", {key: other}) == ""
    assert [compiled.metadata.num_stages for compiled in built].count(other.num_stages)
    assert [compiled.hash for compiled in built] != own


def test_the_table_of_a_result_is_that_of_its_gpu():
    named = {"gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}
    assert precompile.table_of(named) == tuned.of("NVIDIA H200", "9.0", 132)
    assert precompile.table_of(named)
    assert precompile.table_of({**named, "gpu": None}) == precompile.table_of(None) == {}


def test_what_the_host_looks_at_has_its_value():
    assert precompile.compile_case(next(workloads(["adam_step"])), "sm_90") == ""


def test_what_does_not_compile_is_said():
    def fails(input):
        raise ValueError("no kernel for this")

    case = replace(next(workloads(["relu"])), implementations={OURS: fails})
    said = precompile.compile_case(case, "sm_90")
    assert said == "relu resnet50-stem: ValueError: no kernel for this"


def test_targets_are_those_of_the_dry_driver():
    assert precompile.target_of("9.0") == "sm_90"
    assert precompile.target_of("10.0") == "sm_100"
    assert precompile.target_of("7.5") is None
    assert precompile.target_of(None) is None


def test_the_kernels_of_a_call_are_known():
    import tritorch

    x = torch.empty(64, 64, dtype=torch.float16)
    with tritorch.backend.use("triton"), dry.compiling_for("sm_90"):
        (kernel,) = resources(lambda: tritorch.ops.relu(x))
    assert kernel["kernel"] == "activation_forward_kernel"
    assert kernel["num_warps"] in (1, 2, 4, 8)
    assert kernel["shared_bytes"] == 0


def test_a_run_says_how_long_kernels_were_compiled(tmp_path):
    options = ("--target", "sm_90", "--workers", "1")
    result, said = run(tmp_path / "out", "", "host", *options)
    ours = [row for row in result["rows"] if row["implementation"] == OURS]
    assert ours
    assert all(row["compile_seconds"] > 0 for row in ours)
    # of all passes of a case together
    assert len({row["compile_seconds"] for row in ours}) == len({row["op"] for row in ours})
    assert "not compiled" not in said
    assert not any("compile_seconds" in row for row in result["rows"] if row not in ours)
