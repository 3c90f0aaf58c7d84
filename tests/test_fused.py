"""What a fused call leaves to the layers as they are written."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.testing import assert_close

import tritorch
from tritorch import backend

pytestmark = pytest.mark.reference


class Block(nn.Module):
    def __init__(self, activation=F.relu, later=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)
        self.activation, self.later = activation, later

    def forward(self, x):
        r = x * 1
        y = self.activation(self.bn(self.conv(x)) + r)
        if self.later:
            r.mul_(0.5)
            return y + r
        return y


def both(model):
    converted = tritorch.convert(model.double(), inplace=True)
    return converted, tritorch.fuse(copy.deepcopy(converted), inplace=True)


def images():
    return torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_hooks_of_all_modules_see_every_layer():
    seen = []
    handle = hooks.register_module_forward_hook(
        lambda module, args, y: seen.append(type(module).__name__.removeprefix("Fused"))
    )
    try:
        found = []
        for model in both(Block()):
            model(images())
            found.append(seen.copy())
            seen.clear()
    finally:
        handle.remove()
    assert found[0] == found[1] == ["Conv2d", "BatchNorm2d", "Block"]


def test_meta_tensors_have_shapes():
    _, fused = both(Block())
    assert tritorch.fusion_report(fused).fused
    assert fused.to("meta")(images().to("meta")).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(("activation", "joined"), [(F.relu, True), (F.silu, False)])
def test_what_is_added_may_change_where_no_gradient_needs_it(activation, joined):
    converted, fused = both(Block(activation, later=True))
    assert ("addition" in str(tritorch.fusion_report(fused).fused)) == joined
    x = images()
    results = []
    for model in (converted, fused):
        leaf = x.clone().requires_grad_()
        with backend.use("reference"):
            y = model(leaf)
            y.square().sum().backward()
        results.append((y, leaf.grad, model.bn.running_mean))
    assert_close(*results)
    if not joined:
        reasons = tritorch.fusion_report(fused).kept
        assert reasons["bn"] == "the tensor that is added to it is used afterwards"


def around(self, input, weight, bias):
    return F.conv2d(F.pad(input, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)


def unchecked(self, input):
    self.checks += 1


# methods that a forward calls on its layer, replaced there, and the layers that are replaced so
REPLACED = {
    "convolution, then a norm": ("conv", "_conv_forward", around),
    "convolution, then relu": ("last", "_conv_forward", around),
    "norm": ("bn", "_check_input_dim", unchecked),
}


class Ends(Block):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, bias=False)
        self.last = nn.Conv2d(3, 3, 3)
        self.bn.checks = 0

    def forward(self, x):
        return F.relu(self.last(F.relu(self.bn(self.conv(x)))))


@pytest.mark.parametrize("case", REPLACED)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_methods_replaced_on_a_layer_are_called(case, first):
    name, method, replacement = REPLACED[case]

    def replace(model):
        layer = getattr(model, name)
        setattr(layer, method, types.MethodType(replacement, layer))

    model = Ends()
    if first:
        replace(model)
    models = both(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for one in models:
        # a copy of the model has methods of the layer that it was copied from
        replace(one)
    converted, fused = models
    assert_close(fused(x), converted(x))
    assert fused.bn.checks == converted.bn.checks == (method == "_check_input_dim")
