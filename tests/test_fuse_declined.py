"""Forwards of which a record would do something else, and models that change after one was made."""

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import tritorch
from tests.fusing import place_of

pytestmark = pytest.mark.reference


class Model(nn.Module):
    def __init__(self, compute, **more):
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(3), nn.ReLU()
        for name, value in more.items():
            setattr(self, name, value)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)


def both(model):
    converted = tritorch.convert(model.double(), inplace=True)
    return converted, tritorch.fuse(copy.deepcopy(converted), inplace=True)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


def in_float32(m, x):
    with torch.autocast("cpu", enabled=False):
        return F.relu(m.bn(x))


def frozen(m, x):
    m.bn.eval()
    return F.relu(m.bn(x))


def another_momentum(m, x):
    m.bn.momentum = 0.5
    return F.relu(m.bn(x))


def keeping_on_a_child(m, x):
    y = m.act(m.bn(x))
    m.act.last = y
    return y


def with_data(m, x):
    y = F.relu(m.bn(x))
    y.data = y * 3
    return y


def floating(m, x):
    if x.dtype in {torch.float16, torch.bfloat16}:
        x = x.float()
    return F.relu(m.bn(x))


def copied(m, x):
    y = copy.deepcopy(x)
    y *= 2
    return F.relu(m.bn(x)) + y


def seeding(m, x):
    torch.manual_seed(5)
    return F.relu(m.bn(x))


CLASS = "its forward tests the class of a tensor"
LOOKS_UP = "its forward hashes a tensor or its attribute"
WRITES_OUT = "its forward formats a tensor or its attribute as text"
DECLINED = {
    "function": (lambda m, x: F.relu(m.bn(Reversed.apply(x))), CLASS),
    "class of an attribute": (
        lambda m, x: F.relu(m.bn(x)) if isinstance(x.mT, torch.Tensor) else m.bn(x),
        CLASS,
    ),
    "as_tensor": (lambda m, x: F.relu(m.bn(torch.as_tensor(x))), CLASS),
    "float32": (in_float32, "its forward enters a context"),
    "asks autocast": (
        lambda m, x: F.relu(m.bn(x)) if torch.is_autocast_enabled("cpu") else m.bn(x),
        "its forward differs under autocast",
    ),
    "frozen": (frozen, "its forward changes a module that it calls"),
    "momentum": (another_momentum, "its forward changes a module that it calls"),
    "kept on a child": (keeping_on_a_child, CLASS),
    "set of dtypes": (floating, LOOKS_UP),
    "branch of a dictionary": (lambda m, x: {4: F.relu}.get(x.dim(), F.elu)(m.bn(x)), LOOKS_UP),
    "branch by name": (
        lambda m, x: F.relu(m.bn(x)) if str(x.dtype) == "torch.float64" else m.bn(x),
        WRITES_OUT,
    ),
    "branch by shape": (lambda m, x: F.relu(m.bn(x)) * len(f"{x.shape}"), WRITES_OUT),
    "branch by repr": (lambda m, x: F.relu(m.bn(x)) * len(repr(x.device)), WRITES_OUT),
    "grad_fn": (
        lambda m, x: F.relu(m.bn(x if x.grad_fn is None else x.detach())),
        "its forward may ask whether grad_fn is None",
    ),
    "copied": (copied, "its forward copies a tensor by copy.deepcopy"),
    "seed": (seeding, "its forward seeds torch's generator"),
    "grad_fn of an attribute": (
        lambda m, x: F.relu(m.bn(x)) if x.T.grad_fn is None else m.bn(x),
        "its forward may ask whether grad_fn is None",
    ),
    "data": (with_data, "its forward sets the attribute data of a tensor"),
    "numpy": (
        lambda m, x: F.relu(m.bn(x)) * float(np.random.rand() + 1),
        "its forward draws random numbers in Python",
    ),
}


@pytest.mark.parametrize("case", DECLINED)
def test_forward_stays_and_its_model_is_as_before(case):
    compute, reason = DECLINED[case]
    model = tritorch.convert(Model(compute), inplace=True)
    before = {name: dict(vars(one)) for name, one in model.named_modules()}
    drawn = np.random.get_state()[2]
    report = tritorch.fusion_report(model)
    assert report.fused == {}
    assert report.kept[""].startswith(reason)
    assert type(tritorch.fuse(model, inplace=True)) is Model
    after = {name: dict(vars(one)) for name, one in model.named_modules()}
    assert str(after) == str(before)
    assert np.random.get_state()[2] == drawn


def averaged(m, x):
    # one of numpy's
    return F.relu(m.bn(x)) * np.average(x)


@pytest.mark.parametrize(
    ("compute", "text"),
    [
        (in_float32, "m.bn(x)"),
        (with_data, "y.data"),
        (floating, "torch.float16"),
        (keeping_on_a_child, "m.act.last"),
        (copied, "copy.deepcopy"),
        (averaged, "np.average"),
    ],
)
def test_reason_has_the_line_of_a_function_that_the_forward_calls(compute, text):
    model = tritorch.convert(Model(compute), inplace=True)
    assert tritorch.fusion_report(model).kept[""].endswith(f" ({place_of(compute, text)})")


