"""Other people's kernels are called as they are declared, and only for what they compute.

The stand-ins have the names, arguments, results and limits of the public sources, on torch.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from tests.settings import restored
from tritorch.bench import peers, session, timing
from tritorch.bench.cases import Planner, of_spec, workloads
from tritorch.bench.rows import Bench
from tritorch.cli import main
from tritorch.registry import Sample, specs

pytestmark = pytest.mark.reference


def module(name, **content):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(content)
    return made


def native_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return torch.native_layer_norm(input, normalized_shape, weight, bias, eps)


def max_pool2d_with_indices(
    input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False
):
    options = {"ceil_mode": ceil_mode, "return_indices": True}
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, **options)


FLAG_GEMS = {
    "relu": lambda x: F.relu(x),
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "tanh": lambda x: torch.tanh(x),
    "gelu": lambda A, *, approximate="none": F.gelu(A, approximate=approximate),
    "mm": lambda a, b: torch.mm(a, b),
    "softmax": lambda x, dim=-1, half_to_float=False: F.softmax(x, dim),
    "log_softmax": lambda self, dim, half_to_float=False: F.log_softmax(self, dim),
    "conv2d": lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: F.conv2d(
        input, weight, bias, stride, padding, dilation, groups
    ),
    "layer_norm": native_layer_norm,
    "max_pool2d_with_indices": max_pool2d_with_indices,
}


def last_dim_alone(base):
    class Layer(base):
        def forward(self, input):
            if self.dim != -1 and self.dim != input.ndim - 1:
                raise RuntimeError("Only softmax along the last dimension is supported.")
            return super().forward(input)

    return Layer


class ErfGELU(nn.GELU):
    def forward(self, input):
        return F.gelu(input)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    def forward(self, input, target):
        assert input.ndim == 2
        return F.cross_entropy(input, target, self.weight)


class Conv2d(nn.Conv2d):
    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1,
        bias=True, padding_mode="zeros", device="cuda", dtype=torch.float32,
    ):  # fmt: skip
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        )
        if self.dilation != (1, 1):
            raise RuntimeError("Convolutional layer only supports dilation of 1 and (1, 1).")


class LayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True):
        if not isinstance(normalized_shape, int):
            raise RuntimeError("Normalized shape must be an integer.")
        super().__init__(normalized_shape, eps, elementwise_affine, bias)


ATTORCH = {
    **{name: getattr(nn, name) for name in ("ReLU", "SiLU", "Sigmoid", "Tanh")},
    **{name: getattr(nn, name) for name in ("MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss")},
    "GELU": ErfGELU,
    "Softmax": last_dim_alone(nn.Softmax),
    "LogSoftmax": last_dim_alone(nn.LogSoftmax),
    "CrossEntropyLoss": CrossEntropyLoss,
    "Conv2d": Conv2d,
    "LayerNorm": LayerNorm,
}


class InPlace(torch.autograd.Function):
    """Writes the gradient over its input, as Liger's cross entropy does."""

    @staticmethod
    def forward(ctx, input, target, options):
        with torch.enable_grad():
            leaf = input.detach().clone().requires_grad_()
            loss = F.cross_entropy(leaf, target, **options)
            if input.requires_grad:
                (grad,) = torch.autograd.grad(loss.sum(), leaf)
                input.data.copy_(grad)
        ctx.save_for_backward(input.detach())
        return loss.detach()

    @staticmethod
    def backward(ctx, grad_output):
        (input,) = ctx.saved_tensors
        return input.mul_(grad_output.reshape(-1, 1)), None, None


def liger_cross_entropy(
    input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None, return_z_loss=False,
):  # fmt: skip
    assert input.dim() == 2
    options = {"weight": weight, "ignore_index": ignore_index, "reduction": reduction}
    return InPlace.apply(input, target, options | {"label_smoothing": label_smoothing})


def liger_layer_norm(X, W, B, eps):
    rows = X.reshape(-1, X.shape[-1])
    assert rows.shape[1] == W.shape[0]
    return F.layer_norm(X, W.shape, W, B, eps)


