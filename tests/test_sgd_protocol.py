"""The protocol around a step of tritorch.optim, and the steps that it leaves to torch's own."""

import re

import pytest
import torch
from torch import nn

from tests.optimizers import fallbacks as fallbacks
from tests.optimizers import kernels as kernels
from tritorch import backend, launch, ops, optim

pytestmark = [pytest.mark.reference, pytest.mark.interpret]


class Run:
    """Two parameters, an optimizer, and gradients that depend on the step alone; all exact."""

    def __init__(self, kind, device, **given):
        starts = [torch.arange(6.0).view(2, 3), torch.arange(5.0)]
        self.params = [nn.Parameter(start.double().to(device)) for start in starts]
        self.optimizer = kind.SGD(self.params, **{"lr": 0.5, "momentum": 0.5} | given)
        self.steps = 0

    def set_grads(self):
        self.steps += 1
        for param in self.params:
            param.grad = torch.full_like(param, self.steps)

    def step(self):
        self.set_grads()
        self.optimizer.step()
        return self

    def values(self):
        return [param.tolist() for param in self.params]


def test_a_trajectory_written_out(device, kernels):
    """The first gradient is not dampened, the decay is part of the gradient."""
    param = nn.Parameter(torch.ones((), dtype=torch.float64, device=device))
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    seen = []
    for _ in range(3):
        param.grad = torch.ones_like(param)
        optimizer.step()
        seen.append(param.item())
    assert seen == pytest.approx([0.89, 0.73655, 0.54476225], rel=1e-9)
    assert optim.SGD([param]).defaults["lr"] == 1e-3


def test_zero_grad(device, kernels):
    run = Run(optim, device).step()
    run.optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in run.params)
    run.optimizer.zero_grad()
    assert all(param.grad is None for param in run.params)


def test_closure_runs_with_gradients_and_its_loss_comes_back(device, kernels):
    param = nn.Parameter(torch.full((3,), 2.0, device=device))
    optimizer = optim.SGD([param], lr=0.25)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 12
    assert param.tolist() == [1.0] * 3
    assert optimizer.step() is None


def test_hooks_run_once(device, kernels):
    # torch wraps a class's step when it makes the first object: ours must not call a wrapped one
    torch.optim.SGD([torch.ones(1)])
    run = Run(optim, device)
    seen = []
    run.optimizer.register_step_pre_hook(lambda *arguments: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *arguments: seen.append("after"))
    run.step()
    assert seen == ["before", "after"]


def test_autograd_sees_the_write_and_records_nothing(device, kernels):
    run = Run(optim, device).step()
    param = run.params[0]
    buffer = run.optimizer.state[param]["momentum_buffer"]
    loss = param.square().sum()
    versions = param._version, buffer._version
    run.step()
    assert param.is_leaf
    assert param.requires_grad
    assert not buffer.requires_grad
    assert param._version > versions[0]
    assert buffer._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_op_records_nothing_where_gradients_are_enabled(device, kernels):
    param = nn.Parameter(torch.ones(3, device=device))
    ops.sgd_step([param], [torch.ones_like(param)], [], lr=0.5)
    assert param.is_leaf
    assert param.tolist() == [0.5] * 3


def test_inference_mode(device, kernels):
    with torch.inference_mode():
        values = [Run(kind, device).step().step().values() for kind in (optim, torch.optim)]
    assert values[0] == values[1]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_state_made_in_inference_mode_is_not_written_outside_of_it(name, device, kernels):
    for kind in (torch.optim, optim):
        param = nn.Parameter(torch.ones(3, device=device))
        given = {"momentum": 0.5} if name == "SGD" else {}
        optimizer = getattr(kind, name)([param], lr=0.5, **given)
        param.grad = torch.ones_like(param)
        optimizer.step()
        state = optimizer.state[param]
        [moved] = state.keys() & {"momentum_buffer", "exp_avg"}
        with torch.inference_mode():
            state[moved] = state[moved].clone()
        with pytest.raises(RuntimeError, match=r"(?i)inference"):
            optimizer.step()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_parameters_that_got_their_data_in_inference_mode(name, device, kernels):
    values = []
    for kind in (torch.optim, optim):
        param = nn.Parameter(torch.zeros(3, device=device))
        with torch.inference_mode():
            param.data = torch.ones(3, device=device)
        assert param.is_inference()
        param.grad = torch.ones_like(param)
        getattr(kind, name)([param], lr=0.5).step()
        values.append(param.detach().clone())
    torch.testing.assert_close(values[1], values[0])
    assert not (values[0] == 1).any()


