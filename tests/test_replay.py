"""A step through the kernels: all of it is compared, and a slightly wrong kernel is named."""

import pytest
import torch

from tritorch import backend, ops
from tritorch.data import Digits, split
from tritorch.training.replay import replay
from tritorch.training.train import run
from tritorch.training.twins import Lenet8, Settings, Twin

pytestmark = pytest.mark.interpret

BATCH = 4


class ScaledGradient(torch.autograd.Function):
    """Lets values pass, and makes their gradient a thousandth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.fixture
def digits(device):
    train, _ = split(0)
    return Digits(train.images[:BATCH].to(device), train.labels[:BATCH].to(device))


@pytest.fixture
def twin(device, digits):
    torch.manual_seed(0)
    twin = Twin(Lenet8().to(device), Settings(), converted=True)
    # momentum, and running statistics other than the first
    with backend.use("reference"):
        twin.step(digits.images, digits.labels)
    return twin


def step(twin, digits):
    checks = replay(twin.model, twin.loss, twin.optimizer, digits.images, digits.labels)
    return {check.tensor: check.verdict for check in checks}


def test_every_tensor_of_a_step_is_compared_and_accepted(twin, digits):
    before = {name: value.clone() for name, value in twin.model.state_dict().items()}
    verdicts = step(twin, digits)
    assert not [(name, v.failure) for name, v in verdicts.items() if not v.accepted]
    expected = {"loss: output", "loss: gradient of input"}
    for name, layer in twin.model.named_children():
        expected |= {f"{name}: output", f"{name}: gradient of input"}
        expected |= {f"{name}: {buffer}" for buffer, _ in layer.named_buffers()}
        expected |= {
            f"{name}: gradient of {parameter}" for parameter, _ in layer.named_parameters()
        }
    for name, _ in twin.model.named_parameters():
        expected |= {f"{name}: updated", f"{name}: momentum buffer"}
    # images need no gradient
    assert set(verdicts) == expected - {"conv1: gradient of input"}
    for name, value in twin.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_wrong_gradient_is_named(twin, digits, monkeypatch):
    right = ops.relu
    monkeypatch.setattr(
        ops, "relu", lambda x, inplace=False: right(ScaledGradient.apply(x), inplace)
    )
    wrong = {name for name, verdict in step(twin, digits).items() if not verdict.accepted}
    # what comes before is right for the gradient that it was given
    assert wrong == {"relu1: gradient of input", "relu2: gradient of input"}


def test_a_wrong_update_is_named(twin, digits, monkeypatch):
    right = ops.sgd_step

    def wrong_step(*lists, momentum, **scalars):
        right(*lists, momentum=momentum * 1.001, **scalars)

    monkeypatch.setattr(ops, "sgd_step", wrong_step)
    wrong = {name for name, verdict in step(twin, digits).items() if not verdict.accepted}
    assert {"linear.weight: momentum buffer", "conv2.weight: updated"} <= wrong
    assert {name.partition(": ")[2] for name in wrong} <= {"momentum buffer", "updated"}


def test_kernels_train_as_torch_does(device, digits):
    settings = Settings(epochs=1, batch=2, replay_steps=0)
    result = run(settings, torch.device(device), kernels=True, train=digits, test=digits)
    assert not [failure for failure in result.failures if "losses" in failure]
    assert result.kernels
    assert result.fallbacks == {}
