"""Torch's names under tritorch's: functions that have kernels, and all others."""

import copy
import importlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import tritorch
import tritorch.nn as nn
import tritorch.nn.functional as tritorch_functional
from tritorch import launch, ops

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

IMAGES = (2, 3, 6, 5)

FUNCTIONS = (
    "batch_norm",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "log_softmax",
    "max_pool2d_with_indices",
    "mse_loss",
    "relu",
    "relu6",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
)


def test_modules_of_ours_hold_torchs_names_too():
    assert tritorch.testing.assert_close is torch.testing.assert_close
    assert tritorch.ops.aten is torch.ops.aten
    assert tritorch.ops.relu is ops.relu
    for module in (tritorch.ops, tritorch.testing):
        assert not hasattr(module, "rellu")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_torchs_signature(name):
    """Ours may take more arguments after torch's, by keyword."""
    theirs = inspect.signature(getattr(F, name)).parameters
    ours = inspect.signature(getattr(tritorch_functional, name)).parameters
    shared = list(ours.values())[: len(theirs)]
    assert [p.name for p in shared] == list(theirs)
    assert [p.default for p in shared] == [p.default for p in theirs.values()]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])


def test_max_pool2d_has_torchs_signature():
    # torch's own takes *args
    parameters = inspect.signature(tritorch_functional.max_pool2d).parameters
    theirs = inspect.signature(F.max_pool2d_with_indices).parameters
    assert [(p.name, p.default) for p in parameters.values()] == [
        (p.name, p.default) for p in theirs.values()
    ]


def functional_calls():
    x = torch.randn(4, 3)
    probabilities = torch.rand(4, 3)
    images, weight = torch.randn(IMAGES), torch.randn(2, 3, 3, 3)
    classes = torch.tensor([0, 2, 1, 1])
    mean, var = torch.randn(3), torch.rand(3) + 0.5
    yield "linear", (x, torch.randn(2, 3), torch.randn(2)), {}
    yield "conv2d", (images, weight, torch.randn(2), 2, 1, 1, 1), {}
    yield "conv2d", (images, weight), {"padding": "same"}
    yield "max_pool2d", (images, 2, 1, 1, 1, True), {}
    yield "max_pool2d", (images, 2), {"return_indices": True}
    yield "max_pool2d_with_indices", (images, 2), {"stride": 1}
    yield "max_pool2d_with_indices", (images, 2, 2, 1, 2, True), {}
    yield "avg_pool2d", (images, 2, 1, 1, True, False, 3), {}
    yield "batch_norm", (images, mean, var, None, None, False, 0.1, 1e-3), {}
    yield "relu", (x,), {}
    yield "relu_", (x.clone(),), {}
    yield "cross_entropy", (x, classes), {"reduction": "none", "label_smoothing": 0.2}
    yield "mse_loss", (x, probabilities), {"reduction": "sum"}
    yield "mse_loss", (x, probabilities), {"weight": torch.rand(4, 3)}
    yield "binary_cross_entropy", (probabilities, probabilities.flip(0), x.abs()), {}
    yield "binary_cross_entropy_with_logits", (x, probabilities), {"pos_weight": torch.rand(3)}


def test_functions_compute_what_torchs_do(device):
    torch.manual_seed(0)
    for name, args, options in functional_calls():
        given = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to(device), (args, options)
        )
        expected = getattr(F, name)(*copy.deepcopy(given[0]), **given[1])
        actual = getattr(tritorch_functional, name)(*given[0], **given[1])
        assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "legacy", "reduction"),
    [
        ("cross_entropy", {"size_average": False}, "sum"),
        ("nll_loss", {"reduce": True}, "mean"),
        ("mse_loss", {"reduce": False}, "none"),
        ("l1_loss", {"size_average": False}, "sum"),
        ("smooth_l1_loss", {"reduce": False}, "none"),
        ("binary_cross_entropy", {"size_average": True, "reduce": True}, "mean"),
        ("binary_cross_entropy_with_logits", {"size_average": False}, "sum"),
    ],
)
def test_deprecated_arguments_of_losses_still_work(name, legacy, reduction, device, rung):
    torch.manual_seed(0)
    input, target = torch.rand(4, 3, device=device), torch.rand(4, 3, device=device)
    target = target.argmax(1) if name == "nll_loss" else target
    function = getattr(tritorch_functional, name)
    with (
        pytest.warns(UserWarning, match="args will be deprecated"),
        launch.recorded() as launches,
    ):
        actual = function(input, target, **legacy)
    assert_close(actual, getattr(F, name)(input, target, reduction=reduction))
    assert bool(launches) == (rung != "reference")


