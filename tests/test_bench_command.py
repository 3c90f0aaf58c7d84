"""`tritorch bench`: what it says, what it writes, its exit status."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from click.testing import CliRunner

from tests.settings import restored
from tritorch.bench import ceilings, rows
from tritorch.cli import main

pytestmark = pytest.mark.reference

QUICK = ("--seconds", "0.01", "--device", "cpu")


def bench(*arguments):
    return CliRunner().invoke(main, ("bench", *map(str, arguments)))


@pytest.fixture(autouse=True)
def settings_are_restored():
    with restored():
        yield


@pytest.fixture
def theirs(tmp_path):
    """A user's file: a product and its reference, one that is wrong, one that is not a function."""
    file = tmp_path / "theirs.py"
    file.write_text(
        "import torch\n"
        "INPUTS = 'a[M, K] b[K, N]'\n"
        "def reference(a, b):\n    return a @ b\n"
        "def product(a, b):\n    return (b.T @ a.T).T\n"
        "def wrong(a, b):\n    return a @ b + 1\n"
        "constant = 3\n"
    )
    return file


def test_rows_of_an_op_are_shown_and_written(tmp_path):
    files = {name: tmp_path / "new" / f"result.{name}" for name in ("json", "csv", "md", "html")}
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    # of a call that takes longer than its share no host's time is known
    longer = ("--seconds", "0.5", "--device", "cpu")
    result = bench("softmax", "relu", "--pass", "forward,backward", *longer, *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"no GPU: wall time of the reference path on the CPU, \d calls", result.output)
    assert re.search(r"softmax +images +backward +tritorch +[\d.]+ +[\d.]+", result.output)
    assert re.search(r"tritorch, forward: [\d.]+ times torch's speed, geom", result.output)

    written = json.loads(files["json"].read_text())
    assert written["schema"] == 1
    assert written["command"].startswith("tritorch bench softmax relu --dtype bfloat16")
    found = {(r["op"], r["pass"], r["implementation"]): r for r in written["rows"]}
    row = found["softmax", "backward", "tritorch"]
    assert row["verified"]
    assert row["speedup"] == pytest.approx(row["baseline_us"] / row["median_us"])
    assert sum(map(len, row["samples_us"])) >= 3
    assert row["host_us"] > 0
    assert ("relu", "both", "tritorch") not in found

    lines = list(csv.DictReader(files["csv"].read_text().splitlines()))
    (value,) = (
        float(line["value"])
        for line in lines
        if (line["op"], line["pass"], line["implementation"], line["metric"])
        == ("softmax", "backward", "tritorch", "median_us")
    )
    assert value == row["median_us"]
    assert "| softmax | images: input[2, 3, 4, 5] dim=1" in files["md"].read_text()
    page = files["html"].read_text()
    assert page.count("<svg") == 2
    assert "http" not in re.sub(r'xmlns\S*="[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.S)


@pytest.mark.parametrize(
    ("options", "recorded"),
    [((), "--device cpu --small"), (("--real",), "--device cpu --real")],
)
def test_the_command_that_is_recorded_repeats_the_run(theirs, tmp_path, options, recorded):
    path = tmp_path / "result.json"
    sizes = ("--sizes", "M=8,K=16,N=8", "--pass", "forward")
    bench(f"{theirs}:product", *sizes, *options, "--json", path, *QUICK)
    assert json.loads(path.read_text())["command"] == (
        f"tritorch bench {theirs}:product --dtype bfloat16 --seconds 0.01 --precision 0.01 "
        f"--seed 0 --sizes 'M=8,K=16,N=8' --pass forward {recorded}"
    )


def test_a_users_function_is_measured_beside_its_reference(theirs, tmp_path):
    path = tmp_path / "result.json"
    sizes = ("--sizes", "M=8,K=16; M=64,N=8,K=4")
    options = ("--dtype", "float32", "--json", path, *QUICK)
    # the letter that has no number gets one
    result = bench(f"{theirs}:product", *sizes, "--pass", "forward", *options)
    assert result.exit_code == 0, result.output
    ours = [r for r in json.loads(path.read_text())["rows"] if r["implementation"] == "product"]
    assert [row["arguments"] for row in ours] == [
        "a[8, 16] b[16, 2048]",
        "a[64, 4] b[4, 8]",
    ]
    assert all(row["verified"] and row["speedup"] for row in ours)


def test_a_wrong_function_has_no_speed_up_and_status_1(theirs):
    sizes = ("--sizes", "M=8,K=16,N=8")
    result = bench(f"{theirs}:wrong", *sizes, "--pass", "forward", "--dtype", "float32", *QUICK)
    assert result.exit_code == 1
    (line,) = (one for one in result.output.splitlines() if "FAILED" in one)
    assert re.search(r"forward +wrong +[\d.]+ +- .*FAILED output 0: C1", line)


def test_a_users_function_stands_beside_ours(theirs, tmp_path):
    file = tmp_path / "acts.py"
    file.write_text(
        "import torch\n"
        "def halves(input, inplace=False):\n    return (input.abs() + input) / 2\n"
        "def half(input, inplace=False):\n    return input / 2\n"
    )
    path = tmp_path / "result.json"
    beside = f"{file}:halves,{file}:half"
    options = ("--pass", "forward", "--dtype", "float32", "--json", path, *QUICK)
    result = bench("relu", "--vs", beside, *options)
    found = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert found.keys() == {"tritorch", "torch", "halves", "half"}
    assert found["halves"]["verified"]
    assert found["halves"]["speedup"]
    # a wrong function of the user's is his to mend
    assert not found["half"]["verified"]
    assert result.exit_code == 1


def acts(file, body, name="halves"):
    file.write_text(
        "INPUTS = 'input[M]'\n"
        "def reference(input):\n    return input / 2\n"
        f"def {name}(input, inplace=False):\n    return {body}\n"
    )
    return f"{file}:{name}"


def test_two_functions_of_one_name_are_told_apart(tmp_path):
    """And one that has a peer's name is not that peer, whose mistakes are not the user's."""
    one = acts(tmp_path / "one.py", "input.clamp(min=0)")
    two = acts(tmp_path / "two.py", "input / 2")
    peer = acts(tmp_path / "three.py", "input / 2", "attorch")
    path = tmp_path / "result.json"
    options = ("--pass", "forward", "--dtype", "float32", "--force", "--json", path, *QUICK)
    bench("relu", "--vs", f"{one},{two}", *options)
    found = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["verified"] for name, row in found.items()} == {
        "tritorch": True,
        "torch": True,
        one: True,
        two: False,
    }
    result = bench("relu", "--vs", peer, *options)
    found = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert found.keys() == {"tritorch", "torch", peer}
    assert result.exit_code == 1