def test_reason_has_the_line_of_the_forward():
    class Summing(Model):
        def forward(self, x):
            if torch.sum(x) > 0:
                x = -x
            return F.relu(self.bn(x))

    model = tritorch.convert(Summing(None), inplace=True)
    place = place_of(Summing, "torch.sum(x)")
    assert place.startswith("test_fuse_declined.py:")
    assert tritorch.fusion_report(model).kept[""] == (
        "torch.fx cannot trace it: symbolically traced variables cannot be used as inputs to"
        f" control flow ({place})"
    )


class Listed(nn.Module):
    """What it does is in a list that anybody can change."""

    def __init__(self):
        super().__init__()
        self.bn, self.flags = nn.BatchNorm2d(3), [True]

    def forward(self, x):
        return F.relu(self.bn(x)) if self.flags[0] else self.bn(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))

    def forward(self, x):
        for bn in self.bns:
            x = F.relu(bn(x))
        return x * getattr(self, "scale", 1.0)


def test_lists_of_numbers_are_not_recorded():
    converted, fused = both(Listed())
    assert tritorch.fusion_report(fused).kept[""] == (
        "it may read flags, a list, whose contents can change"
    )
    for model in (converted, fused):
        model.flags[0] = False
    assert_close(fused(images()), converted(images()))


CHANGES = {
    "append": lambda m: m.bns.append(nn.BatchNorm2d(3).double()),
    "del": lambda m: m.bns.__delitem__(0),
    "new attribute": lambda m: setattr(m, "scale", 3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing_take_effect(change):
    converted, fused = both(Stack())
    assert set(tritorch.fusion_report(fused).fused) == {"bns.0", "bns.1"}
    for model in (converted, fused):
        CHANGES[change](model)
    assert_close(fused(images()), converted(images()))


class Walk(nn.Module):
    """Goes through a Sequential itself."""

    def __init__(self):
        super().__init__()
        self.bn, self.rest = nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3))

    def forward(self, x):
        x = F.relu(self.bn(x))
        for layer in self.rest:
            x = layer(x)
        return x


def test_a_sequence_that_grows_is_gone_through():
    converted, fused = both(Walk())
    assert tritorch.fusion_report(fused).fused == {"bn": "relu"}
    for model in (converted, fused):
        model.rest.append(nn.Tanh())
    assert_close(fused(images()), converted(images()))


def sequence():
    layers = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()
    return nn.Sequential(*layers)


# what torch makes of a sequence by its class, and its own way for it
REMADE = {
    "reversed": lambda m: m[::-1],
    "shorter": lambda m: m[:2],
    "renamed": lambda m: type(m)(OrderedDict(zip("abc", m, strict=True))),
}


@pytest.mark.parametrize("way", REMADE)
def test_a_sequence_that_is_made_of_another_runs_its_own_forward(way):
    converted, fused = both(sequence())
    assert tritorch.fusion_report(fused).fused == {"0": "statistics of 1", "1": "relu"}
    found, expected = REMADE[way](fused), REMADE[way](converted)
    assert_close(found(images()), expected(images()))
    assert tritorch.fusion_report(found).fused == {}


def test_a_forward_replaced_on_its_class_is_called(monkeypatch):
    converted, fused = both(Stack())
    first = fused(images())
    monkeypatch.setattr(Stack, "forward", lambda self, x: self.bns[0](x) * 3)
    assert_close(fused(images()), converted(images()))
    assert tritorch.fusion_report(fused).fused == {}
    monkeypatch.undo()
    assert fused(images()).shape == first.shape
    assert set(tritorch.fusion_report(fused).fused) == {"bns.0", "bns.1"}


def test_marks_that_no_forward_names_change_nothing():
    _, fused = both(Stack())
    fused._seen_by_somebody = True
    assert set(tritorch.fusion_report(fused).fused) == {"bns.0", "bns.1"}


def test_class_of_somebody_else_stays():
    converted, fused = both(Stack())

    class Sharded(type(fused)):
        def shards(self):
            return 2

    fused.__class__ = Sharded
    fused.scale = converted.scale = 3.0
    assert fused.shards() == 2
    assert_close(fused(images()), converted(images()))
    assert type(tritorch.fuse(fused, inplace=True)) is Sharded


class Registered(Stack):
    def __init_subclass__(cls, *, kind):
        cls.kind = kind


def test_class_that_takes_no_subclass_stays():
    converted, fused = both(Registered())
    assert type(fused) is Registered
    assert tritorch.fusion_report(fused).fused == {}
    assert_close(fused(images()), converted(images()))


def test_what_a_tensor_lacks_a_value_lacks():
    converted, fused = both(
        Model(lambda m, x: F.relu(m.bn(x.tensors if hasattr(x, "tensors") else x)))
    )
    assert tritorch.fusion_report(fused).fused == {"bn": "relu"}
    assert_close(fused(images()), converted(images()))
