"""What is in place writes its argument, says so to autograd, and refuses what torch refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tritorch
from tritorch import nn, ops

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

IN_PLACE = {
    "ops.relu": lambda x: ops.relu(x, inplace=True),
    "relu_": tritorch.relu_,
    "nn.functional.relu_": nn.functional.relu_,
    "nn.functional.relu": lambda x: nn.functional.relu(x, inplace=True),
    "nn.ReLU": nn.ReLU(inplace=True),
}


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_argument_is_written_and_returned(function, layout, device):
    x = torch.tensor([[-1.0, 2.0, -3.0], [4.0, -5.0, 6.0]], device=device)
    x = x.t() if layout == "transposed" else x
    expected, version = torch.relu(x), x._version
    result = function(x)
    assert result is x
    assert torch.equal(x, expected)
    assert x._version > version


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_a_gradient_that_needs_the_old_value_is_refused(function, device):
    """Also where the write itself is not recorded."""
    weight = torch.tensor([2.0, 3.0], device=device, requires_grad=True)
    x = torch.tensor([-1.0, 5.0], device=device)
    y = weight * x
    with torch.no_grad():
        function(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_a_leaf_is_left_alone(function, device):
    leaf = torch.tensor([-1.0, 2.0], device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        function(leaf)
    assert leaf.tolist() == [-1.0, 2.0]
    with torch.no_grad():
        function(leaf)
    assert leaf.tolist() == [0.0, 2.0]


def no_grad_view(tensor):
    with torch.no_grad():
        return tensor[:2]


VIEWS = {
    "leaf": lambda tensor: tensor[:2],
    "one-of-several": lambda tensor: (tensor * 1).split(2)[0],
    "without-gradients": lambda tensor: no_grad_view(tensor * 1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_a_view_that_autograd_cannot_follow_is_left_alone(function, view, device):
    leaf = torch.tensor([-1.0, 2.0, -3.0], device=device, requires_grad=True)
    part = view(leaf)
    with pytest.raises(RuntimeError, match=r"view|leaf"):
        function(part)
    assert part.tolist() == [-1.0, 2.0]
    part = leaf[:2].detach()
    function(part)
    assert leaf.tolist() == [0.0, 2.0, -3.0]


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_a_tensor_of_inference_mode_is_left_alone_outside_of_it(function, device):
    with torch.inference_mode():
        x = torch.tensor([-1.0, 2.0], device=device)
    with pytest.raises(RuntimeError, match=r"(?i)inference"):
        function(x)
    assert x.tolist() == [-1.0, 2.0]
    with torch.inference_mode():
        function(x)
    assert x.tolist() == [0.0, 2.0]


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_a_negated_view_is_written(function, device):
    """torch stores the imaginary part of a conjugate with the other sign."""
    numbers = torch.tensor([1 + 2j, 3 - 4j], device=device)
    imaginary = numbers.conj().imag
    assert imaginary.is_neg()
    function(imaginary)
    assert imaginary.tolist() == [0.0, 4.0]
    assert numbers.tolist() == [1 + 0j, 3 - 4j]


@pytest.mark.parametrize("negated", ["running_mean", "running_var", "both"])
def test_running_statistics_that_are_negated_views_are_written(negated, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 5, 5, generator=generator).to(device)
    weight = torch.randn(3, 3, 1, 1, generator=generator).to(device)

    def moved(norm):
        running = {name: torch.ones(3, device=device) for name in ("running_mean", "running_var")}
        for name in running if negated == "both" else [negated]:
            running[name] = torch._neg_view(-running[name])
        return [norm(**running), *(one + 0 for one in running.values())]

    expected = moved(lambda **running: F.batch_norm(x, **running, training=True))
    assert_close(moved(lambda **running: ops.batch_norm(x, **running, training=True)), expected)
    after = moved(lambda **running: F.batch_norm(F.conv2d(x, weight), **running, training=True))
    assert_close(
        moved(lambda **running: ops.conv2d_batch_norm(x, weight, **running, training=True)), after
    )


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_gradient_goes_through(function, device):
    x = torch.tensor([-1.0, 2.0, 0.0], device=device, requires_grad=True)
    function(x * 3).sum().backward()
    assert x.grad.tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize("function", IN_PLACE.values(), ids=IN_PLACE)
def test_an_expanded_tensor_without_elements_is_returned(function, device):
    x = torch.empty(1, 0, device=device).expand(2, 0)
    assert function(x) is x
