"""The memory format of outputs where one argument alone is channels_last."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from tritorch import backend, ops
from tritorch.registry import Maker, specs
from tritorch.testing import battery_torch
from tritorch.testing.trials import Case

pytestmark = pytest.mark.interpret


def images():
    """Every image of the samples that are repeated with every layout."""
    return [
        pytest.param(spec, sample.name, name, id=f"{spec.name}-{sample.name}-{name}")
        for spec in specs()
        if spec.keeps_format
        for sample in spec.samples(Maker(torch.float32, "meta"))
        if sample.layouts
        for name, value in sample.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 4
    ]


@pytest.mark.parametrize(("spec", "name", "argument"), images())
def test_outputs_have_torchs_format(spec, name, argument, device):
    found = battery_torch.format_of_outputs(spec, Case(name, torch.float32, device), argument)
    assert not found, found[0].message


@pytest.mark.parametrize("moves", [False, True])
def test_gradients_of_normalised_images_keep_their_format(moves, device):
    """Where running statistics move they pass a copy that has it not; torch's give it up."""
    images = torch.randn(2, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    x = images.requires_grad_()
    running = [torch.zeros(3, device=device), torch.ones(3, device=device)] if moves else []
    y = ops.instance_norm(x, *running)
    seed = torch.rand(2, 3, 4, 5, device=device)
    (grad,) = torch.autograd.grad(y, x, seed)
    for result in (y, grad):
        assert result.is_contiguous(memory_format=torch.channels_last)
    (expected,) = torch.autograd.grad(F.instance_norm(x), x, seed)
    assert_close(grad, expected)


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_batched_gradients_of_normalised_images(choice, device):
    """A gradient that is batched has no format."""
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    with backend.use(choice):
        found, expected = (
            torch.autograd.functional.jacobian(one, x, vectorize=True)
            for one in (ops.instance_norm, F.instance_norm)
        )
        assert_close(torch.func.jacrev(ops.instance_norm)(x), expected)
    assert_close(found, expected)
