"""What `tritorch.fuse` leaves as it is written, and the reasons it gives."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tritorch
from examples.models import resnet
from tests.fusing import (
    Model,
    activations_of,
    check_same,
    fused_of,
    iadd,
    images,
    kept_of,
    pair,
    patched,
    trained,
)
from tests.fusing import epilogues as epilogues

pytestmark = pytest.mark.reference


class Odd(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


SEES = "its result is used more than once"
CHANGES_FIRST = "its input or statistics may change before the addition"
# of what torch lets nobody differentiate
FORWARD_ALONE = ("what it reads changes", "a view of what changes", "written over")
HOOKS = "it has hooks, or its forward is replaced"
# what is not fused: a model, the layer, and why
REFUSED = {
    "used twice": (lambda: Model(lambda m, x: F.relu(y := m.bn(x)) * y), "bn", SEES),
    "returned": (lambda: Model(lambda m, x: F.relu(y := m.bn(x)) + 0 * y), "bn", SEES),
    "sum used twice": (lambda: Model(lambda m, x: F.relu(y := m.bn(x) + x) * y), "bn", SEES),
    "nothing follows": (lambda: Model(lambda m, x: m.bn(x)), "bn", "no activation follows"),
    "other follows": (lambda: Model(lambda m, x: F.elu(m.bn(x))), "bn", "no activation follows"),
    "scaled": (
        lambda: Model(lambda m, x: F.relu(torch.add(m.bn(x), x, alpha=2))),
        "bn",
        "no activation follows",
    ),
    "number": (lambda: Model(lambda m, x: F.relu(m.bn(x) + 1)), "bn", "no activation follows"),
    "slope": (
        lambda: Model(lambda m, x: F.leaky_relu(m.bn(x), 0.2)),
        "bn",
        "the kernels have no leaky_relu(negative_slope=0.2)",
    ),
    "slope of a module": (
        lambda: Model(lambda m, x: m.act(m.bn(x)), nn.LeakyReLU(0.2)),
        "bn",
        "the kernels have no LeakyReLU(negative_slope=0.2)",
    ),
    "hooks": (
        lambda: Model(lambda m, x: F.relu(m.bn(x)), bn=hooked(nn.BatchNorm2d(3))),
        "bn",
        HOOKS,
    ),
    "hooks on the activation": (
        lambda: Model(lambda m, x: m.act(m.bn(x)), hooked(nn.ReLU())),
        "bn",
        "act has hooks, or its forward is replaced",
    ),
    "patched activation": (
        lambda: Model(lambda m, x: m.act(m.bn(x)), patched(nn.ReLU())),
        "bn",
        "act has hooks, or its forward is replaced",
    ),
    "two places": (
        lambda: Model(lambda m, x: F.relu(m.bn(F.relu(m.bn(x))))),
        "bn",
        "it is used in more than one place",
    ),
    "subclass": (
        lambda: Model(lambda m, x: F.relu(m.bn(x)), bn=Odd(3)),
        "bn",
        "Odd is not a layer of tritorch",
    ),
    "added to itself": (
        lambda: Model(lambda m, x: F.relu((y := m.bn(x)) + y)),
        "bn",
        "it is added to itself",
    ),
    "in place to another": (
        lambda: Model(lambda m, x: F.relu(iadd(x * 2, m.bn(x)))),
        "bn",
        "it is added in place to another value",
    ),
    "what it reads changes": (
        lambda: Model(lambda m, x: F.relu(m.bn(y := m.conv(x)) + y.mul_(2).detach())),
        "bn",
        CHANGES_FIRST,
    ),
    "a view of what changes": (
        lambda: Model(lambda m, x: F.relu(m.bn(m.act(x)) + x.mul_(2).detach()), nn.Identity()),
        "bn",
        CHANGES_FIRST,
    ),
    "hooks on what it reads": (
        lambda: Model(
            lambda m, x: F.relu(iadd(m.bn(m.hooked(x)), m.conv(x))),
            hooked=hooked(nn.Conv2d(3, 3, 1)),
        ),
        "bn",
        CHANGES_FIRST,
    ),
    "its statistics are read": (
        lambda: Model(lambda m, x: F.relu(iadd(m.bn(m.conv(x)), x * m.bn.running_var.sum()))),
        "bn",
        CHANGES_FIRST,
    ),
    "its statistics were read": (
        lambda: Model(
            lambda m, x: (
                (s := m.bn.running_var.view(1, 3, 1, 1), y := m.bn(m.conv(x)))
                and F.relu(y + s * x.detach())
            )
        ),
        "bn",
        CHANGES_FIRST,
    ),
    "an argument": (
        lambda: Model(lambda m, x: F.relu(m.bn(x, activation="tanh"))),
        "bn",
        "it is called with more than one argument",
    ),
    "written over": (
        lambda: Model(lambda m, x: torch.sigmoid(x, out=m.bn(x))),
        "bn",
        "no activation follows",
    ),
    "another conv activation": (
        lambda: Model(lambda m, x: torch.sigmoid(m.conv(x))),
        "conv",
        "Conv2d takes no sigmoid",
    ),
    "not called": (
        lambda: Model(lambda m, x: F.relu(F.batch_norm(x, None, None, training=True))),
        "bn",
        "its module's forward does not call it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_stays_apart_has_a_reason(case):
    make, layer, reason = REFUSED[case]
    converted, fused = pair(make())
    assert kept_of(fused)[layer] == reason
    assert fused_of(fused) == {}
    assert type(fused) is Model
    if case in FORWARD_ALONE:
        with torch.no_grad():
            assert_close(fused.eval()(images()), converted.eval()(images()))
    else:
        assert_close(trained(fused, images()), trained(converted, images()))


def drawing(m, x):
    return F.relu(m.bn(x)) if random.random() < 2 else x


def checkpointed(m, x):
    return F.relu(checkpoint(m.bn, x, use_reentrant=False))


def saving_on_cpu(m, x):
    with torch.autograd.graph.save_on_cpu():
        return F.relu(m.bn(x))


def without_gradient(m, x):
    with torch.no_grad():
        y = m.bn(x)
    return F.relu(y) + x


def in_bfloat16(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.relu(m.bn(m.conv(x.float())))


def remembering(m, x):
    m.last = m.bn(x)
    return F.relu(m.last)


def counting(m, x):
    m.seen.append(1)
    return F.relu(m.bn(x)) * len(m.seen)


def scaling_in_place(m, x):
    y = F.relu(m.bn(x))
    y *= 2
    return y


VALUES = (
    "torch.fx cannot trace it: symbolically traced variables cannot be used as inputs to"
    " control flow"
)
ANOTHER = "its forward differs in evaluation or without gradients"
CONTEXT = "its forward enters a context such as no_grad or autocast"
CLASS = "its forward tests the class of a tensor"
# what a record would not do, and why there is none
UNTRACEABLE = {
    "values": (lambda m, x: F.relu(m.bn(x)) if x.sum() > 0 else m.bn(x), VALUES),
    "training": (lambda m, x: F.relu(m.bn(x)) if m.training else m.bn(x), ANOTHER),
    "a child's training": (lambda m, x: F.relu(m.bn(x)) if m.bn.training else x, ANOTHER),
    "dropout": (lambda m, x: F.dropout(F.relu(m.bn(x)), 0.0, m.training), ANOTHER),
    "gradients": (lambda m, x: F.relu(m.bn(x)) if torch.is_grad_enabled() else m.bn(x), ANOTHER),
    "class": (lambda m, x: F.relu(y) if isinstance(y := m.bn(x), torch.Tensor) else y[0], CLASS),
    "no_grad": (without_gradient, CONTEXT),
    "autocast": (in_bfloat16, CONTEXT),
    "saved tensors": (saving_on_cpu, CONTEXT),
    "checkpoint": (checkpointed, CLASS),
    "random": (drawing, "its forward draws random numbers in Python"),
    "a tensor of its own": (
        lambda m, x: F.relu(m.bn(x)) if torch.rand(1) < 2 else x,
        "its forward calls aten.rand.default without any of its arguments",
    ),
    "remembers": (remembering, CLASS),
    "counts": (counting, "its forward changes attributes of its module"),
    "in place": (scaling_in_place, "its forward changes a tensor in place by __imul__"),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_forward_that_cannot_be_recorded_stays(case):
    compute, reason = UNTRACEABLE[case]
    model = Model(compute, seen=[])
    before = {name: id(value) for name, value in vars(model).items()}
    drawn = random.getstate()
    fused = tritorch.fuse(tritorch.convert(model, inplace=True), inplace=True)
    assert type(fused) is Model
    assert model.seen == []
    assert {name: id(value) for name, value in vars(model).items()} == before
    assert random.getstate() == drawn
    assert kept_of(fused) == {"": reason}


def test_forward_of_an_instance_stays():
    model = patched(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fused = tritorch.fuse(model, inplace=True)
    assert type(fused) is nn.Sequential
    assert kept_of(fused) == {"": "its forward is replaced on the instance"}
    assert_close(fused(images()), images() * 2)


def test_children_are_fused_where_the_top_cannot_be_traced():
    blocks = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    model = Model(lambda m, x: m.blocks(x) if x.sum() > -1e9 else x, blocks=blocks)
    fused = check_same(model)
    assert fused_of(fused) == {"blocks.1": "relu"}
    assert "cannot trace" in kept_of(fused)[""]


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x, mask=None):
        y = F.relu(self.bn(x))
        return y if mask is None else y * mask


class Two(Optional):
    def forward(self, x, other):
        y = F.relu(self.bn(x.mul(1) if hasattr(x, "mul") else x[0]))
        return y if other is None else y + other


def test_optional_arguments_are_not_recorded():
    fused = check_same(Optional())
    assert kept_of(fused) == {"": "its forward has optional arguments"}


def test_what_is_no_tensor_takes_the_forward_as_written(epilogues):
    converted, fused = pair(Two())
    x = images()
    assert fused_of(fused) == {"bn": "relu"}
    for arguments in ((x, x), (x, None), ([x], x)):
        assert_close(fused(*arguments), converted(*arguments))
    assert_close(fused(x, other=x), converted(x, other=x))
    assert len(epilogues) == 2


def test_layers_that_were_not_converted_stay_torchs():
    network = tritorch.convert(resnet.resnet18((1, 1), 5, width=4), exclude="layer1")
    fused = tritorch.fuse(network)
    assert type(fused.layer1[0].bn1) is nn.BatchNorm2d
    assert kept_of(fused)["layer1.0.bn1"] == "BatchNorm2d is not a layer of tritorch"
    assert set(activations_of(fused)) == {"bn1", "layer2.0.bn1", "layer2.0.bn2"}
