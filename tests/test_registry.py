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
    # these read one class of each row, or some pixels, and their gradients write all of them
    some = spec.name in ("nll_loss", "conv1d", "conv2d", "conv3d")
    passes = ("forward", "backward") if some else ("forward",)
    for sample in spec.workloads(Maker(torch.float32, "meta")):
        cost = spec.cost(**sample.arguments)
        assert set(cost) - {"grad_input", "grad_weight"} == {"forward", "backward"}
        first = next(v for v in sample.arguments.values() if isinstance(v, Tensor | list))
        tensors = first if isinstance(first, list) else [first]
        moved = sum(cost[name].bytes for name in passes)
        assert moved >= sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("group_norm", {"num_groups": 2}),
        ("instance_norm", {}),
        ("instance_norm", {"use_input_stats": False}),
        ("layer_norm", {"normalized_shape": (4, 8, 8)}),
    ],
)
def test_a_norm_moves_its_tensors_once_at_least(name, more):
    (spec,) = (spec for spec in specs() if spec.name == name)
    x = torch.empty(2, 4, 8, 8, device="meta")
    cost = spec.cost(input=x, **more)
    # the input and the output; the input and both gradients
    assert cost["forward"].bytes == 2 * 4 * x.numel()
    assert cost["backward"].bytes == 3 * 4 * x.numel()


def test_a_filter_smaller_than_its_stride_reads_some_pixels():
    (spec,) = (spec for spec in specs() if spec.name == "conv2d")
    x, w = torch.empty(2, 3, 8, 8, device="meta"), torch.empty(5, 3, 1, 1, device="meta")
    for stride, rows, columns in ((1, 8, 8), (2, 4, 4), ((1, 3), 8, 3)):
        cost = spec.cost(input=x, weight=w, stride=stride)
        outputs = 2 * 5 * rows * columns
        assert cost["forward"].bytes == 4 * (2 * 3 * rows * columns + 15 + outputs)
        assert cost["grad_weight"] == cost["forward"]
        assert cost["grad_input"].bytes == 4 * (2 * 3 * 64 + 15 + outputs)
        assert cost["backward"].bytes == cost["grad_input"].bytes + cost["grad_weight"].bytes
    # three taps and a stride of two read every pixel
    w = torch.empty(5, 3, 3, 3, device="meta")
    cost = spec.cost(input=x, weight=w, stride=2, padding=1)
    assert cost["forward"].bytes == 4 * (2 * 3 * 64 + 135 + 2 * 5 * 16)
