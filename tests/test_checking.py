"""`tritorch.check` in a process that interprets kernels: what it takes, says and leaves behind."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from tests import checked
from tests.checks import ROOT, check, kinds
from tritorch.registry import Sample
from tritorch.testing import input_sizes, inputs, supervise

pytestmark = pytest.mark.interpret


def without_seconds(report):
    text = re.sub(r"\d+\.\d s", "", str(report))
    fields = report.to_json() | {"seconds": 0}
    fields["sections"] = [section | {"seconds": 0} for section in fields["sections"]]
    return text, fields


def test_what_is_right_passes_and_says_what_was_assumed():
    report = check()
    assert report.ok
    assert report.findings == []
    assert report.cases > 20
    assert report.notes[0] == "rounding is judged as sums of products"
    assert str(report).splitlines()[-1].startswith(f"nothing found in {report.cases} cases, ")
    assert (report.target, report.reference) == ("tests.checked:double", "tests.checked:reference")


def test_what_is_wrong_is_found_on_its_line_with_the_smallest_size():
    report = check(checked.unmasked)
    (finding,) = report.findings
    assert not report.ok
    assert (finding.kind, finding.kernel) == ("out-of-bounds read", "unmasked_kernel")
    assert finding.file == checked.__file__
    assert finding.source.strip() == "x = tl.load(x_ptr + offs)"
    assert finding.argument == "x_ptr"
    assert finding.case == "N=1, float32"
    assert kinds(check(checked.thrice)) == {"exactness", "values"}


def test_the_same_seed_gives_the_same_report_in_one_process():
    first, second, other = (check(checked.thrice, seed=seed) for seed in (1, 1, 2))
    assert without_seconds(first) == without_seconds(second)
    assert without_seconds(first) != without_seconds(other)


def test_a_loop_has_a_third_turn_and_no_more_programs_for_it():
    heard = []
    options = {"samples": "x[M, N]", "on_event": heard.append}
    report = check(checked.forgets, checked.rows_reference, **options)
    assert kinds(report) == {"exactness"}
    assert {finding.case for finding in report.findings} == {"M=1 N=33, float32, integers"}
    tried = {event["case"] for event in heard if event["event"] == "doing"}
    assert "M=5 N=33, float32, integers" in tried
    assert not any(case.startswith("M=33 ") for case in tried)
    # which nobody knows before
    (plan,) = (event["cases"] for event in heard if event["event"] == "plan")
    ran = [event["section"] for event in heard if event["event"] == "outcome"]
    assert plan["exact integers"] == ran.count("exact integers") - 1
    (name,) = report.ids.values()
    again = check(checked.forgets, checked.rows_reference, samples="x[M, N]", case=name)
    assert kinds(again) == {"exactness"}


def test_an_index_is_that_of_the_number_which_the_reference_takes():
    (finding,) = check(checked.highest, checked.highest_reference, non_finite=()).findings
    assert (finding.kind, finding.argument) == ("values", "output 1")
    assert finding.message.startswith("among equal numbers, output 1: C0 exact: ")
    assert finding.case.endswith(", float32, integers")


def test_an_index_that_is_the_references_is_right():
    def first(x):
        return checked.highest(x)[0], x.argmax()

    assert check(first, checked.highest_reference, non_finite=()).ok


@pytest.mark.parametrize("level", ["quick", "full"])
def test_a_configuration_is_tried_with_what_is_even_for_another_alone(level):
    report = check(checked.even, level=level)
    assert kinds(report) == {"out-of-bounds read"}
    assert all(finding.case.startswith("N=16, ") for finding in report.findings)


def test_one_case_runs_alone():
    first = check(checked.thrice)
    case = first.ids[first.findings[0].key]
    again = check(checked.thrice, case=case)
    assert again.findings[0] == first.findings[0]
    assert again.cases == 1 < first.cases
    with pytest.raises(ValueError, match="no case has the id 'none'"):
        check(case="none")


def test_a_case_in_words_is_made_again():
    words = {
        "section": "rounding",
        "case": {"sample": "N=7", "dtype": "float16", "scale": 4.0},
        "property": "battery.values",
    }
    report = check(checked.thrice, case=words, gradients=())
    assert report.cases == 1
    (finding,) = report.findings
    assert finding.case == "N=7, float16, times 4"
    assert str(report).splitlines()[-1].startswith("1 finding in 1 case, ")
    with pytest.raises(ValueError, match=r"no case can be made of .*unheard"):
        check(case=words | {"property": "battery.unheard"})
    with pytest.raises(ValueError, match=r"no case can be made of .*float33"):
        check(case=words | {"case": {"sample": "N=7", "dtype": "float33"}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fn": lambda x: checked.thrice(x)}, "no script for the function: no name to import it"),
        (
            {"fn": checked.thrice, "samples": [torch.ones(3)]},
            "no script for the samples: no name to import it",
        ),
        (
            {"fn": lambda x: checked.thrice(x), "reference": lambda x: 2 * x},
            "no script for the function and the reference: no name to import them",
        ),
    ],
)
def test_what_has_no_name_to_import_gets_no_script(options, said, tmp_path):
    folder = tmp_path / "scripts"
    report = check(**options, reproductions=folder)
    assert kinds(report) == {"exactness", "values"}
    assert report.reproductions == []
    assert list(folder.iterdir()) == []
    assert str(report).splitlines()[-1].startswith(said)
    assert report.to_json()["unscripted"] == report.unscripted


def test_samples_may_be_a_function_from_a_maker():
    def made(make):
        yield Sample("three", x=make(3))
        yield Sample("forty", x=make(40))

    def dicts(make):
        yield {"x": make(3)}
        yield {"x": make(40)}

    named, numbered = check(checked.unmasked, samples=made), check(checked.unmasked, samples=dicts)
    assert kinds(named) == kinds(numbered) == {"out-of-bounds read"}
    assert named.findings[0].case.startswith("forty, ")
    assert numbered.findings[0].case.startswith("sample 1, ")


@pytest.mark.parametrize("form", ["dicts", "tuples", "tensors"])
def test_samples_may_be_calls_whose_tensors_are_left_alone(form):
    tensors = [torch.ones(4, 5).t(), torch.full((33,), 7.0, requires_grad=True)]
    before = [tensor.detach().clone() for tensor in tensors]
    calls = {
        "dicts": [{"x": tensor} for tensor in tensors],
        "tuples": [(tensor,) for tensor in tensors],
        "tensors": tensors,
    }[form]
    report = check(checked.in_place, checked.in_place_reference, calls)
    assert report.ok, str(report)
    assert kinds(check(checked.thrice, samples=calls)) == {"exactness", "values"}
    for tensor, as_it_was in zip(tensors, before, strict=True):
        assert torch.equal(tensor.detach(), as_it_was)
        assert tensor.grad is None
        assert tensor._version == 0


def test_a_guess_is_announced():
    report = check(samples=None)
    assert report.ok
    assert report.notes[0] == "inputs guessed: x[M, N]"


def refuses(x):
    raise TypeError("not today")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reference": None, "fn": torch.nn.functional.relu}, "nothing to compare with"),
        ({"reference": refuses}, "the reference refuses the inputs: TypeError: not today"),
        ({"samples": "x[N"}, r"expects tensors such as x\[M, K\].* received 'x\[N'"),
        ({"samples": "y[N]"}, r"no argument x: double takes x"),
        ({"samples": "x[N] y[N]"}, "unknown y: double takes x"),
        ({"samples": "eps=1"}, "no tensor among the arguments"),
        ({"samples": []}, "there are no samples"),
        ({"samples": lambda make: []}, "there are no samples"),
        ({"samples": [3]}, "samples are calls, dicts or tuples of arguments, received int"),
        ({"samples": [(torch.ones(3), 4)]}, "a sample does not fit the function: too many"),
        ({"gradients": ["y"]}, "gradients: expects some of x, received y"),
        ({"mutates": ["y"]}, "mutates: expects some of x, received y"),
        ({"non_finite": ["y"]}, "non_finite: expects some of x, received y"),
        ({"targets": ["sm_81"]}, "targets: expects one of sm_80, .*, received 'sm_81'"),
        ({"level": "slow"}, "level: expects one of quick, full, soak, received 'slow'"),
        ({"contract": "bf16"}, "contract: expects one of ieee, tf32, received 'bf16'"),
        ({"device": "gpu"}, "device: expects one of cpu, cuda, received 'gpu'"),
        ({"fn": "tests.checked:missing"}, "has no 'missing'"),
        ({"fn": "tests.checked:torch"}, "is no function, but module"),
    ],
)
def test_a_wrong_call_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        check(**options)


@pytest.mark.parametrize("form", ["tensor", "tuple", "list", "dict", "nested", "number", "nothing"])
def test_results_may_have_any_form(form):
    report = check(checked.forms, checked.forms_reference, f"x[N] form={form}")
    assert report.ok, str(report)


def test_a_result_of_another_form_is_a_finding():
    wrong = check(checked.of_none)
    assert kinds(wrong) == {"shape"}
    text = check(checked.forms, checked.forms_reference, "x[N] form=text")
    assert kinds(text) <= {"error", "shape"}
    assert "str" in text.findings[0].message


OWNERS = (
    "torch",
    "torch:Tensor",
    "torch:cuda",
    "torch.cuda:Stream",
    "torch:nn.Module",
    "torch.utils.cpp_extension",
    "triton",
    "triton.language",
    "triton.language:tensor",
    "triton.language.core",
    "triton.runtime.autotuner:Autotuner",
    "triton.runtime.autotuner:Heuristics",
    "triton.runtime:driver",
    "triton.runtime.interpreter",
    "triton.runtime.interpreter:InterpreterBuilder",
    "triton.runtime.interpreter:InterpretedFunction",
    "triton.runtime.interpreter:GridExecutor",
    "triton.runtime.jit:JITFunction",
    "triton.testing",
)


def attributes():
    """Everything of what a check replaces a part of."""
    found = {}
    for name in OWNERS:
        module, _, path = name.partition(":")
        owner = importlib.import_module(module)
        for part in filter(None, path.split(".")):
            owner = getattr(owner, part)
        # a submodule may be imported meanwhile
        found |= {
            f"{name}.{key}": value
            for key, value in vars(owner).items()
            if not isinstance(value, type(torch)) and not key.startswith("__")
        }
    return found


def test_nothing_stays_replaced():
    def interrupts(x):
        nonlocal count
        count += 1
        if count == 4:
            seen.append(attributes())
            raise KeyboardInterrupt
        return checked.double(x)

    count, seen = 0, []
    # what is imported or made once
    check()
    before = attributes()
    check(checked.unmasked)
    with pytest.raises(KeyboardInterrupt):
        check(interrupts)
    after = attributes()
    changed = {key for key in before if after.get(key) is not before[key]}
    assert changed == set()
    assert after.keys() == before.keys()
    # there was something to put back
    assert any(seen[0][key] is not before[key] for key in before)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert not torch.zeros(2).is_cuda


PLUGIN = """
import sys
import pytest, torch
from tests import checked

