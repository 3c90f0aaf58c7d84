"""Activations: what torch does in corners, in place and as epilogues, and what peers get wrong."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import backend, launch, ops
from tritorch.ops import matmul_function
from tritorch.ops.activation import REFERENCES
from tritorch.registry import Sample, specs
from tritorch.testing import battery, battery_torch
from tritorch.testing.trials import Case

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
EPILOGUES = [name for name in REFERENCES if name != "relu"]


def check(findings):
    assert not findings, "\n".join(f"{f.kind} [{f.case}] {f.message}" for f in findings)


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


def test_third_derivatives_are_refused(device):
    x = torch.ones(2, device=device, requires_grad=True, dtype=torch.float64)
    (first,) = torch.autograd.grad(ops.silu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="third order"):
        torch.autograd.grad(second.sum(), x)


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


def linear_with(activation):
    """The linear op as a subject whose samples have this activation."""
    spec = next(spec for spec in specs() if spec.name == "linear")

    def samples(make):
        shapes = {"input": make(5, 7), "weight": make(4, 7), "bias": make(4)}
        yield Sample("small", **shapes, activation=activation, layouts=True)
        yield Sample(
            "tiny",
            input=make(3, 2),
            weight=make(2, 2),
            bias=make(2),
            activation=activation,
            gradcheck=True,
        )
        long = {"input": make(3, 200), "weight": make(5, 200), "bias": None}
        yield Sample("splits", **long, activation=activation)

    return replace(spec, samples=samples, accuracy="composite")


@pytest.mark.parametrize("activation", EPILOGUES)
def test_epilogue_of_linear(activation, device):
    subject = linear_with(activation)
    for name, dtype in (("small", torch.float32), ("small", torch.float16)):
        check(battery.values(subject, Case(name, dtype, device)))
    check(battery_torch.gradcheck(subject, Case("tiny", torch.float64, device)))
    check(battery_torch.second_gradient(subject, Case("tiny", torch.float64, device)))


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_epilogue_after_a_split_sum(activation, device, monkeypatch):
    # the rule for composite ops knows no length of sums, so that few terms make many splits
    monkeypatch.setattr(matmul_function, "_MIN_STEPS", 2)
    check(battery.values(linear_with(activation), Case("splits", torch.float32, device)))


@pytest.mark.parametrize(
    ("activation", "tensors"), [("tanh", 3), ("gelu", 4), ("hardswish", 4), (None, 2)]
)
def test_linear_keeps_the_value_before_only_where_it_must(activation, tensors, device):
    kept = set()

    def note(tensor):
        kept.add(tensor.data_ptr())
        return tensor

    # the bias is a parameter, which exists anyway
    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((3, 2), (4, 2), (4,)))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ops.linear(x, w, b, activation)
    assert len(kept) == tensors


def test_linear_without_gradient_is_one_launch(device):
    x, w = torch.randn(3, 2, device=device), torch.randn(4, 2, device=device)
    with launch.recorded() as launches:
        y = ops.linear(x, w, None, "gelu")
    assert launches == ["matmul_kernel"]
    assert_close(y, F.gelu(F.linear(x, w)))
