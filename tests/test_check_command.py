"""`tritorch check`: what it says, its exit status, and what becomes of its processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import tritorch
from tests import checked
from tests.checks import CHECKED, ROOT, SHORT, call, line_of, run
from tritorch.cli import main

pytestmark = pytest.mark.compile


@pytest.fixture
def descendants(monkeypatch):
    """Gives the processes that were started since, and whatever they started."""
    mark = f"mark-{uuid.uuid4()}"
    monkeypatch.setenv("TRITORCH_TEST_MARK", mark)

    def living():
        found = []
        for process in Path("/proc").iterdir():
            try:
                if mark.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                # no process, or one that has ended
                continue
        return found

    return living


def left_of(descendants):
    """Those that live a while after they should have been ended."""
    until = time.monotonic() + 5
    while descendants() and time.monotonic() < until:
        time.sleep(0.05)
    return descendants()


def test_a_finding_is_status_1_and_its_script_shows_it_again(tmp_path):
    file, scripts = tmp_path / "report.json", tmp_path / "scripts"
    options = ("--json", str(file), "--repro", str(scripts))
    result = call("unmasked", *SHORT, *options)
    assert result.exit_code == 1, result.output
    report = json.loads(file.read_text())
    (finding,) = [found for row in report["rows"] for found in row["findings"]]
    line = line_of("without a mask")
    assert (finding["kind"], finding["line"]) == ("out-of-bounds read", line)
    assert f"1. out-of-bounds read  {CHECKED}:{line}, kernel unmasked_kernel" in result.output
    assert report["kind"] == "check"
    assert not any("guessed" in note for note in report["notes"])
    (script,) = scripts.iterdir()
    assert report["reproductions"] == [str(script)]
    assert f"reproduce: python {script}" in result.output
    # anywhere, and with the smallest size
    again = run(script, cwd="/")
    assert again.returncode == 1, again.stderr
    assert f"1. out-of-bounds read  {CHECKED}:{line}, kernel unmasked_kernel" in again.stdout
    assert "'case': {'sample': 'N=1', 'dtype': 'float32'}" in script.read_text()
    before = file.read_text()
    refused = call("unmasked", *SHORT, "--json", str(file))
    assert (refused.exit_code, "--force" in refused.output) == (2, True)
    assert file.read_text() == before


def test_nothing_found_is_status_0_and_stdout_is_json_alone():
    clean = call("talkative", *SHORT, "--json", "-")
    assert clean.exit_code == 0, clean.output
    report = json.loads(clean.stdout)
    assert "nothing found in" in clean.stderr
    assert sum(len(row["findings"]) for row in report["rows"]) == 0
    assert report["cases"] > 10


def test_one_case_runs_alone(tmp_path):
    file = tmp_path / "report.json"
    call("thrice", *SHORT, "--json", str(file))
    first = json.loads(file.read_text())
    found = next(found for row in first["rows"] for found in row["findings"])
    again = call("thrice", *SHORT, "--case", found["id"])
    assert again.exit_code == 1
    assert f"found by case {found['id']}" in again.output
    assert found["message"] in again.output
    assert re.search(r"^\d findings? in 1 case, ", again.output, re.MULTILINE)
    assert first["cases"] > 5


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("double", ("--dtypes", "float33"), "unknown dtype 'float33'"),
        ("double", ("--arch", "sm_81"), "--arch: expects sm_80,"),
        ("double", ("--level", "slow"), "--level"),
        ("double", ("--timeout", "inf"), "inf is not a finite number"),
        ("double", ("--json", f"{CHECKED}/report.json"), "is not a folder to write in"),
        ("double", ("--repro", f"{CHECKED}/scripts"), "is not a folder to write in"),
        ("doubel", SHORT, f"{CHECKED} has no 'doubel'; did you mean double"),
        ("double", (*SHORT, "--case", "none"), "no case has the id 'none'"),
        ("double", ("--inputs", ""), "--inputs is empty"),
        ("double", ("--reference", " "), "--reference is empty"),
        ("double_kernel", SHORT, "checked.py:double_kernel is a kernel: name the Python function"),
        ("tuned_kernel", SHORT, "checked.py:tuned_kernel is a kernel: name the Python function"),
    ],
)
def test_a_wrong_call_is_status_2(name, options, said):
    result = call(name, *options)
    assert (result.exit_code, said in result.output) == (2, True), result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["nothing", "module:", "no.such.module:function"])
def test_a_name_that_is_not_there_is_status_2(name):
    result = CliRunner().invoke(main, ("check", name, "--arch", ""))
    assert (result.exit_code, "Error: " in result.output) == (2, True), result.output


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("raises_value_error", SHORT, "ValueError: not this one"),
        ("double", (*SHORT[2:], "--inputs", f"{CHECKED}:samples_that_raise"), "no sample today"),
        (
            "double",
            ("--arch", "", "--inputs", f"{CHECKED}:samples_that_raise_later"),
            "ValueError: no half today",
        ),
    ],
)
def test_a_value_error_of_the_users_code_is_status_1(name, options, said):
    result = call(name, *options)
    assert (result.exit_code, said in result.output) == (1, True), result.output
    assert f"error  {CHECKED}:{line_of(said.partition(': ')[2] or said)}" in result.output


def test_a_mistake_of_the_checks_is_status_3_with_its_traceback():
    result = call("fails_inside", *SHORT, "--gradients", "")
    assert result.exit_code == 3, result.output
    assert "the check itself failed, which is no finding: " in result.output
    assert "TypeError: 'NoneType' object is not callable" in result.output
    assert "\n1. " not in result.output


def test_a_missing_gpu_is_status_3(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("double", "--device", "cuda")
    assert (result.exit_code, "no GPU" in result.output) == (3, True)


@pytest.mark.parametrize(
    ("name", "said", "place"),
    [
        ("dereferences_null", "died of SIGSEGV in first call of N=5, float32", "nowhere"),
        ("aborts", "died of SIGABRT", "SIGABRT"),
        ("exits", "ended itself with exit status 3", None),
        ("leaves", "SystemExit: 7", "no Exception"),
    ],
)
def test_a_call_that_ends_its_process_is_a_finding(
    name, said, place, descendants, monkeypatch, tmp_path
):
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    result = call(name, *SHORT)
    assert result.exit_code == 1, result.output
    assert said in result.output
    assert "N=5, float32" in result.output or "N=18, float32" in result.output
    if place is not None:
        assert f"{CHECKED}:{line_of(place)}" in result.output
    assert not left_of(descendants)


def test_a_crash_before_the_first_case_says_where(tmp_path):
    result = call("double", *SHORT, "--reference", f"{CHECKED}:null_reference")
    assert result.exit_code == 1, result.output
    assert f"1. crash  {CHECKED}:{line_of('of address 0')}" in result.output
    said = "the process died of SIGSEGV in first calls of the reference of N=5, float32\n"
    assert said in result.output
    script = tmp_path / "dies.py"
    script.write_text("import os\nos.abort()\n")
    result = CliRunner().invoke(main, ("check", f"{script}:mine", "--arch", ""))
    assert f"1. crash  {script}:2\n" in result.output
    assert f"the process died of SIGABRT in import of {script}:mine\n" in result.output
    assert re.search(r"^  cases  not run: the check ended before$", result.output, re.MULTILINE)


def test_the_ids_of_cases_are_their_own():
    from tritorch.testing import requests, steps, supervise

    heard = {}
    for level in ("quick", "full"):
        request = requests.Request(
            f"{CHECKED}:double",
            inputs="x[N]",
            level=level,
            targets=(),
            dtypes=("float32",),
            gradients=(),
        )
        events = []
        supervise.run("interpret", request.to_json(), timeout=60, on_event=events.append)
        done = [event for event in events if event["event"] == "doing" and "id" in event]
        ids = [event["id"] for event in done]
        assert len(set(ids)) == len(ids) > 30
        assert all(re.fullmatch("[a-z2-7]{12}", one) for one in ids)
        assert [steps.id_of(event["step"]) for event in done] == ids
        # one case may be tried for several properties
        assert len({event["case"] for event in done}) < len(ids)
        heard[level] = set(ids)
    assert heard["quick"] & heard["full"]


@pytest.mark.parametrize("name", ["loops", "spins"])
def test_a_call_that_does_not_end_is_a_finding(name, descendants, monkeypatch, tmp_path):
    monkeypatch.setenv("CALLED", str(tmp_path / "called"))
    begin = time.monotonic()
    result = call(name, *SHORT, "--timeout", "3", "--repro", str(tmp_path / "scripts"))
    assert time.monotonic() - begin < 60
    assert result.exit_code == 1, result.output
    lines = Path(CHECKED).read_text().splitlines()
    at = re.search(rf"1\. hang  {CHECKED}:(\d+)", result.output)
    # the loop, or what it was at when it was asked
    inside = ("# for ever", "pass", "count = count * 1")
    assert lines[int(at[1]) - 1].endswith(inside)
    assert "N=5, float32 did not end in 3 s" in result.output
    (script,) = (tmp_path / "scripts").iterdir()
    assert "timeout=3.0" in script.read_text()
    assert "'case': {'sample': 'N=5', 'dtype': 'float32'}" in script.read_text()
    assert not left_of(descendants)


def test_what_a_hang_has_left_undone_is_told(tmp_path):
    file = tmp_path / "report.json"
    result = call("loops_over_one", *SHORT, "--timeout", "3", "--json", str(file))
    assert result.exit_code == 1, result.output
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    begun, ended = rows["layouts"]["cases"], ", the check ended before the others"
    assert begun > 1
    assert f"  layouts         pass  {begun} cases{ended}\n" in result.output
    assert "  offsets         not run: the check ended before\n" in result.output
    whole = [rows[name] for name in ("repeated calls", "exact integers", "rounding")]
    watched = begun + sum(row["cases"] for row in whole)
    assert f"  memory          pass  {watched} cases{ended}\n" in result.output
    unfinished = {name for name, row in rows.items() if row["unfinished"]}
    assert unfinished >= {"layouts", "masked lanes", "offsets", "torch.library", "memory"}
    assert not unfinished & {"hang", *(row["name"] for row in whole)}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_whoever_ends_it_ends_its_processes(sent, descendants, monkeypatch, tmp_path):
    called = tmp_path / "called"
    monkeypatch.setenv("CALLED", str(called))
    command = [sys.executable, "-m", "tritorch", "check", f"{CHECKED}:loops", "--inputs", "x[N]"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        # tests that run in the background of a shell ignore it, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as check:
        until = time.monotonic() + 60
        while not called.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert any("worker interpret" in line for line in descendants())
        assert "sleep 600 " in descendants()
        check.send_signal(sent)
        said = check.communicate(timeout=20)[1].decode()
    assert check.returncode != 0
    assert "Traceback" not in said
    assert not left_of(descendants)


def test_what_a_module_does_when_it_is_imported_is_its_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, sys, warnings\n"
        "import torch\n"
        "from tests.checked import double, reference\n"
        "print('imported')\n"
        "torch.set_default_dtype(torch.float64)\n"
        "torch.set_grad_enabled(False)\n"
        "torch.manual_seed(0)\n"
        "os.environ['TRITON_INTERPRET'] = '0'\n"
        "os.chdir('/')\n"
        "warnings.simplefilter('error')\n"
        "sys.stdout = open(os.devnull, 'w')\n"
    )
    done = run("-m", "tritorch", "check", "mine:double", *SHORT, "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["target"] == "mine:double"


def test_a_function_that_only_this_process_knows_is_refused():
    def mine(x):
        return checked.double(x)

    with pytest.raises(RuntimeError, match=r"the function cannot be imported .* TRITON_INTERPRET"):
        tritorch.check(mine, checked.reference, "x[N]")
    with pytest.raises(RuntimeError, match="the reference cannot be imported"):
        tritorch.check(checked.double, lambda x: 2 * x, "x[N]")
    with pytest.raises(RuntimeError, match="the samples cannot be imported"):
        tritorch.check(checked.double, checked.reference, [{"x": torch.ones(3)}])


def test_an_op_of_tritorchs_own_is_clean():
    result = CliRunner().invoke(main, ("check", "relu"))
    assert result.exit_code == 0, result.output
    assert result.output.startswith("relu against torch.relu, level quick")