def mine(x):
    return checked.double(x)

def plain(x):
    return x + x

def test_without_the_fixture():
    pass

def test_right(tritorch_check):
    report = tritorch_check(mine, plain, samples="x[N]", dtypes=[torch.float32], targets=())
    assert report.ok and report.level == "quick" and report.cases > 20

def test_wrong(tritorch_check):
    tritorch_check(
        checked.unmasked, reference=plain, samples="x[N]", dtypes=[torch.float32], targets=()
    )

def test_local(tritorch_check):
    tritorch_check(lambda x: checked.double(x), plain, "x[N]", dtypes=[torch.float32], targets=())
"""


@pytest.mark.parametrize("interprets", [True, False])
def test_the_fixture_fails_a_test_with_the_report(interprets, tmp_path):
    (tmp_path / "test_mine.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "pytest", "-p", "pytest_tritorch", "-q", "-rA"]
    environment = {
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": str(int(interprets)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(
        [*command, "--tritorch-repro", "scripts", "-c", os.devnull, "--rootdir", "."],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = re.findall(r"^(PASSED|FAILED) \S+::(\w+)", done.stdout, re.MULTILINE)
    assert {name: outcome for outcome, name in outcomes} == {
        "test_without_the_fixture": "PASSED",
        "test_right": "PASSED",
        "test_wrong": "FAILED",
        "test_local": "PASSED" if interprets else "FAILED",
    }
    # the report is what is said, without the way to it
    assert any(line.startswith("1. out-of-bounds read  ") for line in lines)
    assert any(line.startswith("reproduce: python scripts") for line in lines)
    assert "def check(" not in done.stdout
    if not interprets:
        assert "the function cannot be imported by another process" in done.stdout


def test_a_large_tile_is_passed_at_level_quick():
    found = input_sizes.choices(inputs.parse("x[M, N]"), (4096,), "quick", 0)
    assert max(sizes["N"] for sizes in found) > 4096


def test_a_script_that_cannot_be_tried_costs_no_report(tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise supervise.ChildError("no process today")

    monkeypatch.setattr(supervise, "run", fails)
    report = check(checked.unmasked, reproductions=tmp_path)
    assert kinds(report) == {"out-of-bounds read"}
    assert (report.reproductions, list(tmp_path.iterdir())) == ([], [])
    assert "does not show it" in report.unscripted[0]
