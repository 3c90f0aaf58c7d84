"""The run that asks a GPU everything, on the CPU: it goes on after whatever happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
    host = [row for row in result["rows"] if row["pass"].startswith("host")]
    known = [row for row in host if row["median_us"]]
    assert known
    for row in host:
        # by which two results are compared, in place of the device's samples
        assert bool(row["interval_us"]) == (row in known)
        assert "samples_us" not in row
    assert all(row["interval_us"][0] <= row["median_us"] <= row["interval_us"][1] for row in known)
    assert {row["pass"] for row in result["rows"]} >= {
        "forward",
        "grad_input",
        "grad_weight",
        "backward",
        "train_step",
        "host",
    }
    assert "conv conv2d grad_input tritorch: 3 shapes" in said
    page = (tmp_path / "out" / "gpu.html").read_text()
    assert page.count("<figure>") == 3
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 10_000
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
    # only what hangs has little patience, from when it begins: a machine may be slow with the rest
    patch = """
passes = sections.Runner._passes
def begins(self, section, case, wanted):
    tell = self.tell
    if case.op == "conv2d":
        self.tell = lambda event, **fields: tell(event, **fields, patience=1.0)
    passes(self, section, case, wanted)
    self.tell = tell
def hangs(self, case, which, slots):
    if case.op == "conv2d":
        time.sleep(1000)
    return measured(self, case, which, slots)
sections.Runner._passes = begins
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


def test_an_interrupted_run_keeps_what_it_has_measured(tmp_path):
    """A signal of either kind, in the middle of a row: no two seconds are lost, nobody is left."""
    patch = """
def slow(self, case, which, slots):
    if len(marks) == 2:
        open("mark", "w").close()
        time.sleep(60)
    marks.append(case.op)
    return measured(self, case, which, slots)
marks = []
rows.Bench.rows = slow
"""
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / number.name
        out.mkdir()
        arguments = [*SMALL, "--out", str(out), "--sections", "host"]
        script = f"{HEAD}\n{patch}\nraise SystemExit(gpu.main({arguments!r}))"
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=out,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a signal of the terminal reaches the whole group
            start_new_session=True,
            # a shell's background jobs ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        until = time.monotonic() + 60
        while not (out / "mark").exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.terminate()
        said, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) == (130, "")
        assert "interrupted: 4 rows are kept in" in said
        assert len(ops(json.loads((out / "gpu.json").read_text()))) == 2
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_a_full_disk_is_said_and_the_last_file_is_whole(tmp_path):
    out = tmp_path / "out"
    arguments = [*SMALL, "--out", str(out), "--sections", "host"]
    patch = """
from tritorch.bench import store
store._EVERY = 0.0
write, count = store.write_whole, 0
def full(*arguments, **options):
    global count
    count += 1
    if count > 2:
        raise OSError(28, "No space left on device")
    write(*arguments, **options)
store.write_whole = full
"""
    done = subprocess.run(
        [sys.executable, "-c", f"{HEAD}\n{patch}\nraise SystemExit(gpu.main({arguments!r}))"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 3
    assert done.stderr == "the result could not be written: [Errno 28] No space left on device\n"
    assert len(json.loads((out / "gpu.json").read_text())["rows"]) == 2


KERNEL = {"kernel": "k", "registers": 32, "spills": 0, "num_warps": 4, "shared_bytes": 0}
DETAILS = f"""
KERNEL = {KERNEL}"""
DETAILS += """
import types
from tritorch.bench import details
# what is asked, on a machine that has no GPU
run = sections.Runner._details
def asked(self, until):
    device = self.bench.device
    self.bench.device = types.SimpleNamespace(type="cuda")
    self._free = lambda: None
    self.bench.slots = lambda case: [sections.Slot.of(case, "cpu", n) for n in range(2)]
    run(self, until)
    self.bench.device = device
sections.Runner._details = asked
def graph(subject):
    if subject.prepared.case.op == "linear":
        raise ValueError("unlucky")
    return {"graph_us": 1.0}
details.MEASURES = {"graph": graph, "kernels": lambda subject: {"kernels": [KERNEL]},
    "memory": lambda subject: {"peak_bytes": len(subject.name)}}
"""


def test_details_are_added_to_rows_that_are_there(tmp_path):
    result, said = run(tmp_path / "out", DETAILS, "conv,matmul,details")
    for row in result["rows"]:
        if (row["op"], row["implementation"]) == ("linear", "tritorch"):
            # what fails costs no more than itself
            assert row["graph_failure"] == "ValueError: unlucky"
            assert (row["peak_bytes"], row["kernels"]) == (len("tritorch"), [KERNEL])
        elif row["implementation"] == "tritorch":
            assert (row["graph_us"], row["kernels"]) == (1.0, [KERNEL])
            assert row["peak_bytes"] == len("tritorch")
            assert set(row["details_seconds"]) == {"graph", "kernels", "memory"}
        else:
            # torch's memory alone
            assert row["peak_bytes"] == len("torch")
            assert "kernels" not in row
    assert result["skipped"] == []
    count = sum(row["implementation"] == "tritorch" for row in result["rows"])
    assert f"details graph: {count} rows" in said
    # what is there is not measured again
    patch = f"{DETAILS}\ndetails.MEASURES = {{}}"
    again, _ = run(tmp_path / "out", patch, "conv,details")
    assert again["rows"] == result["rows"]


def test_a_call_that_is_too_long_for_the_host_s_time_has_none(tmp_path):
    patch = """
from tritorch.bench import timing
def long(call, clock, *, seconds):
    raise ValueError("too long")
timing.host_time = long
"""
    result, _ = run(tmp_path / "out", patch)
    assert ops(result) == ["conv2d", "batch_norm", "relu"]
    for row in result["rows"]:
        assert (row["median_us"], row["host_failure"]) == (None, "ValueError: too long")
        assert (row["speedup"], row.get("baseline_us")) == (None, None)


def test_details_are_of_a_gpu(tmp_path):
    result, _ = run(tmp_path / "out", "", "host,details")
    assert [one["why"] for one in result["skipped"]] == ["it is about a GPU"]
    assert all("kernels" not in row for row in result["rows"])


@pytest.mark.parametrize(
    ("option", "number", "said"),
    [
        ("--shrink", "0", "--shrink: expects 1 or more, received 0"),
        ("--batch", "0", "--batch: expects 1 or more, received 0"),
        ("--seconds", "-5", "--seconds: expects more than 0, received -5.0"),
        ("--seconds", "nan", "--seconds: expects more than 0, received nan"),
        ("--seconds", "inf", "--seconds: expects more than 0, received inf"),
    ],
)
def test_a_number_that_makes_no_run_is_a_wrong_call(tmp_path, capsys, option, number, said):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stopped:
        gpu.main([*SMALL, "--out", str(out), option, number, "--sections", "calibration"])
    assert (stopped.value.code, said in capsys.readouterr().err) == (2, True)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_and_nothing_is_written(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "tritorch.bench.gpu", "--out", str(out), "--workers", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.endswith("error: --device cuda: torch finds no GPU\n")
    assert not out.exists()
