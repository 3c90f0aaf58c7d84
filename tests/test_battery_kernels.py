"""The properties that watch kernels, on kernels that lack them and on some that do not."""

from pathlib import Path

import pytest
import torch

from tritorch.testing import battery, battery_torch, describe, hosting, inputs, trials
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


def test_an_input_that_serves_as_memory_is_told(subject_of):
    subject = subject_of("broken/scratch_input")
    (found,) = battery.values(subject, typical(subject))
    assert (found.kind, found.argument) == ("mutation", "x")


def test_sums_in_16_bits_are_told_with_a_hint(subject_of):
    subject = subject_of("../../examples/check/linear", dtypes=[torch.float16])
    (found,) = battery.values(subject, typical(subject, torch.float16))
    assert found.message.endswith("does it accumulate in 16 bits?")
