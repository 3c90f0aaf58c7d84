"""The harness itself: what it must see in a wrong op, and what its layouts are."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import specs
from tritorch.testing import cases, errors, parts, scales

pytestmark = pytest.mark.reference

SPECS = {spec.name: spec for spec in specs()}
LINEAR = SPECS["linear"]
GRADIENT = cases.random_gradient("gradient")


def linear_arguments():
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (7, 5), "weight": (6, 5), "bias": (6,), "residual": (7, 6)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"activation": None}


def accepted(op):
    found = cases.verdicts(replace(LINEAR, op=op), linear_arguments(), GRADIENT)
    return {what: verdict.accepted for what, verdict in found}


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


def test_the_reference_is_accepted_in_every_result():
    names = ["output 0", *(f"gradient of {name}" for name in LINEAR.gradients)]
    assert accepted(LINEAR.reference) == dict.fromkeys(names, True)


def test_a_wrong_output_is_refused():
    found = accepted(lambda **given: LINEAR.reference(**given) * 1.01)
    assert not found["output 0"]


@pytest.mark.parametrize("wrong", ["input", "weight", "bias", "residual"])
def test_a_wrong_gradient_is_refused_alone(wrong):
    found = accepted(
        lambda **given: LINEAR.reference(**given | {wrong: ScaledGradient.apply(given[wrong])})
    )
    assert [what for what, good in found.items() if not good] == [f"gradient of {wrong}"]


def test_a_written_argument_is_told():
    def writes(**given):
        given["weight"].mul_(2)
        return given["input"]

    with pytest.raises(cases.Mutated, match="linear wrote into weight"):
        cases.run(writes, LINEAR, linear_arguments(), wanted=[])
    spec = replace(LINEAR, mutates=("weight",))
    arguments = linear_arguments()
    outcome = cases.run(writes, spec, arguments, wanted=[])
    assert torch.equal(outcome.written["weight"], 2 * arguments["weight"])


def test_unwritten_memory_is_nan():
    outcome = cases.run(
        lambda **given: torch.empty_like(given["input"]), LINEAR, linear_arguments(), wanted=[]
    )
    assert outcome.outputs[0].isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_only_wanted_gradients_come_back():
    arguments = linear_arguments()
    run = cases.run(LINEAR.reference, LINEAR, arguments, grad_outputs=GRADIENT)
    assert list(run.grads) == ["input", "weight", "bias", "residual"]
    alone = cases.run(LINEAR.reference, LINEAR, arguments, grad_outputs=GRADIENT, wanted=["weight"])
    assert list(alone.grads) == ["weight"]
    assert torch.equal(alone.grads["weight"], run.grads["weight"])


def test_equal_terms_widen_the_bound():
    arguments = linear_arguments()
    plain = scales.scales_of(LINEAR, arguments, [torch.ones(7, 6)])
    repeated = scales.scales_of(LINEAR, arguments, [torch.ones(()).expand(7, 6)])
    for what, scale in plain.items():
        assert torch.equal(repeated[what]["terms"], scale["terms"].square())


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_copy_lies_in_memory_like_its_original(layout):
    tensor = cases.relayout(torch.randn(2, 3, 4, 5), layout)
    copy = cases._copy(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert copy.data_ptr() % 16 == tensor.data_ptr() % 16
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_layouts_are_what_they_say():
    tensor = torch.randn(2, 3, 4, 5)
    made = {layout: cases.relayout(tensor, layout) for layout in cases.LAYOUTS}
    assert torch.equal(made.pop("expanded"), tensor[:1].expand(2, 3, 4, 5))
    assert all(torch.equal(other, tensor) for other in made.values())
    assert made["sliced"].stride() == (120, 40, 10, 2)
    assert made["transposed"].stride() == (1, 2, 6, 24)
    assert made["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert made["misaligned"].data_ptr() % 16 == 4
    # what lies between the elements is NaN: one read by a wrong stride shows
    memory = torch.as_strided(made["sliced"], (240,), (1,), 0)
    assert memory[1::2].isnan().all()


def test_one_element_of_any_stride_has_bits():
    one = torch.tensor([[3.0, 4.0]])[:, ::2]
    assert one.stride(-1) == 2
    assert cases.bitwise_equal(one, torch.tensor([[3.0]]))
    assert not cases.bitwise_equal(one, torch.tensor([[4.0]]))


POISONED = """
import sys, torch
from tritorch.testing import cases
with cases.poisoned_memory():
    print(torch.empty(8).isnan().all().item(), torch.are_deterministic_algorithms_enabled())
print(torch.are_deterministic_algorithms_enabled(), "torch._inductor" in sys.modules)
"""


def test_fresh_memory_is_nan_without_the_seconds_that_torchs_compiler_takes_to_import():
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", POISONED]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True True", "False False"]


# what a part of a check sets for its process
PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)


def test_a_part_of_a_check_computes_in_one_thread(monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    allowed = [(flags, flags.fp32_precision) for flags in PRODUCTS]
    try:
        with pytest.raises(errors.RequestError):
            parts.run("compile", {"target": "no_such_module:function"}, lambda *_, **__: None)
    finally:
        for flags, precision in allowed:
            flags.fp32_precision = precision
    assert numbers == [1]
