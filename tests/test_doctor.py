"""`tritorch doctor` answers whatever happens."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

import tritorch
from tritorch import doctor
from tritorch.cli import main

pytestmark = pytest.mark.reference


def invoke(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_this_machine_is_looked_at():
    result = invoke("--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    states = {answer["name"]: answer["state"] for answer in found["answers"]}
    assert states["torch"] == states["interpreter"] == states["compile"] == "ok", found
    assert {"convert", "train", "check", "inspect"} <= set(found["works"])
    assert found["next"]


@pytest.mark.parametrize(
    ("torch", "triton", "numpy", "wanted", "states"),
    [
        ("2.13.0", "3.6.0", "2.3.5", None, []),
        ("2.13.0", "3.6.0", "2.4.0", None, ["warn"]),
        ("2.13.0", "3.9.0", "2.4.0", None, []),
        ("2.13.0", "3.6.0", "2.3.5", "3.7.1", ["warn"]),
        ("2.13.0", "3.5.1", "2.4.0", "3.7.1", ["fail", "warn", "warn"]),
        ("2.13.0", None, "2.4.0", "3.7.1", []),
    ],
)
def test_pairs_that_do_not_go_together(torch, triton, numpy, wanted, states):
    answers = list(doctor.pairs(torch, triton, numpy, wanted))
    assert [answer.state for answer in answers] == states
    assert all(answer.advice for answer in answers)


def broken():
    raise OSError("the disk is on fire")
    yield


def answering(state, advice=""):
    return lambda: iter([doctor.Answer("thing", state, "as it is", advice)])


def test_a_question_that_raises_is_an_answer(monkeypatch):
    questions = (("disk", broken), ("thing", answering("ok")))
    monkeypatch.setattr(doctor, "_QUESTIONS", questions)
    result = invoke()
    assert result.exit_code == 0
    assert "[fail]" in result.output
    assert "the disk is on fire" in result.output
    # the next one is asked all the same
    assert "as it is" in result.output
    assert invoke("--strict").exit_code == 1


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("none", 0), ("warn", 1), ("fail", 1)])
def test_strict(state, status, monkeypatch):
    monkeypatch.setattr(doctor, "_QUESTIONS", (("thing", answering(state, "do this")),))
    assert invoke("--strict").exit_code == status
    result = invoke()
    assert result.exit_code == 0
    assert ("next: do this" in result.output) == (state in ("warn", "fail"))


def test_a_process_that_dies_is_an_answer(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "_QUESTIONS",
        (
            (
                "gpu",
                lambda: doctor._asked("no such"),
            ),
        ),
    )
    result = invoke()
    assert result.exit_code == 0
    assert "could not be found out: RuntimeError: KeyError: 'no such'" in result.output


def test_caches_that_cannot_be_written(monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(file / "cache"))
    (answer,) = [one for one in doctor.caches() if one.name == "triton cache"]
    assert answer.state == "warn"
    assert "TRITON_CACHE_DIR" in answer.advice


def test_interpreting_is_pointed_out(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (answer,) = doctor.settings()
    assert answer.state == "warn"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    (answer,) = doctor.settings()
    assert answer.state == "ok"


def test_probes_ask_the_tritorch_that_asks(monkeypatch):
    """Whatever else is installed, and wherever the command runs."""
    found = []

    def run(command, env, **_):
        found.append(Path(env["PYTHONPATH"].split(os.pathsep)[0]))
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(subprocess, "run", run)
    doctor._asked("anything")
    assert found[0] / "tritorch" == Path(tritorch.__file__).resolve().parent
