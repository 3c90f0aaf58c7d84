"""Activations: what torch does in corners and in place, and what peers get wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import backend, ops
from tritorch.ops.activation import REFERENCES

pytestmark = pytest.mark.interpret

FUNCTIONS = {
    "relu": ops.relu,
    "relu6": ops.relu6,
    "leaky_relu": ops.leaky_relu,
    "silu": ops.silu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "hardswish": ops.hardswish,
    "hardsigmoid": ops.hardsigmoid,
}
IN_PLACE = {
    "relu": (ops.relu, F.relu, {}),
    "relu6": (ops.relu6, F.relu6, {}),
    "leaky_relu": (ops.leaky_relu, F.leaky_relu, {"negative_slope": 0.2}),
    "silu": (ops.silu, F.silu, {}),
    "hardswish": (ops.hardswish, F.hardswish, {}),
    "hardsigmoid": (ops.hardsigmoid, F.hardsigmoid, {}),
}
# the corners of every definition, what overflows in some of them, and signed zeros
POINTS = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 0.625, -0.625, 1e-30, -1e-30, 1e4, -1e4, 1e20, -1e20]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_at_corners(name, device):
    x = torch.tensor([*POINTS, math.inf, -math.inf, math.nan])
    actual, expected = FUNCTIONS[name](x.to(device)).cpu(), REFERENCES[name](x.double())
    assert_close(actual, expected.float(), equal_nan=True)
    # a NaN has no sign
    assert torch.equal(actual.nan_to_num(0).signbit(), expected.nan_to_num(0).signbit())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_at_corners(name, device):
    # 1e20 squared overflows in float32, in torch as here
    points = torch.tensor([p for p in POINTS if abs(p) < 1e20])
    x = points.to(device).requires_grad_()
    y = points.double().requires_grad_()
    (actual,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    (expected,) = torch.autograd.grad(REFERENCES[name](y).sum(), y)
    assert_close(actual.cpu(), expected.float(), atol=1e-6, rtol=1e-5)


def test_gradient_of_relu_at_nan_and_at_zero(device):
    """Stopped where the output is not above zero, which NaN is not known to be."""
    x = torch.tensor([math.nan, 0.0, -0.0, -math.inf, math.inf], device=device).requires_grad_()
    for function in (ops.relu, F.relu):
        (grad,) = torch.autograd.grad(function(x), x, torch.full_like(x, 2.0))
        assert grad.tolist() == [2.0, 0.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_next_to_zero(dtype, device):
    """An error of the size of the unit roundoff, relative to a result however small."""
    x = torch.tensor([1e-3, -1e-5, 0.1, 0.62, 0.63, 1.0, 9.0], dtype=dtype, device=device)
    eps = torch.finfo(dtype).eps
    assert_close(ops.tanh(x), torch.tanh(x.double()).to(dtype), atol=0, rtol=4 * eps)


def test_gelu_does_not_cancel_where_torchs_formula_does(device):
    x = torch.tensor([-4.0, -5.0], device=device)
    expected = F.gelu(x.double(), approximate="tanh").float()
    assert_close(ops.gelu(x, approximate="tanh"), expected, atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_result_version_and_gradient_are_torchs(name, device):
    ours, theirs, options = IN_PLACE[name]
    results = []
    for function in (ours, theirs):
        leaf = torch.linspace(-7, 7, 12, device=device).view(3, 4).requires_grad_()
        x = (leaf * 1.0).t()
        version = x._version
        y = function(x, inplace=True, **options)
        assert y is x
        assert x._version == version + 1
        (grad,) = torch.autograd.grad(y, leaf, torch.ones(4, 3, device=device).cumsum(0))
        results.append((y.detach(), grad))
    assert_close(*results)


# of hardsigmoid torch has none
@pytest.mark.parametrize("name", [name for name in IN_PLACE if name != "hardsigmoid"])
def test_second_gradients_in_place_are_torchs(name, device):
    """Also the part of them that goes through the value that was overwritten."""
    ours, theirs, options = IN_PLACE[name]
    results = []
    for function in (ours, theirs):
        leaf = torch.linspace(-7, 7, 12, device=device, dtype=torch.float64).requires_grad_()
        y = function(leaf * leaf, inplace=True, **options)
        (first,) = torch.autograd.grad((y * y).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * first).sum(), leaf)
        results.append((first.detach(), second))
    assert_close(*results)


@pytest.mark.parametrize("name", IN_PLACE)
def test_hooks_of_a_view_are_called_as_torch_calls_them_in_place(name, device):
    ours, theirs, options = IN_PLACE[name]
    results = []
    for function in (ours, theirs):
        leaf = torch.linspace(-7, 7, 24, device=device).view(4, 6).requires_grad_()
        part, calls = (leaf * 2)[:, ::2], []
        part.register_hook(lambda grad, calls=calls: calls.append(grad.shape))
        (grad,) = torch.autograd.grad(function(part, inplace=True, **options).sum(), leaf)
        results.append((grad, calls))
    assert results[0][1] == results[1][1]
    assert_close(results[0][0], results[1][0])


def test_the_result_of_relu6_in_place_may_be_written(device):
    """A hard swish by hand, of which torch keeps the input."""
    results = []
    for function in (ops.relu6, F.relu6):
        leaf = torch.linspace(-7, 7, 12, device=device).requires_grad_()
        y = leaf * function(leaf + 3, inplace=True).div_(6)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        results.append((y.detach(), grad))
    assert_close(*results)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_refuses_a_leaf(name, device):
    ours, theirs, options = IN_PLACE[name]
    for function in (ours, theirs):
        leaf = torch.ones(3, device=device, requires_grad=True)
        with pytest.raises(RuntimeError, match="leaf"):
            function(leaf, inplace=True, **options)


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_noticed_by_what_saved_the_value(name, device):
    ours, _, options = IN_PLACE[name]
    x = torch.ones(3, device=device, requires_grad=True) * 2
    y = x * x
    ours(x, inplace=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", [*FUNCTIONS])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_other_dtypes_are_torchs(name, dtype, device):
    x = torch.tensor([0, 1, 1], dtype=dtype, device=device)
    with backend.strict(False):
        try:
            expected = REFERENCES[name](x)
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                FUNCTIONS[name](x)
        else:
            assert_close(FUNCTIONS[name](x), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_more_is_saved_than_torch_saves(name, device):
    def saved(function):
        kept = {}

        def note(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        x = torch.randn(6, 5, device=device, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(x)
        return sum(kept.values())

    assert saved(FUNCTIONS[name]) <= saved(REFERENCES[name]) == 120


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_third_order(name, device):
    """Which torch takes for products with the Hessian, by way of the gradient that comes in."""
    values = torch.linspace(-2.1, 2.3, 7, device=device, dtype=torch.float64)
    found = []
    for function in (FUNCTIONS[name], REFERENCES[name]):
        x = values.clone().requires_grad_()
        grad = torch.cos(values).requires_grad_()
        (first,) = torch.autograd.grad(function(x), x, grad, create_graph=True)
        derived = [first]
        for _ in range(2):
            total = sum((one * torch.sin(one)).sum() for one in derived)
            ends = torch.autograd.grad(total, (x, grad), create_graph=True, allow_unused=True)
            derived = [end for end in ends if end is not None]
            found.append([torch.zeros_like(x) if end is None else end for end in ends])
        product = torch.autograd.functional.hvp(lambda x, f=function: f(x).sin().sum(), x, grad)
        found.append(list(product))
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu"])
def test_a_second_derivative_of_lines_is_zero(name, device):
    """And no error of autograd, which there is for a tensor that no gradient reaches."""
    x = torch.linspace(-2.0, 8.0, 5, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_peer_defect_4_expanded_gradient(name, device):
    """`.sum().backward()` sends a stride of 0, which a flat kernel reads past its end."""
    x = torch.randn(5, 7, device=device, dtype=torch.float64, requires_grad=True)
    (actual,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    (expected,) = torch.autograd.grad(REFERENCES[name](x).sum(), x)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_peer_defect_3_channels_last_gradient(name, device):
    """A gradient of one layout beside a saved tensor of another."""
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = FUNCTIONS[name](x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 3, 4, 5, device=device)
    (actual,) = torch.autograd.grad(y, x, grad)
    (expected,) = torch.autograd.grad(REFERENCES[name](x), x, grad)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_of_any_sizes_has_it_twice(name, device):
    """torch.compile makes inputs of such programs of numbers too."""
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in ((2, 3), (3, 3))]

    def program(x, weight):
        y = ops.linear(FUNCTIONS[name](x), weight)
        return ops.linear(FUNCTIONS[name](y), weight, activation=name)

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    for run in (compiled, program):
        y = run(*leaves)
        found.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
    assert_close(*found)