def test_grad_scaler(device, kernels):
    def scaled(kind):
        run = Run(kind, device)
        scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=100)
        scales = []
        for step in range(4):
            run.set_grads()
            for param in run.params:
                param.grad.mul_(scaler.scale(torch.ones((), device=device)))
            if step == 1:
                run.params[0].grad[0, 0] = float("inf")
            if step == 2:
                scaler.unscale_(run.optimizer)
                nn.utils.clip_grad_value_(run.params, 2.0)
            scaler.step(run.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return run.values(), scales

    ours, scales = scaled(optim)
    assert (ours, scales) == scaled(torch.optim)
    assert scales == [4.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "given",
    [
        {"lr": -1.0},
        {"lr": torch.tensor([1.0, 2.0])},
        {"momentum": -0.5},
        {"weight_decay": -0.5},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.5, "dampening": 0.5},
        {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
        {"params": []},
        {"params": torch.ones(3)},
    ],
    ids="-".join,
)
def test_bad_arguments_raise_torchs_error(given, device):
    arguments = {"params": [nn.Parameter(torch.ones(3, device=device))], "lr": 0.5} | given
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        torch.optim.SGD(**arguments)
    with pytest.raises(expected.type) as ours:
        optim.SGD(**arguments)
    assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"foreach": False}, "foreach=False"),
        ({"fused": True}, "fused=True"),
        ({"lr": torch.tensor(0.5, requires_grad=True)}, "lr is a tensor"),
        ({"weight_decay": torch.tensor(0.5, requires_grad=True)}, "weight_decay is a tensor"),
    ],
    ids=["foreach", "fused", "lr", "weight_decay"],
)
def test_torchs_own_step_takes_what_the_kernels_do_not(given, reason, device, fallbacks):
    try:
        theirs = Run(torch.optim, device, **given).step().step()
    except TypeError as error:
        # older ones have no such step on a GPU
        with pytest.raises(TypeError, match=re.escape(str(error))):
            Run(optim, device, **given).step()
        return
    with launch.recorded() as launches:
        ours = Run(optim, device, **given).step().step()
    assert launches == []
    assert ours.values() == theirs.values()
    reasons = fallbacks()
    assert reasons is None or [text.startswith(reason) for text in reasons] == [True]


def test_differentiable_step_goes_to_torch(device, fallbacks):
    def gradient(kind):
        start = torch.full((3,), 2.0, device=device, requires_grad=True)
        param = start.clone()
        optimizer = kind.SGD([param], lr=0.5, differentiable=True)
        param.grad = start * start
        optimizer.step()
        param.sum().backward()
        return start.grad.tolist()

    # of start - lr * start^2
    assert gradient(optim) == gradient(torch.optim) == [-1.0] * 3
    assert fallbacks() in (None, ["differentiable=True"])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sparse_gradients_go_to_torch(momentum, device, fallbacks):
    def outcome(kind):
        run = Run(kind, device, momentum=momentum)
        try:
            for _ in range(2):
                run.set_grads()
                for param in run.params:
                    param.grad = param.grad.to_sparse()
                run.optimizer.step()
        except RuntimeError as error:
            return str(error)
        return run.values()

    assert outcome(optim) == outcome(torch.optim)
    assert fallbacks() in (None, ["a sparse gradient"])


def test_complex_parameters_go_to_torch(device, fallbacks):
    params = [nn.Parameter(torch.full((3,), 1 + 2j, device=device)) for _ in range(2)]
    for param, kind in zip(params, (optim, torch.optim), strict=True):
        param.grad = torch.full_like(param, 2 - 1j)
        kind.SGD([param], lr=0.5).step()
    assert torch.equal(*params)
    assert fallbacks() in (None, ["dtype complex64"])


def test_strict_refuses_to_leave_the_kernels(device, fallbacks):
    run = Run(optim, device, foreach=False)
    if fallbacks() is None:
        # the reference path is no fallback
        with backend.strict():
            run.step()
        return
    with backend.strict(), pytest.raises(backend.FallbackError, match=r"sgd_step.*foreach=False"):
        run.step()


def test_the_rest_is_torchs():
    assert optim.RMSprop is torch.optim.RMSprop
    assert optim.lr_scheduler is torch.optim.lr_scheduler
    assert issubclass(optim.SGD, torch.optim.SGD)
    assert optim.SGD is not torch.optim.SGD
    assert set(dir(torch.optim)) <= set(dir(optim))
    with pytest.raises(AttributeError, match="no attribute 'Adamant'"):
        _ = optim.Adamant
    names = {}
    exec("from tritorch.optim import *", names)
    assert names["SGD"] is optim.SGD
    assert names["AdamW"] is optim.AdamW
    assert names["RMSprop"] is torch.optim.RMSprop
