"""The suite as a section of `make gpu`: stopped at its limit, and gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tritorch.bench import suite

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parent.parent


def outcome_of(file, *options):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_names.py",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "--json", str(file), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        # of a checkout that nobody edits
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        | {"GIT_DIR": os.devnull, "TRITORCH_COMMIT": "1" * 40},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_run_goes_on_with_what_has_not_passed(options, tmp_path):
    file = tmp_path / "tests.json"
    assert outcome_of(file)[0] == 0
    whole = json.loads(file.read_text())
    names = {row["test"] for row in whole["rows"]}
    count = len(names)
    assert count > 3
    # as if one had failed, and the run had been stopped before another
    stopped = json.loads(file.read_text())
    del stopped["rows"][0]
    stopped["rows"][0]["outcome"] = "failed"
    # and the teardown of a third, which is a row of its own
    stopped["rows"].append({**stopped["rows"][1], "outcome": "failed"})
    stopped["exit_status"] = None
    file.write_text(json.dumps(stopped))
    status, said = outcome_of(file, "--go-on", *options)
    # xdist does not count what its workers left out
    left_out = "3 passed in" if options else f"3 passed, {count - 3} deselected"
    assert (status, left_out in said) == (0, True), said
    again = json.loads(file.read_text())
    assert {row["test"] for row in again["rows"]} == names
    assert len(again["rows"]) == count
    assert again["counts"] == {"passed": count, "failed": 0, "skipped": 0}
    assert again["exit_status"] == 0
    # what had passed is as it was
    assert stopped["rows"][2] in again["rows"]
    # and a run that finds nothing left is whole
    again["exit_status"] = None
    file.write_text(json.dumps(again))
    assert outcome_of(file, "--go-on", *options)[0] == 0
    assert suite.is_whole(file)


def test_a_run_does_not_go_on_with_that_of_another_commit(tmp_path):
    file = tmp_path / "tests.json"
    assert outcome_of(file)[0] == 0
    other = json.loads(file.read_text())
    other["environment"]["commit"] = "0" * 40
    file.write_text(json.dumps(other))
    status, said = outcome_of(file, "--go-on")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert f"is of commit {'0' * 40}, this is" in said
    assert json.loads(file.read_text()) == other
    for content in ("", "{}", "[]"):
        file.write_text(content)
        status, said = outcome_of(file, "--go-on")
        assert (status, "holds no result" in said) == (pytest.ExitCode.USAGE_ERROR, True)
    edited = {**other, "environment": {**other["environment"], "commit": "1" * 40, "dirty": True}}
    file.write_text(json.dumps(edited))
    assert "nobody knows" in outcome_of(file, "--go-on")[1]
    file.write_text(json.dumps(other))
    # and without it a result is never replaced
    assert outcome_of(file)[0] != 0
    assert json.loads(file.read_text()) == other


def stands_in(monkeypatch, tmp_path, text):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    monkeypatch.setattr(suite.sys, "executable", str(program))


def test_it_is_stopped_at_its_limit_and_writes_what_it_has(monkeypatch, tmp_path, capsys):
    # its last argument is the file
    script = (
        'for file; do :; done; trap "echo kept > $file; exit 2" INT; while :; do sleep 0.1; done'
    )
    stands_in(monkeypatch, tmp_path, script)
    suite.run(tmp_path, 1.0)
    assert (tmp_path / "tests.json").read_text() == "kept\n"
    assert "stopped after 1 s, before its end" in capsys.readouterr().out


def test_what_does_not_stop_is_killed(monkeypatch, tmp_path):
    stands_in(monkeypatch, tmp_path, 'trap "" INT; sleep 600 & echo $! > here; wait; sleep 600')
    monkeypatch.setattr(suite, "_ROOT", tmp_path)
    monkeypatch.setattr(suite, "_GRACE", 0.5)
    suite.run(tmp_path, 1.0)
    # with what it had started
    child = Path(f"/proc/{(tmp_path / 'here').read_text().strip()}/status")
    for _ in range(50):
        if not lives(child):
            break
        time.sleep(0.1)
    assert not lives(child)


def lives(status):
    try:
        return "zombie" not in status.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_whole_run_is_not_repeated(monkeypatch, tmp_path, capsys):
    stands_in(monkeypatch, tmp_path, "echo ran > here; exit 1")
    monkeypatch.setattr(suite, "_ROOT", tmp_path)
    file = tmp_path / "tests.json"
    for content in ("", "{}", '{"exit_status": null}', '{"exit_status": 2}', "[]"):
        file.write_text(content)
        suite.run(tmp_path, 5.0)
        assert "exit status 1" in capsys.readouterr().out
        (tmp_path / "here").unlink()
    file.write_text('{"exit_status": 1}')
    suite.run(tmp_path, 5.0)
    assert "is of a whole run" in capsys.readouterr().out
    assert not (tmp_path / "here").exists()
