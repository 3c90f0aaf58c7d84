"""Softmax: torch's choices of dimension and dtype, rows longer than a block, memory."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import nn, ops
from tritorch.nn import functional

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

OPS = {"softmax": (ops.softmax, F.softmax), "log_softmax": (ops.log_softmax, F.log_softmax)}
each_op = pytest.mark.parametrize("name", OPS)


@each_op
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 2), (2, 3, 2, 2)])
def test_without_a_dimension_it_is_torchs_choice_with_a_warning(name, shape, device):
    ours, theirs = OPS[name]
    x = torch.randn(shape, device=device)
    results = []
    for function in (ours, theirs):
        with pytest.warns(UserWarning, match=f"Implicit dimension choice for {name}"):
            results.append(function(x))
    assert_close(*results)


@pytest.mark.parametrize("layer", ["Softmax", "LogSoftmax"])
def test_layer_without_a_dimension(layer, device):
    x = torch.randn(2, 3, 2, device=device)
    results = []
    for module in (nn, torch.nn):
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            results.append(getattr(module, layer)()(x))
    assert_close(*results)


@each_op
def test_functional_has_torchs_signature(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (functional, F))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


@each_op
@pytest.mark.parametrize(
    ("source", "result"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.int64, torch.float32),
    ],
)
def test_dtype_is_what_the_input_is_read_as(name, source, result, device):
    ours, theirs = OPS[name]
    torch.manual_seed(0)
    x = (torch.randn(4, 5) * 3).to(device, source)
    results = []
    for function in (ours, theirs):
        leaf = x.clone().requires_grad_(source.is_floating_point)
        y = function(leaf, 1, dtype=result)
        found = [y.detach()]
        if leaf.requires_grad:
            found += torch.autograd.grad(y, leaf, torch.linspace(-1, 1, 20).view(4, 5).to(y))
        results.append(found)
    # the gradients round in different orders
    assert_close(*results, rtol=1.6e-2, atol=5e-2 if result == torch.bfloat16 else 2e-3)


@each_op
def test_integers_without_a_dtype_are_refused(name, device):
    for function in OPS[name]:
        with pytest.raises((NotImplementedError, RuntimeError), match="not implemented"):
            function(torch.ones(3, dtype=torch.int64, device=device), 0)


@each_op
@pytest.mark.parametrize("length", [7, 1500])
def test_infinite_and_missing_values_are_torchs(name, length, device):
    """In rows of one block and of several, in a first block that holds nothing but -inf too."""
    ours, theirs = OPS[name]
    x = torch.randn(6, length)
    x[0, :] = -math.inf
    x[1, 0] = math.inf
    x[2, -1] = math.nan
    x[3, :-1] = -math.inf
    x[4, ::2] = -math.inf
    assert_close(ours(x.to(device), 1).cpu(), theirs(x, 1), equal_nan=True)


@each_op
def test_peer_defect_12_values_far_below_zero(name, device):
    """A running maximum that starts at zero gives NaN."""
    ours, theirs = OPS[name]
    x = torch.randn(2, 1300, device=device) - 300
    assert_close(ours(x, 1), theirs(x, 1))


@each_op
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_gradient_along_any_dimension_of_any_layout(name, dim, device):
    ours, theirs = OPS[name]
    x = torch.randn(3, 4, 2, 5, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn(5, 2, 4, 3, device=device).permute(3, 2, 1, 0)
    found = [torch.autograd.grad(function(x, dim), x, grad)[0] for function in (ours, theirs)]
    assert_close(*found)
    assert found[0].stride() == found[1].stride()


@each_op
def test_only_the_output_is_saved(name, device):
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    x = torch.randn(8, 4, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = OPS[name][0](x, 1)
    assert kept == {y.data_ptr(): y.nbytes}
