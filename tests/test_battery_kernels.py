"""The properties that watch kernels, on kernels that lack them and on some that do not."""

from dataclasses import replace
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
    cases,
    describe,
    detector,
    detectors,
    errors,
    examine,
    hosting,
    input_sizes,
    inputs,
    schedule,
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
        made = text.samples(input_sizes.choices(text, tiles, "quick", 0))
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
    found = examination.watched(schedule.Step("rounding", case, run))
    assert {finding.kind for finding in found} == {"hang"}
    (key,) = {finding.key for finding in found}
    assert key[1:3] == ("column_sum_kernel", "lock_ptr")
    assert {finding.case for finding in found} == {str(case)}


@pytest.mark.parametrize("check", [battery.values, battery.masked_lanes])
def test_an_input_that_serves_as_memory_is_told_with_the_store(check, subject_of):
    subject = subject_of("broken/scratch_input")
    with detectors.detecting():
        (found,) = check(subject, typical(subject))
    assert (found.kind, found.argument) == ("mutation", "x_ptr")
    assert found.message == "scratch_input wrote into x, which is `x_ptr` of the kernel"
    assert found.kernel == "absolute_square_kernel"
    assert found.source.startswith("tl.store(x_ptr + offs * stride, ")
    lines = Path(found.file).read_text().splitlines()
    assert lines[found.line - 1].endswith("# defect")
    assert found.case == str(typical(subject))


def test_an_input_that_serves_as_memory_is_told_where_nothing_is_watched(subject_of):
    subject = subject_of("broken/scratch_input")
    (found,) = battery.values(subject, typical(subject))
    assert (found.kind, found.argument, found.line) == ("mutation", "x", 0)
    assert found.message == "scratch_input wrote into x"


@triton.jit
def twice_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    # the same bits again are no change
    tl.store(x_ptr + offs, x, mask=offs < 1)
    tl.store(y_ptr + offs, x + x, mask=offs < n)
    tl.atomic_add(x_ptr + offs, 1, mask=(offs == 2) & (offs < n))


def _twice(x):
    y = torch.empty(x.shape, dtype=x.dtype)
    twice_kernel[(1,)](x, y, x.numel(), 16)
    return y


def by_kernel(x):
    return _twice(x)


def by_torch(x):
    y = _twice(x[:1])
    y = torch.cat([y, x[1:] * 2])
    x[3] += 1
    return y


def by_resizing(x):
    return 2 * x.clone().resize_(x.shape) if x.numel() < 2 else 2 * x.unsqueeze_(0)[0]


@pytest.mark.parametrize(
    ("op", "said", "kernel", "source"),
    [
        (by_kernel, ", which is `x_ptr` of the kernel", "twice_kernel", "tl.atomic_add(x_ptr"),
        (by_torch, ": torch code did, no kernel", "", ""),
        (by_resizing, ": torch code did, no kernel", "", ""),
    ],
)
def test_who_wrote_the_elements_that_have_changed(op, said, kernel, source):
    subject = Subject(
        name="op",
        op=op,
        reference=lambda x: 2 * x,
        gradients=(),
        samples=lambda make: iter([Sample("typical", x=make(5))]),
        accuracy="composite",
    )
    (found,) = battery.values(subject, Case("typical", torch.float32), order="forward")
    assert (found.kind, found.message) == ("mutation", f"op wrote into x{said}")
    assert (found.kernel, found.argument) == (kernel, "x_ptr" if kernel else "x")
    assert found.source.startswith(source)
    assert bool(found.line) == bool(source)


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


def test_a_triton_op_is_traced_where_its_kernel_is_interpreted():
    @torch.library.triton_op("tritorch_test::copied", mutates_args=())
    def traced(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        torch.library.wrap_triton(copy_kernel)[(x.shape[0],)](
            x, y, *x.shape, *x.stride(), WIDE=True
        )
        return y

    subject, case = copying(traced), Case("typical", torch.float32)
    with hosting.hosted():
        assert battery_torch.library(replace(subject, gradients=()), case, required=True) == []
        # torch's formula that says there is none
        (found,) = battery.values(subject, case)
        assert found.message.endswith("; if it has no gradient, say so: --gradients ''")
        traced.register_fake(lambda x: x.new_empty(x.shape, dtype=torch.float64))
        (found,) = battery_torch.library(replace(subject, gradients=()), case)
    assert "Dtypes torch.float32 and torch.float64 are not equal" in found.message
    # what was replaced for it is back
    assert torch._functorch.config.decompose_custom_triton_ops


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


def copying(op):
    """A function that copies, whose strides are for `op` to take or not."""
    return Subject(
        name="copy",
        op=op,
        reference=lambda x: x.clone(),
        gradients=("x",),
        samples=lambda make: iter([Sample("typical", x=make(5, 6))]),
        accuracy="multilinear",
    )


def test_strides_that_a_function_refuses_are_no_finding():
    def contiguous(x):
        if not x.is_contiguous():
            raise ValueError("contiguous tensors only")
        return x.clone()

    with hosting.hosted():
        assert battery.offsets(copying(contiguous), Case("typical", torch.float32), "x") == []


def test_a_mistake_of_the_checks_is_no_refusal(monkeypatch):
    monkeypatch.setattr(cases, "differentiate", None)
    with hosting.hosted(), pytest.raises(errors.InternalError, match="not callable"):
        battery.offsets(copying(torch.clone), Case("typical", torch.float32), "x")