TOP_LEVEL = {
    "relu": lambda make: (make(3, 4),),
    "relu_": lambda make: (make(3, 4),),
    "sigmoid": lambda make: (make(3, 4),),
    "tanh": lambda make: (make(3, 4),),
    "softmax": lambda make: (make(3, 4), 1),
    "log_softmax": lambda make: (make(3, 4), 0),
    "dropout": lambda make: (make(3, 4), 1.0, True),
    "matmul": lambda make: (make(3, 4), make(4, 2)),
    "conv1d": lambda make: (make(2, 3, 6), make(4, 3, 2), make(4), 2, 1),
    "conv2d": lambda make: (make(2, 3, 6, 5), make(4, 3, 2, 2), make(4), 2, 1),
    "conv3d": lambda make: (make(2, 3, 4, 2, 3), make(4, 3, 2, 2, 2), make(4), 2, 1),
    "conv_transpose1d": lambda make: (make(2, 3, 4), make(3, 4, 2), make(4), 2, 1),
    "conv_transpose2d": lambda make: (make(2, 3, 4, 2), make(3, 4, 2, 2), make(4), 2, 1),
    "conv_transpose3d": lambda make: (make(2, 3, 2, 2, 2), make(3, 4, 2, 2, 2), make(4), 2, 1),
}


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_function_runs_the_kernels(name, device, rung):
    torch.manual_seed(0)
    args = TOP_LEVEL[name](lambda *shape: torch.randn(shape, device=device))
    expected = getattr(torch, name)(*copy.deepcopy(args))
    with launch.recorded() as launches:
        actual = getattr(tritorch, name)(*args)
    assert_close(actual, expected)
    assert bool(launches) == (rung != "reference")


def test_matmul_writes_to_out(device):
    a, b = torch.randn(3, 4, device=device), torch.randn(4, 2, device=device)
    out = torch.empty(3, 2, device=device)
    assert tritorch.matmul(a, b, out=out) is out
    assert_close(out, a @ b)


@pytest.mark.parametrize(
    ("statement", "torchs"),
    [
        ("from tritorch.nn import Sequential as found", "nn.Sequential"),
        ("from tritorch.nn import Embedding as found", "nn.Embedding"),
        ("from tritorch.nn.utils import clip_grad_norm_ as found", "nn.utils.clip_grad_norm_"),
        ("import tritorch.nn.utils.rnn as found", "nn.utils.rnn"),
        ("import tritorch.nn.init as found", "nn.init"),
        ("from tritorch.nn import init as found", "nn.init"),
        ("from tritorch.nn.functional import elu as found", "nn.functional.elu"),
        ("from tritorch.nn.parallel import DistributedDataParallel as found",
         "nn.parallel.DistributedDataParallel"),
        ("from tritorch.optim import RMSprop as found", "optim.RMSprop"),
        ("from tritorch.optim.lr_scheduler import StepLR as found", "optim.lr_scheduler.StepLR"),
        ("from tritorch.utils.data import DataLoader as found", "utils.data.DataLoader"),
        ("import tritorch.autograd as found", "autograd"),
        ("from tritorch import Tensor as found", "Tensor"),
        ("from tritorch import cuda as found", "cuda"),
        ("import tritorch as found; found = found.tensor", "tensor"),
    ],
)  # fmt: skip
def test_other_names_are_torchs_own(statement, torchs):
    namespace = {}
    exec(statement, namespace)
    expected = torch
    for part in torchs.split("."):
        expected = getattr(expected, part)
    assert namespace["found"] is expected


def test_torchs_modules_are_not_loaded_twice():
    importlib.import_module("tritorch.nn.utils.rnn")
    spec = importlib.util.find_spec("torch.nn.utils.rnn")
    assert torch.nn.utils.rnn.__spec__ is spec
    assert spec.name == "torch.nn.utils.rnn"


def test_own_modules_are_found_before_torchs():
    for name in ("backend", "data", "nn", "ops", "optim", "registry", "testing"):
        namespace = {}
        exec(f"from tritorch import {name} as found", namespace)
        assert namespace["found"].__name__ == f"tritorch.{name}"
    assert callable(tritorch.convert)
    importlib.import_module("tritorch.convert")
    assert callable(tritorch.convert)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("tritorch.kernels.none", "tritorch.kernels.none"), ("tritorch.none.at.all", "tritorch.none")],
)
def test_what_neither_has_is_said_under_its_own_name(name, missing):
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{missing}'"):
        importlib.import_module(name)
    assert importlib.util.find_spec("tritorch.kernels.none") is None


def test_star_import_brings_layers_and_torchs_names():
    namespace = {}
    exec("from tritorch.nn import *", namespace)
    assert namespace["Conv2d"] is nn.Conv2d
    assert namespace["Sequential"] is torch.nn.Sequential
    assert namespace["functional"] is tritorch_functional


def test_star_import_of_functions_brings_torchs_names_and_our_functions():
    ours, theirs = {}, {}
    exec("from tritorch.nn.functional import *", ours)
    exec("from torch.nn.functional import *", theirs)
    assert set(ours) == set(theirs)
    assert "F" not in ours
    for name in set(theirs) - {"__builtins__"}:
        # what has kernels is ours, and nothing else is another object
        own = getattr(ops, name, None) is ours[name] or name in vars(tritorch_functional)
        assert own or ours[name] is theirs[name], name
    assert ours["conv2d"] is ops.conv2d
    assert ours["torch"] is torch


@pytest.mark.parametrize(
    ("module", "torchs"), [(tritorch, torch), (nn, torch.nn), (tritorch_functional, F)]
)
def test_names_are_listed_and_unknown_ones_refused(module, torchs):
    assert set(dir(torchs)) <= set(dir(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        module.no_such_name  # noqa: B018
    with pytest.raises(ImportError, match="no_such_name"):
        exec(f"import {module.__name__}.no_such_name")
