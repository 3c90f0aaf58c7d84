"""Exceptions during a check: findings at their line, declined calls, mistakes of the checks."""

from __future__ import annotations

import re

import pytest
import torch

from tests import checked
from tests.checks import check, kinds
from tritorch.testing import cases, errors

pytestmark = pytest.mark.interpret


def test_an_exception_is_found_at_its_line_and_ends_nothing():
    def raises(x):
        raise LookupError("where is it?")

    report = check(raises)
    (finding,) = report.findings
    assert (finding.kind, finding.message) == ("error", "LookupError: where is it?")
    assert (finding.file, finding.source) == (__file__, 'raise LookupError("where is it?")')
    assert report.cases > 20
    # every property but the detectors', or else it was declined
    passed = {name for name, one in report.sections.items() if not one.failed}
    assert passed == {"layouts", "memory"}
    # nothing is said of what was not seen
    assert report.notes == ["rounding is judged as sums of products"]
    assert kinds(check(checked.leaves)) == {"error"}


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad_output):
        raise RuntimeError("backward is broken")


class Silent(Broken):
    @staticmethod
    def backward(ctx, grad_output):
        return None


@pytest.mark.parametrize("function", [Broken, Silent])
def test_a_backward_that_fails_is_found(function):
    report = check(lambda x: function.apply(x), lambda x: 2 * x)
    assert kinds(report) & {"error", "gradients"}
    assert not any("requires no gradient" in note for note in report.notes)


def test_a_first_call_that_raises_does_not_say_that_there_are_gradients():
    def forward_only(x):
        if 0 < x.numel() < 20:
            raise RuntimeError("too small")
        return checked.double(x.detach())

    report = check(forward_only, lambda x: 2 * x)
    assert kinds(report) == {"error"}
    assert "its result requires no gradient: gradients are not checked" in report.notes


def test_what_is_declined_is_counted():
    def contiguous(x):
        if not x.is_contiguous():
            raise ValueError("x must be contiguous")
        return checked.double(x)

    report = check(contiguous)
    assert report.ok
    layouts = report.sections["layouts"]
    assert 0 < layouts.declined < layouts.cases
    assert f"{layouts.declined} of them declined" in str(report)


def test_what_a_kernel_does_before_its_call_is_declined_counts():
    def late(x):
        if x.stride() == (2,):
            checked.unmasked(x)
            raise ValueError("x must be contiguous")
        return checked.double(x)

    report = check(late)
    (finding,) = report.findings
    assert "x sliced" in finding.case
    assert (finding.kind, finding.argument) == ("out-of-bounds read", "x_ptr")
    assert finding.source.strip() == "x = tl.load(x_ptr + offs)"


def test_what_a_kernel_does_in_a_call_that_the_reference_refuses_does_not_count():
    def refuses_strides(x):
        if x.stride() == (2,):
            raise ValueError("x must be contiguous")
        return x * 2

    def late(x):
        if x.stride() == (2,):
            checked.unmasked(x)
        refuses_strides(x)
        return checked.double(x)

    report = check(late, refuses_strides)
    assert report.ok, str(report)
    assert report.sections["layouts"].declined > 0


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_what_a_function_of_samples_raises_is_a_finding_at_its_line(error):
    def samples(make):
        raise error("no sample today")
        yield

    report = check(samples=samples)
    (finding,) = report.findings
    assert (finding.kind, finding.message) == ("error", f"{error.__name__}: no sample today")
    assert (finding.file, finding.source) == (__file__, 'raise error("no sample today")')
    assert not report.ok
    assert not report.mistakes


def test_samples_that_raise_late_end_the_check_and_keep_what_was_found():
    def samples(make):
        yield {"x": make(5)}
        if make.dtype == torch.float16:
            raise ValueError("no half today")

    dtypes = [torch.float32, torch.float16]
    report = check(checked.unmasked, samples=samples, dtypes=dtypes)
    assert kinds(report) == {"out-of-bounds read", "error"}
    (error,) = [finding for finding in report.findings if finding.kind == "error"]
    assert error.source == 'raise ValueError("no half today")'


def test_a_mistake_of_the_checks_is_no_finding(monkeypatch):
    monkeypatch.setattr(cases, "judge", None)
    report = check()
    assert report.findings == []
    assert not report.ok
    # one mistake is said once, however many cases it spoils
    (mistake,) = report.mistakes
    assert mistake.startswith("repeated calls of N=18, float32:\nTraceback ")
    assert "in judged\n    found = cases.judge(\n" in mistake
    assert mistake.endswith("\nTypeError: 'NoneType' object is not callable")
    rounding = report.sections["rounding"]
    assert rounding.broken == rounding.cases > 0
    said = r"rounding +not checked: 3 cases, the check itself failed in 3 of them\n"
    assert re.search(said, str(report))
    assert re.search(r"program order +pass  2 cases\n", str(report))
    assert report.to_json()["mistakes"] == report.mistakes


def test_a_mistake_below_a_kernel_is_no_finding_on_the_kernel():
    report = check(checked.fails_inside, gradients=())
    assert report.findings == []
    assert not report.ok
    assert "TypeError: 'NoneType' object is not callable" in report.mistakes[0]


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output.new_zeros(grad_output.numel() + 1)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda x: torch.cat([x, "x"]), "TypeError: expected Tensor"),
        (lambda x: x.to(device="nonsense"), "RuntimeError: .*nonsense"),
        (lambda x: torch.empty(3, dtype="float"), "TypeError: "),
        (lambda x: torch.nn.functional.linear(x, torch.ones(3, 4)), "RuntimeError: "),
        (lambda x: "text", "TypeError: .* returns str"),
        (lambda x: x + 1j, "TypeError: .* returns torch.complex64, where real numbers"),
        (lambda x: WrongGradient.apply(x), "RuntimeError: .*invalid gradient"),
        (lambda x: {}[x], "KeyError"),
        (checked.raises_value_error, "ValueError: not this one"),
    ],
)
def test_a_mistake_of_the_users_is_a_finding(function, said):
    report = check(function, lambda x: 2 * x)
    assert report.mistakes == []
    assert any(re.match(said, finding.message) for finding in report.findings), str(report)


def test_no_user_is_asked_for_what_an_exception_is_meant_to_say():
    class Words(errors.RequestError):
        pass

    assert not errors.is_internal(KeyError("without a traceback"))
    assert not errors.is_internal(Words())
    assert not errors.is_internal(KeyboardInterrupt())
