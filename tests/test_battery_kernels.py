"""The properties that watch kernels, on kernels that lack them and on some that do not."""

from functools import partial
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from tritorch.registry import Sample, Subject
from tritorch.testing import (
    battery,
    battery_torch,
    describe,
    detector,
    examine,
    hosting,
    inputs,
    trials,
)
from tritorch.testing.trials import Case

pytestmark = pytest.mark.interpret

LAB = Path(__file__).parent / "lab"


@pytest.fixture
def subject_of():
    """Makes the subject of a file of the lab, whose kernels run where there is no GPU."""

    def subject(name, tiles=(), **options):
        function = hosting.load(f"{LAB / name}.py:{Path(name).stem}")
        module = function.__globals__
        text = inputs.parse(module["INPUTS"], function)
        made = text.samples(inputs.choices(text, tiles, "quick", 0))
        return describe.describe(function, module["reference"], made, gradients=(), **options)

    with hosting.hosted():
        yield subject


def typical(subject, dtype=torch.float32, **options):
    names = [sample.name for sample in trials.samples_of(subject, dtype)]
    return Case(names[1 % len(names)], dtype, **options)


def test_products_in_tf32_are_told_where_float32s_are_due(subject_of):
    subject = subject_of("broken/tf32_matmul", dtypes=[torch.float32])
    case = typical(subject)
    assert battery.values(subject, case) == []
    (found,) = battery_torch.tf32_is_not_used(subject, case)
    assert found.kind == "tf32"
    right = subject_of("correct/matmul", dtypes=[torch.float32])
    assert battery_torch.tf32_is_not_used(right, typical(right)) == []


def test_a_result_that_depends_on_the_order_of_programs_is_told(subject_of):
    subject = subject_of("broken/ticket_order")
    assert battery.values(subject, typical(subject)) == []
    found = battery.orders(subject, typical(subject))
    assert [(f.kind, f.argument) for f in found] == [("program order", "output 0")]
    assert found[0].message.startswith("with the programs' order reverse, output 0: C1")


def test_an_order_that_rounds_otherwise_is_right(subject_of):
    subject = subject_of("correct/matmul_split_k", dtypes=[torch.float32])
    assert battery.orders(subject, typical(subject)) == []


def test_what_the_detectors_see_comes_with_its_case(subject_of):
    subject = subject_of("broken/short_grid", tiles=(64,))
    case = Case("N=65", torch.float32)
    found = battery.values(subject, case, order="forward")
    assert {finding.kind for finding in found} == {"unwritten output", "values"}
    assert {finding.case for finding in found} == {str(case)}


def test_what_a_launch_does_before_it_gives_up_is_kept(subject_of):
    subject = subject_of("broken/held_lock")
    case = typical(subject)
    actual, found = trials.outcome(subject, case, case.arguments(subject), order="forward")
    assert actual is None
    assert [(f.kind, f.argument) for f in found] == [("hang", "lock_ptr")]


@pytest.mark.parametrize("order", [None, "forward"])
def test_a_program_that_waits_in_vain_is_told_once(order, subject_of, monkeypatch):
    monkeypatch.setattr(detector, "SPIN_LIMIT", 200)
    subject = subject_of("broken/held_lock")
    examination = examine.Examination(subject)
    case = typical(subject)
    run = partial(battery.values, subject, case, order=order)
    found = examination.watched(examine.Step("rounding", case, run))
    assert {finding.kind for finding in found} == {"hang"}
    (key,) = {finding.key for finding in found}
    assert key[1:3] == ("column_sum_kernel", "lock_ptr")
    assert {finding.case for finding in found} == {str(case)}


def test_an_input_that_serves_as_memory_is_told(subject_of):
    subject = subject_of("broken/scratch_input")
    (found,) = battery.values(subject, typical(subject))
    assert (found.kind, found.argument) == ("mutation", "x")


def test_sums_in_16_bits_are_told_with_a_hint(subject_of):
    subject = subject_of("../../examples/check/linear", dtypes=[torch.float16])
    (found,) = battery.values(subject, typical(subject, torch.float16))
    assert found.message.endswith("does it accumulate in 16 bits?")


@triton.jit
def copy_kernel(x_ptr, y_ptr, M, N, stride_m, stride_n, WIDE: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, 8)
    if WIDE:
        row, columns = row.to(tl.int64), columns.to(tl.int64)
    x = tl.load(x_ptr + row * stride_m + columns * stride_n, mask=columns < N)
    tl.store(y_ptr + tl.program_id(0) * N + tl.arange(0, 8), x, mask=columns < N)


def copied(x, wide):
    y = torch.empty(x.shape, dtype=x.dtype)
    copy_kernel[(x.shape[0],)](x, y, *x.shape, *x.stride(), WIDE=wide)
    return y


class Identity(torch.autograd.Function):
    """Copies forwards, and the gradient backwards; each in 64 bits or not."""

    @staticmethod
    def forward(ctx, x, forward_is_wide, backward_is_wide):
        ctx.wide = backward_is_wide
        return copied(x, forward_is_wide)

    @staticmethod
    def backward(ctx, grad):
        return copied(grad, ctx.wide), None, None


@pytest.mark.parametrize("wide", [(True, True), (False, True), (True, False)], ids=str)
def test_offsets_of_both_passes_are_tried(wide):
    with hosting.hosted():
        subject = Subject(
            name="identity",
            op=lambda x: Identity.apply(x, *wide),
            reference=lambda x: x.clone(),
            gradients=("x",),
            samples=lambda make: iter([Sample("typical", x=make(5, 6))]),
            accuracy="multilinear",
        )
        case = Case("typical", torch.float32)
        of_input, of_gradient = (battery.offsets(subject, case, name) for name in ("x", None))
    assert {f.kind for f in of_input} == (set() if wide[0] else {"int32 overflow"})
    assert {f.kind for f in of_gradient} == (set() if wide[1] else {"int32 overflow"})