def liger_group_norm(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
    assert X.shape[1] == num_channels
    return F.group_norm(X, num_groups, affine_scaling_weight, affine_shifting_bias, eps)


LIGER = {
    "liger_cross_entropy": liger_cross_entropy,
    "liger_layer_norm": liger_layer_norm,
    "liger_group_norm": liger_group_norm,
    "liger_softmax": lambda x: F.softmax(x, -1),
}


@pytest.fixture(autouse=True)
def all_installed(monkeypatch):
    functional = module("liger_kernel.transformers.functional", **LIGER)
    ops = module("flag_gems.ops", **FLAG_GEMS)
    for name, made in {
        "flag_gems": module("flag_gems", ops=ops),
        "flag_gems.ops": ops,
        "attorch": module("attorch", **ATTORCH),
        "liger_kernel": module("liger_kernel", __path__=[]),
        "liger_kernel.transformers": module("liger_kernel.transformers", __path__=[]),
        "liger_kernel.transformers.functional": functional,
    }.items():
        monkeypatch.setitem(sys.modules, name, made)
    with restored():
        yield


def cases(ops):
    """The samples of the tests, and calls as other people's kernels like them."""
    yield from workloads(ops, torch.float32, small=True)
    make = Planner(torch.float32)
    classes = make.classes(8, count=5)
    plain = {
        "softmax": {"input": make(4, 8), "dim": -1},
        "log_softmax": {"input": make(4, 8), "dim": 1},
        "layer_norm": {
            "input": make(2, 3, 8), "normalized_shape": (8,), "weight": make(8), "bias": make(8),
        },
        "cross_entropy": {"input": make(8, 5), "target": classes},
        "mse_loss": {"input": make(4, 8), "target": make(4, 8), "reduction": "none"},
    }  # fmt: skip
    for spec in specs():
        if spec.name in ops and spec.name in plain:
            yield of_spec(spec, Sample("plain", **plain[spec.name]), torch.float32)


def rows_of(name, ops):
    bench = Bench(torch.device("cpu"), timing.Plan(seconds=0.001, least=3))
    for case in cases(ops):
        slots = bench.slots(case)
        for which, whole in session.beside(case, [name]).items():
            for row in bench.rows(whole, which, slots):
                if row["implementation"] == name:
                    yield row


@pytest.mark.parametrize("name", peers.NAMES)
def test_each_call_of_a_peer_computes_what_torch_does(name):
    _, makers = peers._PEERS[name]
    found = list(rows_of(name, makers))
    # every op has a call that the peer has
    assert {row["op"] for row in found} == set(makers)
    for row in found:
        assert row["verified"], (row["op"], row["arguments"], row["pass"], row["failure"])
        assert row["speedup"] > 0


def passes(name, op):
    return {row["pass"] for row in rows_of(name, [op])}


def test_passes_that_a_peer_has_not_have_no_row():
    assert passes("flag_gems", "softmax") == {"forward"}
    assert passes("attorch", "relu") == {"forward", "backward", "both"}
    # the gradient of the one pass is there before the other begins
    assert passes("liger_kernel", "cross_entropy") == {"forward", "both"}


def test_what_a_peer_would_compute_otherwise_has_no_row():
    texts = {row["arguments"] for row in rows_of("attorch", ["gelu", "softmax", "conv2d"])}
    assert not any("approximate=tanh" in text for text in texts)
    assert not any("activation=relu" in text for text in texts)
    reductions = {row["arguments"] for row in rows_of("attorch", ["mse_loss"])}
    assert {"reduction=mean" in text for text in reductions} == {True, False}


def test_a_peer_without_a_function_has_no_row(monkeypatch):
    monkeypatch.delattr(sys.modules["flag_gems.ops"], "relu")
    assert list(rows_of("flag_gems", ["relu"])) == []


def test_a_peer_that_refuses_is_told_and_is_no_failure_of_ours(monkeypatch):
    def refuses(x):
        raise RuntimeError("not on this GPU")

    monkeypatch.setattr(sys.modules["flag_gems.ops"], "relu", refuses)
    (row,) = rows_of("flag_gems", ["relu"])
    assert row["failure"] == "raises RuntimeError: not on this GPU"
    # as on a machine with a GPU, where peers are asked for
    monkeypatch.setattr("tritorch.cli.bench._beside", lambda names, device: ("flag_gems",))
    command = ["bench", "relu", "--pass", "forward", "--seconds", "0.01", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert "flag_gems" in result.output
    assert "not on this GPU" in result.output
    assert result.exit_code == 0


def test_peers_are_not_asked_without_a_gpu():
    command = ["bench", "relu", "--pass", "forward", "--seconds", "0.01", "--device", "cpu"]
    assert "flag_gems" not in CliRunner().invoke(main, command).output
    result = CliRunner().invoke(main, [*command, "--vs", "attorch"])
    assert (result.exit_code, "attorch: it runs on a GPU alone" in result.output) == (3, True)


def test_a_peer_that_cannot_be_imported_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "attorch", None)
    monkeypatch.setattr("tritorch.cli.bench._beside", lambda names, device: ("attorch",))
    command = ["bench", "relu", "--pass", "forward", "--seconds", "0.01", "--device", "cpu"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "not measured: relu images: ModuleNotFoundError" in result.output
