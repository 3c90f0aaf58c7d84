"""What a compiler wrote to standard error: that it is read, and what of it a message has."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from tritorch.testing import diagnostics, supervise

pytestmark = pytest.mark.reference


@contextlib.contextmanager
def standard_error(descriptor):
    """Standard error goes there."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_what_others_write_is_read_and_stays(tmp_path):
    other = [sys.executable, "-c", "import os; os.write(2, b'meanwhile\\n')"]
    with (tmp_path / "said").open("wb") as file, standard_error(file.fileno()):
        os.write(2, b"before\n")
        position = diagnostics.end()
        subprocess.run(other, check=True)
        first = diagnostics.since(position)
        os.write(2, b"after\n")
        second = diagnostics.since(position)
    assert (first, second) == ("meanwhile\n", "meanwhile\nafter\n")
    assert (tmp_path / "said").read_bytes() == b"before\nmeanwhile\nafter\n"


def test_what_has_been_shown_elsewhere_is_not_read():
    read, write = os.pipe()
    with standard_error(write):
        position = diagnostics.end()
        os.write(2, b"shown\n")
        said = diagnostics.since(position)
    assert said == ""
    assert os.read(read, 10) == b"shown\n"
    for end in (read, write):
        os.close(end)


def told(said, text="PassManager::run failed"):
    message, place = diagnostics.told(text, said)
    assert place is None
    return message


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("LLVM ERROR: Unsupported DotScaleOp\n#blocked = ...\n", "Unsupported DotScaleOp"),
        (
            "error: invalid instruction\n\tbogus s4;\n\t^\nld.lld: error: no input\n",
            "invalid instruction: bogus s4; no input",
        ),
        ("<unknown>:0: error: a\nassembler:4:2: error: b\n  mov s4\n  ^\n", "a; b: mov s4"),
        # of many, and of a long one, the beginning; each once
        ("".join(f"error: {n}\n" for n in (1, 1, 2, 3, 4)), "1; 2; 3"),
        (f"error: {'x' * 1000}\n", "x" * 200),
    ],
    ids=["llvm", "assembler", "located elsewhere", "many", "long"],
)
def test_a_message_has_what_is_relevant(said, message):
    assert told(said) == f"the compiler says: {message}"


def test_what_ptxas_says_is_in_the_exception():
    text = "`ptxas` stderr:\nptxas /x.ptx, line 39; error   : Not a name: 'bogus'\nptxas fatal : no"
    assert told("", text) == "the compiler says: Not a name: 'bogus'"


def test_a_diagnostic_names_the_users_line(tmp_path):
    file = tmp_path / "kernel.py"
    summary = "Failures have been detected while processing an MLIR pass pipeline"
    said = (
        f"{file}:7:45: error: 128 must be a multiple of 3\n    y = x\n    ^\n"
        f"{file}:7:45: note: see current operation: %1\n{file}:4:0: error: {summary}\n"
    )
    assert told(said) == "the compiler says: 128 must be a multiple of 3: y = x"
    file.touch()
    message, place = diagnostics.told("error encountered during parsing", said)
    assert message == "the compiler says: 128 must be a multiple of 3"
    assert place == (str(file), 7)


def test_where_nothing_is_known_the_error_itself_is_shown():
    assert told("", "no such arch\n") == "no such arch"
    assert told("warning: slow\n").endswith("what it says is on standard error")


def test_a_compiler_that_ends_the_process_has_its_say(tmp_path):
    said = tmp_path / "said"
    said.write_text(
        "LLVM ERROR: Cannot select: intrinsic %llvm.nvvm.x\nStack dump:\n0. Running pass"
    )
    doing = {"property": "GPU limits", "case": "N=256, float32"}
    found = supervise._crashed(-signal.SIGABRT, doing, tmp_path / "trace", said)
    assert found.message == (
        "the process died of SIGABRT in GPU limits of N=256, float32: "
        "the compiler says: Cannot select: intrinsic %llvm.nvvm.x"
    )
    said.write_text("")
    silent = supervise._crashed(-signal.SIGABRT, doing, tmp_path / "trace", said)
    assert silent.message == "the process died of SIGABRT in GPU limits of N=256, float32"
