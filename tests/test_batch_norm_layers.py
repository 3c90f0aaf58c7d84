"""Batch norm layers under every flag, before and after construction, against torch.nn's."""

import itertools

import pytest
import torch
from torch.testing import assert_close

import tritorch.nn as nn

# which call a layer makes does not depend on the path that the call takes
pytestmark = pytest.mark.reference

# BatchNorm1d takes two shapes
INPUTS = {
    "BatchNorm1d": ((4, 3), (4, 3, 5)),
    "BatchNorm2d": ((2, 3, 2, 5),),
    "BatchNorm3d": ((2, 3, 2, 2, 3),),
}
CALLS = [(layer, shape) for layer, shapes in INPUTS.items() for shape in shapes]
CONSTRUCTIONS = [
    {"affine": affine, "track_running_stats": tracks, "momentum": momentum}
    for affine, tracks, momentum in itertools.product((True, False), (True, False), (0.3, None))
]
# what becomes of a layer later: torch reads each of these at every call
CHANGES = {
    "unchanged": {},
    "stops-tracking": {"track_running_stats": False},
    "starts-tracking": {"track_running_stats": True},
    "no-statistics": {"running_mean": None, "running_var": None},
    "no-counter": {"num_batches_tracked": None},
    "no-bias": {"bias": None},
    "no-weight": {"weight": None},
}


def steps(module, layer, options, shape, change, training, device):
    """Results, buffers and gradients of a step as constructed and of two after the change."""
    torch.manual_seed(0)
    one = getattr(module, layer)(3, **options).to(device, torch.float64)
    found = []
    for step in range(3):
        if step == 1:
            for name, value in change.items():
                setattr(one, name, value)
            one.train(training)
        values = torch.randn(shape, dtype=torch.float64) * (step + 1) + step
        x = values.to(device).requires_grad_()
        try:
            y = one(x)
        except Exception as error:
            found.append(type(error).__name__)
            continue
        inputs = [x, *one.parameters()]
        grads = torch.autograd.grad(y, inputs, torch.randn(shape, dtype=torch.float64).to(device))
        found.append([y.detach(), *grads, *(buffer.clone() for buffer in one.buffers())])
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("layer", "shape"), CALLS, ids=str)
def test_every_flag_before_and_after_construction(layer, shape, change, training, device):
    for options in CONSTRUCTIONS:
        expected, actual = (
            steps(module, layer, options, shape, change, training, device)
            for module in (torch.nn, nn)
        )
        for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            if isinstance(ours, str) or isinstance(theirs, str):
                assert ours == theirs, (options, step)
            else:
                assert_close(ours, theirs, msg=lambda text: f"{options}, step {step}: {text}")  # noqa: B023


@pytest.mark.parametrize(
    ("layer", "shape", "exception", "message"),
    [
        ("BatchNorm1d", (3,), ValueError, "expected 2D or 3D input"),
        ("BatchNorm2d", (2, 3, 4), ValueError, "expected 4D input"),
        ("BatchNorm3d", (2, 3, 4, 5), ValueError, "expected 5D input"),
        ("BatchNorm2d", (2, 2, 4, 5), RuntimeError, "running_mean"),
    ],
)
def test_wrong_shapes(layer, shape, exception, message, device):
    for module in (torch.nn, nn):
        with pytest.raises(exception, match=message):
            getattr(module, layer)(3).to(device)(torch.zeros(shape, device=device))


@pytest.mark.interpret
def test_peer_defect_15_the_counter_of_batches(device):
    """Counted before it is used: the first batch of a cumulative average counts in full."""
    layer = nn.BatchNorm1d(2, momentum=None).to(device)
    batches = torch.randn(3, 4, 2, device=device)
    for number, batch in enumerate(batches, 1):
        layer(batch)
        assert layer.num_batches_tracked == number
        assert_close(layer.running_mean, batches[:number].mean((0, 1)))


def test_state_dict_is_torchs():
    state = nn.BatchNorm2d(3).state_dict()
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(state) == names
    assert state["num_batches_tracked"].dtype == torch.int64
    assert state["num_batches_tracked"].shape == ()
    assert state._metadata[""]["version"] == 2
