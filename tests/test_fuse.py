"""Activations fused into the layers before them: the same model, by fewer kernels.

The truth is the converted model before `tritorch.fuse`, which trains beside it in float64.
"""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import tritorch
import tritorch.nn.functional as ours
from examples.models import convnext, densenet, mobilenet, resnet, squeezenet, unet, vgg
from tests.fusing import (
    Model,
    activations_of,
    behind_a_norm,
    check_same,
    fused_of,
    iadd,
    images,
    pair,
    trained,
)
from tests.fusing import epilogues as epilogues
from tritorch import backend, launch
from tritorch.bench.resnet50 import ResNet50

reference = pytest.mark.reference


# a network, its images, and how many layers are fused: with an addition, with none
NETWORKS = {
    "resnet18": (lambda: resnet.resnet18((1, 1), 5, width=4), (4, 3, 16, 16), 2, 3),
    "resnet50": (lambda: resnet.resnet50((2, 1), 5, width=4), (4, 3, 16, 16), 3, 7),
    "bench": (lambda: ResNet50((1,), 5), (2, 3, 17, 17), 1, 3),
    "vgg11_bn": (lambda: vgg.vgg11_bn(5, dropout=0.0, width=2, size=1), (4, 3, 32, 32), 0, 10),
    "densenet121": (
        lambda: densenet.densenet121((2, 2), 5, growth=4, width=8),
        (4, 3, 16, 16),
        0,
        10,
    ),
    "squeezenet1_1": (
        lambda: squeezenet.squeezenet1_1(5, dropout=0.0, width=2),
        (2, 3, 33, 33),
        0,
        26,
    ),
    "mobilenet_v2": (
        lambda: mobilenet.mobilenet_v2(
            5, width=0.25, stages=((1, 16, 1, 1), (6, 24, 2, 2)), divisor=4, last=32, dropout=0.0
        ),
        (4, 3, 16, 16),
        0,
        7,
    ),
    "unet": (lambda: unet.UNet(num_classes=5, width=4, depth=1), (2, 1, 12, 12), 0, 6),
    "convnext_tiny": (
        lambda: convnext.convnext_tiny((1, 2), 5, width=8, layer_scale=0.5, dropped=0.0),
        (2, 3, 32, 32),
        0,
        3,
    ),
}


@reference
@pytest.mark.parametrize("name", NETWORKS)
def test_network_trains_as_before(name, epilogues):
    make, shape, added, alone = NETWORKS[name]
    torch.manual_seed(0)
    converted = tritorch.convert(make().double(), inplace=True)
    fused = tritorch.fuse(copy.deepcopy(converted))
    assert_close(trained(fused, images(*shape)), trained(converted, images(*shape)))
    what = [("addition" in value) for value in activations_of(fused).values()]
    assert (sum(what), len(what) - sum(what)) == (added, alone)
    # three steps and an evaluation, of the fused model alone
    assert len(epilogues) == 4 * (added + alone)
    assert sum(residual for *_, residual in epilogues) == 4 * added


SPELLINGS = {
    "relu": [
        lambda m, y: F.relu(y),
        lambda m, y: F.relu(y, inplace=True),
        lambda m, y: F.relu(input=y),
        lambda m, y: torch.relu(y),
        lambda m, y: F.relu_(y),
        lambda m, y: y.relu(),
        lambda m, y: y.relu_(),
        lambda m, y: ours.relu(y),
        lambda m, y: tritorch.relu_(y),
        nn.ReLU(),
        nn.ReLU(inplace=True),
    ],
    "relu6": [lambda m, y: F.relu6(y, True), nn.ReLU6(inplace=True)],
    "leaky_relu": [
        lambda m, y: F.leaky_relu(y),
        lambda m, y: F.leaky_relu(y, 0.01, True),
        lambda m, y: F.leaky_relu_(y, 0.01),
        nn.LeakyReLU(),
    ],
    "silu": [lambda m, y: F.silu(y, inplace=True), nn.SiLU()],
    "gelu": [lambda m, y: F.gelu(y), lambda m, y: F.gelu(y, approximate="none"), nn.GELU()],
    "gelu_tanh": [lambda m, y: ours.gelu(y, approximate="tanh"), nn.GELU("tanh")],
    "sigmoid": [
        lambda m, y: F.sigmoid(y),
        lambda m, y: torch.sigmoid(y),
        lambda m, y: y.sigmoid_(),
        nn.Sigmoid(),
    ],
    "tanh": [lambda m, y: torch.tanh_(y), lambda m, y: y.tanh(), nn.Tanh()],
    "hardswish": [lambda m, y: F.hardswish(y, True), nn.Hardswish()],
    "hardsigmoid": [lambda m, y: F.hardsigmoid(y), nn.Hardsigmoid()],
}
EVERY_SPELLING = [
    pytest.param(name, how, id=f"{name}-{number}")
    for name, spellings in SPELLINGS.items()
    for number, how in enumerate(spellings)
]


@reference
@pytest.mark.parametrize(("name", "how"), EVERY_SPELLING)
def test_every_spelling_of_an_activation(name, how, epilogues):
    fused = check_same(behind_a_norm(copy.deepcopy(how)))
    assert fused_of(fused) == {"bn": name}
    assert set(epilogues) == {("batch_norm", name, False)}


