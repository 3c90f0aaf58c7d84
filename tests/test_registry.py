"""What specs declare besides what the generated tests use: costs."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs

pytestmark = pytest.mark.reference

COUNTED = ("matmul", "linear", "conv2d")


def is_counted(spec, sample):
    """torch counts products of matrices, and none with a vector."""
    tensors = {n: v for n, v in sample.arguments.items() if isinstance(v, Tensor) and n != "bias"}
    return spec.name in COUNTED and all(tensor.dim() > 1 for tensor in tensors.values())


def differentiable(spec, arguments):
    return {
        name: value.requires_grad_() if name in spec.gradients and value is not None else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, sample.name, id=f"{spec.name}-{sample.name}")
        for spec in specs()
        for sample in spec.samples(Maker(torch.float32, "meta"))
        if is_counted(spec, sample)
    ],
)
def test_cost_counts_the_products_that_torch_counts(spec, name):
    sample = next(s for s in spec.samples(Maker(torch.float32)) if s.name == name)
    cost = spec.cost(**sample.arguments)
    with FlopCounterMode(display=False) as forward:
        output = spec.reference(**differentiable(spec, sample.arguments))
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert cost["forward"].flops == forward.get_total_flops()
    # torch's formula of a weight's gradient counts every group's products for every group
    if sample.arguments.get("groups", 1) == 1:
        assert cost["backward"].flops == backward.get_total_flops()
    else:
        assert cost["backward"].flops == 2 * forward.get_total_flops()


@pytest.mark.parametrize("spec", [pytest.param(spec, id=spec.name) for spec in specs()])
def test_cost_moves_at_least_the_arguments(spec):
    # it reads one class of each row, and its gradient writes all of them
    passes = ("forward", "backward") if spec.name == "nll_loss" else ("forward",)
    for sample in spec.workloads(Maker(torch.float32, "meta")):
        cost = spec.cost(**sample.arguments)
        assert set(cost) == {"forward", "backward"}
        first = next(v for v in sample.arguments.values() if isinstance(v, Tensor | list))
        tensors = first if isinstance(first, list) else [first]
        moved = sum(cost[name].bytes for name in passes)
        assert moved >= sum(t.numel() * t.element_size() for t in tensors)