def test_targets_of_one_name_and_one_that_is_called_torch_are_measured(tmp_path):
    right, wrong = (
        acts(tmp_path / f"{name}.py", body)
        for name, body in (("right", "input / 2"), ("wrong", "input"))
    )
    torchs = acts(tmp_path / "third.py", "input", "torch")
    path = tmp_path / "result.json"
    options = ("--sizes", "M=8", "--pass", "forward", "--dtype", "float32", "--json", path)
    assert bench(right, wrong, torchs, *options, *QUICK).exit_code == 1
    found = [
        (row["op"], row["implementation"], row["verified"])
        for row in json.loads(path.read_text())["rows"]
        if row.get("section") != "ceilings"
    ]
    assert found == [
        (right, right, True),
        (right, "torch", True),
        (wrong, wrong, False),
        (wrong, "torch", True),
        (torchs, torchs, False),
        (torchs, "torch", True),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("relu", "--vs", "{}:constant"), "is no function"),
        (("relu", "--vs", "{}:prodct"), "did you mean product?"),
        (("softmx",), "there is no op 'softmx'; did you mean softmax"),
        (("{}:constant",), "is no function"),
        (("{}:prodct",), "did you mean product?"),
        (("{}:product", "--sizes", "Q=3"), "--sizes: no letter Q in M, K, N"),
        (("{}:product", "--sizes", "M"), "--sizes: expects M=4096"),
        (("relu", "--sizes", "M=3"), "--sizes is of a function of yours, MODULE:FUNCTION"),
        (("--inputs", "input[M]"), "--inputs is of a function of yours"),
        (("relu", "softmax", "--reference", "{}:product"), "received relu, softmax"),
        (("relu", "--pass", "sideways"), "expects forward, backward, both, received sideways"),
        (("relu", "--vs", "cutlass"), "--vs: expects compile, peers, flag_gems"),
        (("relu", "--dtype", "int8"), "received int8"),
        (("sgd_step", "--pass", "backward"), "nothing to measure"),
        (("relu", "--precision", "2"), "is not a share"),
        (("relu", "--seconds", "nan"), "nan is not a finite number"),
        (("relu", "--seconds", "inf"), "inf is not a finite number"),
        (("relu", "--json", "{}"), "exists: name a new file, or add --force"),
        (("relu", "--md", "{}/x.md"), "is not a folder to write in"),
        (("compare", "{}", "{}"), "theirs.py: Expecting value"),
        (("show", "{}", "--md", "x.md"), "theirs.py: Expecting value"),
    ],
)
def test_a_wrong_call_is_status_2(theirs, arguments, said):
    result = bench(*(word.format(theirs) for word in arguments))
    assert said in result.output
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "cuda"), "torch finds no GPU"),
        (("--vs", "attorch"), "attorch is not installed here"),
    ],
)
def test_what_is_missing_is_status_3(monkeypatch, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench("relu", *arguments)
    assert (result.exit_code, said in result.output) == (3, True), result.output


def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path):
    measured = rows.Bench.rows

    def interrupted(self, case, which, slots):
        if which == "backward":
            raise KeyboardInterrupt
        return measured(self, case, which, slots)

    monkeypatch.setattr(rows.Bench, "rows", interrupted)
    path = tmp_path / "result.json"
    result = bench("relu", "--json", path, *QUICK)
    assert result.exit_code == 130
    assert "interrupted: what was measured is kept" in result.output
    assert {row["pass"] for row in json.loads(path.read_text())["rows"]} == {"forward"}