ADDITIONS = {
    "norm + x": lambda m, x: m.bn(m.conv(x)) + x,
    "x + norm": lambda m, x: x + m.bn(m.conv(x)),
    "torch.add": lambda m, x: torch.add(x, m.bn(m.conv(x))),
    "alpha=1": lambda m, x: torch.add(x, m.bn(m.conv(x)), alpha=1),
    "add": lambda m, x: x.add(m.bn(m.conv(x))),
    "norm.add_": lambda m, x: m.bn(m.conv(x)).add_(x),
    "norm += x": lambda m, x: iadd(m.bn(m.conv(x)), x),
    "operator.iadd": lambda m, x: operator.iadd(m.bn(m.conv(x)), x),
    "a step between": lambda m, x: iadd(m.bn(m.conv(x)), m.conv2(x)),
    "two norms": lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv2(x)),
    "two norms in place": lambda m, x: iadd(m.bn(m.conv(x)), m.bn2(m.conv2(x))),
}


def adding(addition, activation=F.relu):
    more = {"conv2": nn.Conv2d(3, 3, 1), "bn2": nn.BatchNorm2d(3)}
    return Model(lambda m, x: activation(addition(m, x)), **more)


@reference
@pytest.mark.parametrize("spelling", ADDITIONS)
def test_every_spelling_of_an_addition(spelling, epilogues):
    fused = check_same(adding(ADDITIONS[spelling]))
    layer = "bn2" if spelling == "two norms" else "bn"
    assert fused_of(fused) == {layer: "addition, relu"}
    assert epilogues == [("batch_norm", "relu", True)] * 4


@reference
@pytest.mark.parametrize("activation", SPELLINGS)
def test_every_activation_behind_an_addition(activation, epilogues):
    module = next(one for one in SPELLINGS[activation] if isinstance(one, nn.Module))
    check_same(Model(lambda m, x: m.act(m.bn(m.conv(x)) + x), copy.deepcopy(module)))
    assert epilogues == [("batch_norm", activation, True)] * 4


@reference
@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d, (4, 3)), (nn.BatchNorm1d, (4, 3, 2)), (nn.BatchNorm3d, (2, 3, 2, 2, 3))],
)
def test_norms_of_other_ranks(norm, shape, epilogues):
    fused = check_same(nn.Sequential(norm(3), nn.SiLU()), images(*shape))
    assert fused_of(fused) == {"0": "silu"}
    assert epilogues == [("batch_norm", "silu", False)] * 4


@reference
@pytest.mark.parametrize("activation", SPELLINGS)
def test_linear_takes_every_activation(activation, epilogues):
    module = next(one for one in SPELLINGS[activation] if isinstance(one, nn.Module))
    fused = check_same(nn.Sequential(nn.Linear(3, 5), copy.deepcopy(module)), images(4, 3))
    assert fused_of(fused) == {"0": activation}
    assert epilogues == [("linear", activation, False)] * 4


@reference
def test_conv2d_takes_relu_and_keeps_its_padding(epilogues):
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="reflect")
    fused = check_same(nn.Sequential(conv, nn.ReLU()))
    assert fused_of(fused) == {"0": "relu"}
    assert epilogues == [("conv2d", "relu", False)] * 4


@reference
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), (5, 1, 1, 1, 1)])
@pytest.mark.parametrize("addition", [operator.add, iadd])
def test_additions_that_broadcast(addition, shape, epilogues):
    model = Model(lambda m, x, r: F.relu(addition(m.bn(m.conv(x)), r)))
    model.__class__ = Broadcast
    if len(shape) > 4 and addition is iadd:
        converted, fused = pair(model)
        for one in (converted, fused):
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                one(images(), images(*shape))
        return
    fused = check_same(model, images(), images(*shape))
    assert fused_of(fused) == {"bn": "addition, relu"}
    assert epilogues == []


class Broadcast(Model):
    def forward(self, x, residual):
        return self.compute(self, x, residual)


@reference
@pytest.mark.parametrize("addition", [operator.add, iadd])
def test_autocast_makes_other_dtypes(addition, epilogues):
    """The norm's is bfloat16, the image's float32; in place the first one stays."""
    model = Model(lambda m, x: F.relu(addition(m.bn(m.conv(x)), x)))
    converted, fused = (one.float() for one in pair(model))
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(images().float()), converted(images().float())
    assert y.dtype == (torch.bfloat16 if addition is iadd else torch.float32)
    assert_close(y, expected, rtol=0, atol=0)
    assert epilogues == []


def kernels(model, device):
    """Of a step of training."""
    backend.reset()
    with launch.recorded() as launches:
        model(images(device=device)).sum().backward()
    assert backend.explain() == {}
    return [name for name in launches if name.startswith("activation")]


INTERPRETED = {
    "norm": lambda: behind_a_norm(nn.ReLU(inplace=True)),
    "addition": lambda: adding(ADDITIONS["norm += x"], lambda y: ours.silu(y)),
    "two norms": lambda: adding(ADDITIONS["two norms"], lambda y: ours.relu(y)),
    "conv": lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU()),
    "linear": lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
}


@pytest.mark.interpret
@pytest.mark.parametrize("case", INTERPRETED)
def test_kernels_of_the_activation_are_gone(case, device):
    fused = check_same(INTERPRETED[case](), device=device)
    assert "activation_forward_kernel" not in str(kernels(fused, device))
    unfused = tritorch.convert(tritorch.revert(fused))
    assert "activation_forward_kernel" in str(kernels(unfused, device))
