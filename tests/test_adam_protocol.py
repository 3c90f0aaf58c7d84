"""The protocol around a step of Adam and AdamW: checkpoints, groups, scaling, hooks, errors."""

import copy

import pytest
import torch
from torch import nn

from tests.optimizers import KINDS, Run, assert_close, both
from tests.optimizers import kernels as kernels
from tritorch import launch, optim

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

STATE = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


@KINDS
def test_checkpoints_go_both_ways(kind, device, kernels):
    given = {"weight_decay": 0.1, "amsgrad": True, "betas": (0.5, 0.75), "maximize": True}
    expected = Run(torch.optim, kind, device, **given).step(3)
    for order in ((torch.optim, optim, torch.optim), (optim, torch.optim, optim)):
        previous = None
        for module in order:
            # every option comes from the checkpoint
            run = Run(module, kind, device, **given if previous is None else {"lr": 4.0})
            if previous is not None:
                run.optimizer.load_state_dict(copy.deepcopy(previous.optimizer.state_dict()))
                run.steps = previous.steps
                for param, other in zip(run.params, previous.params, strict=True):
                    param.data.copy_(other.data)
            previous = run.step()
        assert_close(previous, expected)


@pytest.mark.parametrize("amsgrad", [False, True])
@KINDS
def test_state_dict_is_torchs(kind, amsgrad, device, kernels):
    ours, torchs = (
        run.step(2).optimizer.state_dict() for run in both(kind, device, amsgrad=amsgrad)
    )
    assert ours["param_groups"] == torchs["param_groups"]
    assert ours["state"].keys() == torchs["state"].keys()
    for number, state in torchs["state"].items():
        mine = ours["state"][number]
        assert mine.keys() == state.keys() == STATE - (set() if amsgrad else {"max_exp_avg_sq"})
        assert mine["step"].dtype == torch.float32
        assert mine["step"].device.type == "cpu"
        assert mine["step"] == 2
        assert not mine["exp_avg"].requires_grad


def test_parameter_groups(device, kernels):
    ours, torchs = both("AdamW", device)
    for run in (ours, torchs):
        run.step()
        added = [nn.Parameter(run.values(shape, 50)) for shape in ((5,), (2, 2))]
        run.params += added
        run.optimizer.add_param_group({"params": added, "lr": 0.25, "amsgrad": True, "eps": 1e-3})
    with launch.recorded() as launches:
        ours.step()
    assert len(launches) == 2 * kernels
    torchs.step()
    assert_close(ours, torchs)


@KINDS
def test_grad_scaler(kind, device, kernels):
    def scaled(module):
        run = Run(module, kind, device)
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
        return run, scales

    (ours, scales), (torchs, expected) = scaled(optim), scaled(torch.optim)
    assert_close(ours, torchs)
    assert scales == expected == [4.0, 2.0, 2.0, 2.0]
    # the step that met infinity is none
    assert ours.tensors()["step 0"] == 3


def test_compiled_step(device, kernels):
    pair = both("AdamW", device, amsgrad=True)
    torch.compiler.reset()
    for each in pair:
        # torch's compiler makes an optimizer of CUDA tensors capturable, its steps on the GPU
        step = torch.compile(each.optimizer.step, backend="aot_eager")
        for _ in range(3):
            each.set_grads()
            step()
    assert_close(*pair)


def test_closure_hooks_and_copies(device, kernels):
    run = Run(optim, "AdamW", device)
    seen = []
    run.optimizer.register_step_pre_hook(lambda *arguments: seen.append("before"))
    run.optimizer.register_step_post_hook(lambda *arguments: seen.append("after"))

    def closure():
        run.optimizer.zero_grad()
        loss = run.params[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert run.optimizer.step(closure) > 0
    assert seen == ["before", "after"]
    copied = copy.deepcopy(run)
    assert_close(copied.step(), run.step())
    assert isinstance(run.optimizer, torch.optim.AdamW)
    assert repr(run.optimizer) == repr(Run(torch.optim, "AdamW", device).optimizer)


@pytest.mark.parametrize(
    "given",
    [
        {"lr": -1.0},
        {"eps": -1.0},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, torch.tensor(0.5))},
        {"weight_decay": -0.5},
        {"fused": True, "differentiable": True},
        {"fused": True, "foreach": True},
        {"params": []},
    ],
    ids=str,
)
@KINDS
def test_bad_arguments_raise_torchs_error(kind, given, device):
    arguments = {"params": [nn.Parameter(torch.ones(3, device=device))]} | given
    with pytest.raises((RuntimeError, TypeError, ValueError)) as expected:
        getattr(torch.optim, kind)(**arguments)
    with pytest.raises(expected.type) as ours:
        getattr(optim, kind)(**arguments)
    assert str(ours.value) == str(expected.value)
