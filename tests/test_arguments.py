"""What ops take for an argument: what torch takes; else they raise its error, and say why."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tritorch.nn as nn
import tritorch.nn.functional as tritorch_functional
from tritorch import backend

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

IMAGES = (2, 4, 6, 5)

# a call of each function, all of whose arguments have names
CALLS = {
    "conv1d": {"input": (2, 4, 6), "weight": (6, 4, 3)},
    "conv2d": {"input": IMAGES, "weight": (6, 4, 3, 3)},
    "conv_transpose2d": {"input": IMAGES, "weight": (4, 6, 3, 3)},
    "linear": {"input": (3, 4), "weight": (5, 4)},
    "max_pool1d": {"input": (2, 4, 6), "kernel_size": 2},
    "max_pool2d": {"input": IMAGES, "kernel_size": 2},
    "max_pool3d": {"input": (1, 2, 4, 3, 4), "kernel_size": 2},
    "avg_pool1d": {"input": (2, 4, 6), "kernel_size": 2},
    "avg_pool2d": {"input": IMAGES, "kernel_size": 2},
    "avg_pool3d": {"input": (1, 2, 4, 3, 4), "kernel_size": 2},
    "adaptive_avg_pool1d": {"input": (2, 4, 6), "output_size": 2},
    "adaptive_avg_pool2d": {"input": IMAGES, "output_size": 2},
    "adaptive_avg_pool3d": {"input": (1, 2, 4, 3, 4), "output_size": 2},
    "adaptive_max_pool2d": {"input": IMAGES, "output_size": 2},
    "batch_norm": {"input": IMAGES, "running_mean": (4,), "running_var": (4,), "training": True},
    "layer_norm": {"input": (3, 4), "normalized_shape": [4]},
    "group_norm": {"input": IMAGES, "num_groups": 2},
    "leaky_relu": {"input": (3, 4)},
    "gelu": {"input": (3, 4)},
    "softmax": {"input": (3, 4), "dim": 1},
    "log_softmax": {"input": (3, 4), "dim": 1},
    "dropout": {"input": (3, 4), "p": 0.0},
    "cross_entropy": {"input": (3, 4), "target": torch.tensor([0, 1, 3])},
    "nll_loss": {"input": (3, 4), "target": torch.tensor([0, 1, 3])},
    "smooth_l1_loss": {"input": (3, 4), "target": (3, 4)},
    "huber_loss": {"input": (3, 4), "target": (3, 4)},
    "binary_cross_entropy": {"input": torch.full((3, 4), 0.3), "target": torch.full((3, 4), 0.7)},
    "binary_cross_entropy_with_logits": {"input": (3, 4), "target": (3, 4)},
}

# what is no tensor, no integer, no number and neither True nor False
NO_TENSOR = (True, 0, 0.5, [1.0], "x", np.int64(2), np.ones(4, dtype=np.float32))
NO_INTEGER = (2.0, math.nan, True, "x", None, {}, np.float32(0.5), torch.tensor(2.0), torch.float64)
NO_NUMBER = ("x", None, [0.5], {}, torch.float64, torch.ones(1), torch.tensor(0.5).requires_grad_())
NO_FLAG = (1, 0, "x", None, np.bool_(True), torch.tensor(True), torch.ones(4))

NORMS = ("batch_norm", "layer_norm", "group_norm")
POOLS = [f"{kind}_pool{axes}d" for kind in ("avg", "max") for axes in (1, 2, 3)]

REFUSED = {
    **{(f, "bias"): NO_TENSOR for f in ("conv1d", "conv2d", "conv_transpose2d", "linear")},
    **{(f, name): NO_TENSOR for f in NORMS for name in ("weight", "bias")},
    ("batch_norm", "running_mean"): NO_TENSOR,
    ("batch_norm", "running_var"): NO_TENSOR,
    ("cross_entropy", "weight"): NO_TENSOR,
    ("nll_loss", "weight"): NO_TENSOR,
    ("binary_cross_entropy_with_logits", "weight"): NO_TENSOR,
    ("binary_cross_entropy_with_logits", "pos_weight"): NO_TENSOR,
    ("conv2d", "stride"): NO_INTEGER,
    ("conv2d", "groups"): NO_INTEGER,
    ("conv_transpose2d", "groups"): NO_INTEGER,
    ("conv_transpose2d", "padding"): NO_INTEGER,
    ("max_pool2d", "kernel_size"): NO_INTEGER,
    ("max_pool2d", "stride"): tuple(v for v in NO_INTEGER if v is not None),
    ("avg_pool2d", "divisor_override"): tuple(v for v in NO_INTEGER if v is not None),
    ("adaptive_avg_pool1d", "output_size"): NO_INTEGER,
    ("adaptive_avg_pool2d", "output_size"): (2.0, "x", None, np.int64(2), (True, 2), (2.0, 2)),
    ("adaptive_max_pool2d", "output_size"): ((2.0, 2), "xy", True, torch.tensor(2)),
    ("layer_norm", "normalized_shape"): (4, np.int64(4), "4", {4: 4}, (4.0,), torch.tensor([4])),
    ("group_norm", "num_groups"): tuple(v for v in NO_INTEGER if not isinstance(v, torch.Tensor)),
    # torch 2.11 takes a string for the name of a dimension
    ("softmax", "dim"): tuple(v for v in NO_INTEGER if v is not None and v != "x"),
    ("log_softmax", "dim"): tuple(v for v in NO_INTEGER if v is not None and v != "x"),
    ("softmax", "dtype"): ("float64", 2, np.float32(0.5), [torch.float64]),
    ("cross_entropy", "ignore_index"): NO_INTEGER,
    ("nll_loss", "ignore_index"): NO_INTEGER,
    ("batch_norm", "momentum"): NO_NUMBER,
    ("layer_norm", "eps"): NO_NUMBER,
    ("group_norm", "eps"): NO_NUMBER,
    ("leaky_relu", "negative_slope"): NO_NUMBER,
    ("cross_entropy", "label_smoothing"): NO_NUMBER,
    ("smooth_l1_loss", "beta"): NO_NUMBER,
    ("huber_loss", "delta"): NO_NUMBER,
    ("dropout", "p"): ("x", None, [0.5], math.nan, 1.5),
    ("dropout", "training"): NO_FLAG,
    ("batch_norm", "training"): NO_FLAG[:-1],
    **{(f, "ceil_mode"): NO_FLAG for f in POOLS},
    **{(f, "count_include_pad"): NO_FLAG for f in POOLS[:3]},
    ("gelu", "approximate"): (1, None, True, [], "erf"),
}

INTEGERS = (np.int64(2), np.int32(2), torch.tensor(2))
NUMBERS = (1, np.float32(0.5), np.int64(1), torch.tensor(0.5), torch.tensor(1))
TAKEN = {
    ("conv2d", "groups"): (np.int64(1), torch.tensor(1)),
    ("conv2d", "stride"): INTEGERS,
    ("conv_transpose2d", "groups"): INTEGERS,
    ("max_pool2d", "kernel_size"): INTEGERS,
    **{(f, "stride"): (*INTEGERS, [], ()) for f in POOLS},
    ("max_pool2d", "return_indices"): (1, 0, "x", None, np.bool_(True), torch.tensor(True)),
    ("adaptive_max_pool2d", "return_indices"): (1, 0, None),
    ("avg_pool2d", "divisor_override"): INTEGERS,
    ("adaptive_avg_pool1d", "output_size"): (*INTEGERS, (np.int64(3),)),
    ("adaptive_avg_pool2d", "output_size"): (
        (np.int64(2), 3),
        [torch.tensor(2), None],
        np.array([2, 3]),
    ),
    ("adaptive_max_pool2d", "output_size"): ((np.int64(2), 3),),
    ("layer_norm", "normalized_shape"): ((np.int64(4),), [torch.tensor(4)], torch.Size([4])),
    ("group_norm", "num_groups"): INTEGERS,
    ("softmax", "dim"): (np.int64(1), torch.tensor(0)),
    ("softmax", "dtype"): (float, torch.float64),
    ("cross_entropy", "ignore_index"): (np.int64(1), torch.tensor(1)),
    ("nll_loss", "ignore_index"): (np.int64(1), torch.tensor(1)),
    ("batch_norm", "momentum"): NUMBERS,
    ("batch_norm", "eps"): NUMBERS,
    ("layer_norm", "eps"): NUMBERS,
    ("group_norm", "eps"): NUMBERS,
    ("leaky_relu", "negative_slope"): NUMBERS,
    ("cross_entropy", "label_smoothing"): NUMBERS,
    ("smooth_l1_loss", "beta"): NUMBERS,
    ("huber_loss", "delta"): NUMBERS,
    ("dropout", "p"): (0, 1, np.float64(1.0), torch.tensor(1.0)),
}


def called(module, function, device, **given):
    draw = torch.Generator().manual_seed(0)
    arguments = {
        name: torch.rand(value, generator=draw) if isinstance(value, tuple) else value
        for name, value in CALLS[function].items()
    }
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    return getattr(module, function)(**(arguments | given))


def each(table):
    return [
        pytest.param(function, name, value, id=f"{function}-{name}-{value!r}")
        for (function, name), values in table.items()
        for value in values
    ]


@pytest.mark.parametrize(("function", "name", "value"), each(REFUSED))
def test_what_torch_refuses_is_refused_alike(function, name, value, device):
    with pytest.raises(Exception) as torchs:  # noqa: PT011  the class is what is asked for
        called(F, function, device, **{name: value})
    rule = "p must be" if name == "p" else f"({name}|stride and dilation)"
    with pytest.raises(torchs.type, match=rf"{function}: {rule}") as ours:
        called(tritorch_functional, function, device, **{name: value})
    assert ours.type is torchs.type


@pytest.mark.parametrize(("function", "name", "value"), each(TAKEN))
def test_what_torch_takes_is_taken(function, name, value, device):
    with backend.strict(name != "dtype"):
        ours = called(tritorch_functional, function, device, **{name: value})
    assert_close(ours, called(F, function, device, **{name: value}))


def test_layers_take_integers_of_numpy(device):
    x = torch.rand(IMAGES, device=device)
    for layer, given in (("MaxPool2d", (2, np.int64(2))), ("GroupNorm", (np.int64(2), 4))):
        with backend.strict():
            ours = getattr(nn, layer)(*given).to(device)(x)
        assert_close(ours, getattr(torch.nn, layer)(*given).to(device)(x))


# calls for the reference path alone, by function: tensors and other arguments, and why
DECLINED = {
    "linear": [
        (((3, 4), (5, 4), bias), {}, "a bias that broadcasts")
        for bias in ((), (1,), (1, 5), (3, 5), (3, 1))
    ]
    + [
        (((2, 3, 4), (5, 4), (3, 5)), {}, "a bias that broadcasts"),
        (((4,), (4,), ()), {}, "a bias of a vector"),
        (((2, 3, 4), (4,), ()), {}, "a bias of a vector"),
    ],
    "adaptive_avg_pool1d": [
        (((2, 3, 0),), {"output_size": 1}, "images without pixels"),
    ],
    "adaptive_avg_pool2d": [
        (((6, 5),), {"output_size": 1}, "2 dimensions"),
        (((2, 3, 4, 6, 5),), {"output_size": (1, 1)}, "5 dimensions"),
        (((2, 3, 0, 0),), {"output_size": 1}, "images without pixels"),
    ],
    "adaptive_avg_pool3d": [
        (((4, 6, 5),), {"output_size": 1}, "3 dimensions"),
        (((2, 3, 0, 6, 5),), {"output_size": 1}, "images without pixels"),
    ],
}


@pytest.mark.parametrize(
    ("function", "shapes", "given", "reason"),
    [
        pytest.param(function, *call, id=f"{function}-{call[0]}")
        for function, of_function in DECLINED.items()
        for call in of_function
    ],
)
def test_what_torch_takes_and_no_kernel_is_counted(function, shapes, given, reason, device, rung):
    results = []
    backend.reset()
    for module in (tritorch_functional, F):
        draw = torch.Generator().manual_seed(0)
        leaves = [torch.rand(s, generator=draw).to(device).requires_grad_() for s in shapes]
        output = getattr(module, function)(*leaves, **given)
        results.append((output, *torch.autograd.grad(output.sum(), leaves)))
    assert_close(*results, equal_nan=True)
    assert backend.explain() == ({} if rung == "reference" else {function: {reason: 1}})


@pytest.mark.parametrize(
    ("function", "shape", "output_size"),
    [
        ("adaptive_avg_pool2d", (), 1),
        ("adaptive_avg_pool2d", (4,), 1),
        ("adaptive_avg_pool2d", (4,), 2),
        ("adaptive_avg_pool2d", (4,), (1, 1)),
        ("adaptive_avg_pool2d", (4, 5), 2),
        ("adaptive_avg_pool2d", (2, 3, 0, 5), 2),
        ("adaptive_avg_pool2d", (2, 3, 0, 5), [1, None]),
        ("adaptive_avg_pool3d", (4, 5), 1),
        ("adaptive_avg_pool3d", (4, 5), 2),
        ("adaptive_avg_pool3d", (2, 0, 7, 6, 5), 2),
        ("adaptive_avg_pool1d", (4,), 1),
        ("adaptive_avg_pool1d", (2, 3, 4, 5), 1),
        ("adaptive_max_pool2d", (4,), 1),
        ("adaptive_max_pool2d", (2, 3, 0, 5), 1),
    ],
)
def test_images_of_no_such_shape_are_torchs_error(function, shape, output_size, device):
    x = torch.rand(shape, device=device)
    with pytest.raises((IndexError, RuntimeError, ValueError)) as torchs:
        getattr(F, function)(x, output_size)
    with pytest.raises(torchs.type, match=rf"{function}: input must be \(N, C, ") as ours:
        getattr(tritorch_functional, function)(x, output_size)
    assert ours.type is torchs.type


def test_volumes_without_channels_have_a_mean(device):
    x = torch.rand(2, 0, 7, 6, 5, device=device)
    assert nn.AdaptiveAvgPool3d(1)(x).shape == torch.nn.AdaptiveAvgPool3d(1)(x).shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 0, 3, 2), (0, 5, 3, 2), (3, 5, 0, 2)])
def test_of_nothing_batch_norm_asks_no_parameters(shape, training, device):
    x = torch.rand(shape, device=device)
    ours, theirs = (module.BatchNorm2d(4).to(device).train(training) for module in (nn, torch.nn))
    assert_close(ours(x), theirs(x))
    assert_close(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_no_probability_is_torchs_error(training, device):
    x = torch.rand(3, device=device)
    for module in (torch.nn, nn):
        with pytest.raises(RuntimeError, match=r"has to be between|p must be from 0 to 1 \(p nan"):
            module.Dropout(math.nan).train(training)(x)


def test_a_sum_that_torch_does_not_form_of_bools(device):
    x, y = torch.rand(3, device=device), torch.tensor([True, False, True], device=device)
    for module in (F, tritorch_functional):
        for beta in (0, 0.0):
            with pytest.raises(RuntimeError, match="Subtraction"):
                module.smooth_l1_loss(x, y, beta=beta)
    assert_close(tritorch_functional.smooth_l1_loss(x, y), F.smooth_l1_loss(x, y))
    for module in (F, tritorch_functional):
        with pytest.raises(RuntimeError, match="Subtraction"):
            module.binary_cross_entropy_with_logits(x, x, pos_weight=y)
    ours, theirs = (
        m.binary_cross_entropy_with_logits(x, x, weight=y) for m in (tritorch_functional, F)
    )
    assert_close(ours, theirs)


def test_weights_and_targets_that_no_kernel_reads(device, rung):
    """Complex, which torch refuses, and sparse, of which it takes some."""
    x, y = torch.rand(3, 4, device=device), torch.rand(3, 4, device=device)
    weights, sparse = torch.ones(4, device=device), torch.rand(3, 4, device=device).to_sparse()
    logits = "binary_cross_entropy_with_logits"
    for function in ("binary_cross_entropy", logits):
        for module in (F, tritorch_functional):
            with pytest.raises(RuntimeError, match="ComplexFloat can't be cast"):
                getattr(module, function)(x, y, weights.to(torch.complex64))
    backend.reset()
    for name, given in ((logits, (y, sparse)), ("cross_entropy", (sparse,))):
        ours, theirs = (getattr(m, name)(x, *given) for m in (tritorch_functional, F))
        assert_close(ours, theirs)
    reasons = {} if rung == "reference" else {"layout torch.sparse_coo": 1}
    assert backend.explain() == {name: reasons for name in (logits, "cross_entropy") if reasons}
    for module in (F, tritorch_functional):
        with pytest.raises(NotImplementedError):
            module.mse_loss(x, sparse)