def test_an_error_of_the_gpu_keeps_what_was_measured(monkeypatch, tmp_path):
    measured = rows.Bench.rows

    def fails(self, case, which, slots):
        if which == "backward":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return measured(self, case, which, slots)

    monkeypatch.setattr(rows.Bench, "rows", fails)
    files = [tmp_path / "result.json", tmp_path / "result.md"]
    result = bench("relu", "softmax", "--json", files[0], "--md", files[1], *QUICK)
    said = "not measured: the rest: AcceleratorError: CUDA error: an illegal memory access"
    assert said in result.output
    assert result.exit_code == 3
    written = json.loads(files[0].read_text())
    assert {row["pass"] for row in written["rows"]} == {"forward"}
    assert {row["implementation"] for row in written["rows"]} == {"tritorch", "torch"}
    assert written["problems"][0].startswith(said)
    assert "| relu | " in files[1].read_text()


def test_an_error_that_is_not_the_gpu_s_is_raised(monkeypatch, tmp_path):
    def fails(*arguments):
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(ceilings, "measure", fails)
    result = bench("relu", "--json", tmp_path / "result.json", *QUICK)
    assert repr(result.exception) == "RuntimeError('expected scalar type Float')"


def test_a_full_disk_is_told_and_leaves_the_last_file(monkeypatch, tmp_path):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tritorch.bench.store.write_whole", full)
    result = bench("relu", "--json", tmp_path / "result.json", *QUICK)
    assert result.exit_code == 3
    assert "could not be written: [Errno 28] No space left on device" in result.output


def test_a_case_that_raises_leaves_the_others(monkeypatch, tmp_path):
    slots = rows.Bench.slots

    def fails(self, case):
        if case.op == "relu":
            raise torch.OutOfMemoryError("too large")
        return slots(self, case)

    monkeypatch.setattr(rows.Bench, "slots", fails)
    result = bench("relu", "softmax", "--pass", "forward", *QUICK)
    assert result.exit_code == 1
    assert "not measured: relu images: out of memory with input[2, 3, 5, 7]" in result.output
    assert re.search(r"softmax +images +forward +tritorch", result.output)


