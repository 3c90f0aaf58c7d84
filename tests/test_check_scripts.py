"""Scripts that `tritorch check` writes for its findings, and scripts that call it themselves."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from tests.checks import call, run
from tritorch.cli import main

pytestmark = pytest.mark.compile


def scripts_of(folder, name, *options):
    """The text of each script that a check of tests/checked.py writes, by the script."""
    call(name, "--inputs", "x[N]", "--arch", "", *options, "--repro", str(folder))
    return {script: script.read_text() for script in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("drops_nan", ("--dtypes", "float32"), "'special': ['x', 'nan']"),
        ("tuned", ("--dtypes", "float32"), "'given': [1, 'the case']"),
        ("tuned", ("--dtypes", "float32"), "'BLOCK: 32, num_warps: 4, "),
        ("thrice", ("--dtypes", "bfloat16,float32"), "'dtype': 'bfloat16'"),
        ("exits", ("--dtypes", "float32"), "'section': 'first call'"),
    ],
)
def test_a_script_makes_the_one_case_of_its_finding(name, options, words, tmp_path):
    scripts = scripts_of(tmp_path / "scripts", name, *options)
    script = next(script for script, text in scripts.items() if words in text)
    again = run(script, cwd="/")
    assert again.returncode == 1, again.stdout + again.stderr
    assert re.search(r"^\d findings? in 1 case, ", again.stdout, re.MULTILINE), again.stdout
    message = scripts[script].splitlines()[2]
    assert f"   {message}\n" in again.stdout


def test_what_takes_other_cases_to_show_gets_no_script_that_does_not(tmp_path):
    options = ("--inputs", "x[N]", "--arch", "", "--dtypes", "float32", "--repro", str(tmp_path))
    result = call("stale", *options)
    assert result.exit_code == 1
    written = re.findall(r"^reproduce: python (.+)$", result.output, re.MULTILINE)
    assert sorted(written) == sorted(map(str, tmp_path.iterdir()))
    assert [run(script, cwd="/").returncode for script in written] == [1] * len(written)
    said = r"^no script for the \w+ in N=\d+, float32.*: its case alone, in a process of its own, "
    assert re.search(said, result.output, re.MULTILINE), result.output


def test_a_script_tells_a_finding_that_is_gone_from_another(tmp_path):
    mine, folder = tmp_path / "mine.py", tmp_path / "scripts"
    source = "from tests.checked import double, reference\n\n\ndef mine(x):\n    return {}\n"
    mine.write_text(source.format("double(x) * 1.5"))
    options = ("--inputs", "x[N]", "--arch", "", "--dtypes", "float32", "--repro", str(folder))
    CliRunner().invoke(main, ("check", f"{mine}:mine", *options))
    (script,) = folder.glob("*exactness*")
    ends = []
    for result in ("double(x) * 1.5", "double(x)", "double(x), x"):
        mine.write_text(source.format(result))
        ends.append(run(script, cwd="/").returncode)
    assert ends == [1, 0, 2]


SCRIPT = """
import sys
import torch, tritorch
from tests import checked

def mine(x):
    return checked.double(x)

def plain(x):
    return x + x

{guard}
    report = tritorch.check(mine, plain, "x[N]", dtypes=[torch.float32])
    print(report)
    sys.exit(0 if report.ok else 1)
"""


def test_a_script_checks_functions_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard='if __name__ == "__main__":'))
    done = run(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{script}:mine against {script}:plain, level quick")
    assert re.search(r"GPU limits +pass  1 case\b", done.stdout)


def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(guard="if True:"))
    done = run(script, cwd=tmp_path)
    assert done.returncode == 1
    assert 'put the call below `if __name__ == "__main__":`' in done.stderr