def result_file(path, factor, gpu="GPU 1", **more):
    shape = {"op": "relu", "name": "", "dtype": "float32", "layout": "contiguous"}
    row = {
        **shape,
        "shape": [8],
        "pass": "forward",
        "implementation": "tritorch",
        "median_us": 10.0 * factor,
        "samples_us": [[(10 + 0.01 * i) * factor for i in range(10)] for _ in range(6)],
        "verified": True,
        **more,
    }
    environment = {"gpu": gpu, "torch": f"2.{factor}"}
    path.write_text(json.dumps({"schema": 1, "rows": [row], "environment": environment}))
    return path


def test_compare_says_who_is_slower(tmp_path):
    old, new = result_file(tmp_path / "old", 1), result_file(tmp_path / "new", 1.2)
    result = bench("compare", old, new)
    assert result.exit_code == 0
    assert "torch: 2.1 -> 2.1.2" in result.output
    assert re.search(r"SLOWER +relu .*10 -> 12 us +\+20.0 % \[\+1", result.output)
    assert "0 FASTER, 1 SLOWER, 0 SAME" in result.output
    assert bench("compare", old, new, "--fail-on-slower").exit_code == 1
    assert bench("compare", new, old, "--fail-on-slower").exit_code == 0
    assert "1 SAME" in bench("compare", old, new, "--threshold", "30%").output


@pytest.mark.parametrize("name", ["", "ceiling"])
def test_a_slower_torch_is_told_and_fails_nothing(tmp_path, name):
    of_torch = {"implementation": "torch", "name": name}
    old, new = (result_file(tmp_path / str(us), us, **of_torch) for us in (1, 1.2))
    result = bench("compare", old, new, "--fail-on-slower")
    assert "torch, which is the control: geometric mean +20.0 %" in result.output
    assert "0 SLOWER, 0 SAME, 0 UNSURE, 0 WRONG; there is nothing to compare" in result.output
    assert result.exit_code == 0


def test_a_kernel_that_now_raises_fails_the_comparison(tmp_path):
    old, new = result_file(tmp_path / "old", 1), result_file(tmp_path / "new", 1)
    content = json.loads(new.read_text())
    content["rows"][0] |= {"median_us": None, "verified": False, "failure": "raises ValueError"}
    del content["rows"][0]["samples_us"]
    new.write_text(json.dumps(content))
    result = bench("compare", old, new, "--fail-on-slower")
    assert re.search(r"WRONG +relu .*10 -> - us +new: raises ValueError", result.output)
    assert "1 WRONG; there is nothing to compare" in result.output
    assert result.exit_code == 1


def test_results_of_two_gpus_are_compared_and_decide_nothing(tmp_path):
    old, new = (result_file(tmp_path / gpu, 1, gpu) for gpu in ("H100", "H200"))
    result = bench("compare", old, new)
    assert (result.exit_code, "gpu: H100 -> H200" in result.output) == (0, True)
    result = bench("compare", old, new, "--fail-on-slower")
    assert result.exit_code == 2
    assert f"Error: --fail-on-slower: {old} is of H100, {new} of H200\n" == result.output


def test_show_makes_a_page_of_an_old_result(tmp_path):
    page = tmp_path / "page.html"
    assert bench("show", result_file(tmp_path / "old", 1), "--html", page).exit_code == 0
    assert "GPU 1" in page.read_text()
    assert "say what to make" in bench("show", tmp_path / "old").output


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_is_written_once_and_never_over_its_source(tmp_path, force):
    path = tmp_path / "a"
    same = tmp_path / "b" / ".." / "a"
    result = bench("relu", "--json", path, "--csv", same, *QUICK, *force)
    assert result.exit_code == 2
    assert f"--csv {same} is --json: name another file" in result.output
    assert not path.exists()
    before = result_file(path, 1).read_text()
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        result = bench("show", path, "--md", name, *force)
        assert result.exit_code == 2
        assert f"--md {name} is the result itself: name another file" in result.output
    assert path.read_text() == before


def test_help_tells_of_options_and_of_compare():
    text = bench("--help").output
    assert "--sizes" in text
    assert "tritorch bench compare OLD NEW" in text
