"""Activations fused into the layers before them: the same model, by fewer kernels.

The truth is the converted model before `tritorch.fuse`, which trains beside it in float64.
"""

import copy
import io
import operator
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import tritorch
import tritorch.nn.functional as ours
from examples.models import convnext, densenet, mobilenet, resnet, squeezenet, unet, vgg
from tritorch import backend, launch, ops
from tritorch.bench.resnet50 import ResNet50

reference = pytest.mark.reference


class Model(nn.Module):
    """A convolution and a batch norm, and what is computed with them."""

    def __init__(self, compute, activation=None, **more):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.act = activation
        for name, value in more.items():
            setattr(self, name, value)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def images(*shape, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (4, 3, 5, 6), generator=generator, dtype=torch.float64).to(device)


def pair(model, device="cpu"):
    """Converted and fused, of the same values."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5)
    converted = tritorch.convert(model.to(device, torch.float64), inplace=True)
    return converted, tritorch.fuse(copy.deepcopy(converted), inplace=True)


def trained(model, *inputs, steps=3):
    """Results, gradients and state of some steps of training, then a result in evaluation."""
    found = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        leaves = [one.clone().requires_grad_() for one in inputs]
        # what it changes in place is no leaf
        y = model.train()(*[leaf * 1 for leaf in leaves])
        optimizer.zero_grad()
        y.square().mean().backward()
        found += [y.detach(), *(leaf.grad for leaf in leaves)]
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        found += [buffer.clone() for buffer in model.buffers()]
    with torch.no_grad():
        found.append(model.eval()(*[one.clone() for one in inputs]))
    model.train()
    return found


def check_same(model, *inputs, device="cpu"):
    converted, fused = pair(model, device)
    inputs = inputs or (images(device=device),)
    assert_close(trained(fused, *inputs), trained(converted, *inputs))
    return fused


def fused_of(model):
    return dict(tritorch.fusion_report(model).fused)


def activations_of(model):
    return {k: v for k, v in fused_of(model).items() if not v.startswith("statistics")}


def kept_of(model):
    return dict(tritorch.fusion_report(model).kept)


@pytest.fixture
def epilogues(monkeypatch):
    """What layers ask their ops for beyond torch's arguments: the op, activation, a residual."""
    found = []

    def watched(name, op):
        def call(*args, **kwargs):
            # of linear and conv2d it is the last argument
            last = args[-1] if name in ("linear", "conv2d") else None
            activation = kwargs.get("activation", last)
            if isinstance(activation, str):
                found.append((name, activation, kwargs.get("residual") is not None))
            return op(*args, **kwargs)

        return call

    for name in ("batch_norm", "linear", "conv2d", "conv2d_batch_norm"):
        monkeypatch.setattr(ops, name, watched(name, getattr(ops, name)))
    return found


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


def activate(m, y):
    return m.act(y)


def behind_a_norm(how):
    """A model with that activation, a function or a module."""
    step, module = (activate, how) if isinstance(how, nn.Module) else (how, None)
    return Model(lambda m, x: step(m, m.bn(m.conv(x))), module)


@reference
@pytest.mark.parametrize(("name", "how"), EVERY_SPELLING)
def test_every_spelling_of_an_activation(name, how, epilogues):
    fused = check_same(behind_a_norm(copy.deepcopy(how)))
    assert fused_of(fused) == {"bn": name}
    assert set(epilogues) == {("batch_norm", name, False)}


def iadd(a, b):
    a += b
    return a


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


class Odd(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def patched(layer):
    layer.forward = lambda input: input * 2
    return layer


SEES = "its result is used more than once"
CHANGES_FIRST = "what it reads may change before the addition"
# of what torch lets nobody differentiate
FORWARD_ALONE = ("what it reads changes", "a view of what changes", "written over")
HOOKS = "it has hooks, or a forward of its own"
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
        "hooks on act, or a forward of its own",
    ),
    "patched activation": (
        lambda: Model(lambda m, x: m.act(m.bn(x)), patched(nn.ReLU())),
        "bn",
        "hooks on act, or a forward of its own",
    ),
    "two places": (
        lambda: Model(lambda m, x: F.relu(m.bn(F.relu(m.bn(x))))),
        "bn",
        "it is used in more than one place",
    ),
    "subclass": (
        lambda: Model(lambda m, x: F.relu(m.bn(x)), bn=Odd(3)),
        "bn",
        "Odd is no layer of tritorch",
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
    "an argument": (
        lambda: Model(lambda m, x: F.relu(m.bn(x, activation="tanh"))),
        "bn",
        "it is called with more than an input",
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


@reference
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
ANOTHER = "its forward is another one in evaluation, or without gradients"
CONTEXT = "its forward enters a context: no_grad or autocast, say"
CLASS = "its forward asks for the class of a value"
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
        "its forward calls aten.rand.default on no value that it is given",
    ),
    "remembers": (remembering, CLASS),
    "counts": (counting, "its forward changes attributes of its module"),
    "in place": (scaling_in_place, "its forward changes a value by __imul__"),
}


@reference
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


@reference
def test_forward_of_an_instance_stays():
    model = patched(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    fused = tritorch.fuse(model, inplace=True)
    assert type(fused) is nn.Sequential
    assert kept_of(fused) == {"": "its forward is replaced on the instance"}
    assert_close(fused(images()), images() * 2)


@reference
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


@reference
def test_optional_arguments_are_not_recorded():
    fused = check_same(Optional())
    assert kept_of(fused) == {"": "its forward has optional arguments"}


@reference
def test_what_is_no_tensor_takes_the_forward_as_written(epilogues):
    converted, fused = pair(Two())
    x = images()
    assert fused_of(fused) == {"bn": "relu"}
    for arguments in ((x, x), (x, None), ([x], x)):
        assert_close(fused(*arguments), converted(*arguments))
    assert_close(fused(x, other=x), converted(x, other=x))
    assert len(epilogues) == 2


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


@reference
def test_later_hooks_see_what_they_would_have_seen(epilogues):
    converted, fused = pair(Model(lambda m, x: m.act(m.bn(m.conv(x)) + x), nn.ReLU()))
    for layer in ("bn", "act"):
        seen = []
        for model in (fused, converted):
            hook = getattr(model, layer).register_forward_hook(
                lambda module, args, output, seen=seen: seen.append(output.clone())
            )
            model(images())
            hook.remove()
        assert len(seen) == 2
        assert_close(*seen)
    assert epilogues == []
    fused(images())
    assert epilogues == [("batch_norm", "relu", True)]


@reference
def test_hooks_on_the_module_run_as_before():
    converted, fused = pair(behind_a_norm(nn.ReLU()))
    for model in (converted, fused):
        model.register_forward_hook(lambda module, args, output: output * 3)
    assert_close(trained(fused, images()), trained(converted, images()))


CHANGES = {
    "an option": lambda m: setattr(m.act, "negative_slope", 0.3),
    "the activation": lambda m: setattr(m, "act", nn.Tanh()),
    "the norm": lambda m: setattr(m, "bn", nn.Identity()),
    "an attribute": lambda m: setattr(m, "compute", lambda m, x: m.bn(x)),
    "the layer's class": lambda m: setattr(m.bn, "__class__", nn.BatchNorm2d),
}


@reference
@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing_take_effect(change):
    converted, fused = pair(behind_a_norm(nn.LeakyReLU()))
    for model in (converted, fused):
        CHANGES[change](model)
    assert_close(trained(fused, images()), trained(converted, images()))


@reference
def test_attribute_that_is_deleted_is_missed():
    _, fused = pair(Model(lambda m, x: F.relu(m.bn(x)) * m.factor, factor=2))
    assert fused_of(fused) == {"bn": "relu"}
    del fused.factor
    with pytest.raises(AttributeError, match="factor"):
        fused(images())


@reference
def test_sequences_are_edited_as_before():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    for edit in (
        lambda m: m[:3],
        lambda m: m.append(nn.Tanh()),
        lambda m: m.insert(1, nn.Tanh()),
        lambda m: m.__delitem__(1) or m,
        lambda m: m.pop(3) and m,
    ):
        converted, fused = pair(copy.deepcopy(model))
        assert set(fused_of(fused)) == {"0", "2"}
        converted, fused = edit(converted), edit(fused)
        assert_close(trained(fused, images()), trained(converted, images()))


@reference
def test_copy_shares_parameters_and_buffers_and_nothing_else():
    network = resnet.resnet18((1, 1), 5, width=4)
    before = {name: type(module) for name, module in network.named_modules()}
    fused = tritorch.fuse(network)
    assert {name: type(module) for name, module in network.named_modules()} == before
    for kind in ("named_parameters", "named_buffers"):
        made, given = list(getattr(fused, kind)()), list(getattr(network, kind)())
        assert [name for name, _ in made] == [name for name, _ in given]
        assert all(a is b for (_, a), (_, b) in zip(made, given, strict=True))
    assert not set(fused.modules()) & set(network.modules())


@reference
def test_in_place_keeps_every_object_and_its_class():
    network = resnet.resnet18((1, 1), 5, width=4)
    modules, state = list(network.modules()), list(network.state_dict())
    assert tritorch.fuse(network, inplace=True) is network
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert list(network.state_dict()) == state
    assert isinstance(network.layer1[0], resnet.BasicBlock)
    assert type(network.layer1[0]).__name__ == "FusedBasicBlock"
    assert type(network.layer1[0].conv1) is tritorch.nn.Conv2d


@reference
@pytest.mark.parametrize("inplace", [True, False])
def test_revert_gives_torchs_layers_and_the_written_forward_back(inplace):
    network = resnet.resnet18((1, 1), 5, width=4).double()
    before = {name: type(module) for name, module in network.named_modules()}
    twin = copy.deepcopy(network)
    fused = tritorch.fuse(network, inplace=inplace)
    reverted = tritorch.revert(fused, inplace=inplace)
    assert {name: type(module) for name, module in reverted.named_modules()} == before
    x = images(4, 3, 16, 16)
    assert_close(trained(reverted, x), trained(twin, x))
    assert (fused_of(fused) == {}) == inplace


@reference
def test_fusing_twice_or_converting_again_changes_nothing():
    fused = tritorch.fuse(resnet.resnet18((1, 1), 5, width=4))
    types = {name: type(module) for name, module in fused.named_modules()}
    for again in (tritorch.fuse(fused), tritorch.convert(fused)):
        assert {name: type(module) for name, module in again.named_modules()} == types


@reference
def test_layers_that_were_not_converted_stay_torchs():
    network = tritorch.convert(resnet.resnet18((1, 1), 5, width=4), exclude="layer1")
    fused = tritorch.fuse(network)
    assert type(fused.layer1[0].bn1) is nn.BatchNorm2d
    assert kept_of(fused)["layer1.0.bn1"] == "BatchNorm2d is no layer of tritorch"
    assert set(activations_of(fused)) == {"bn1", "layer2.0.bn1", "layer2.0.bn2"}


class Convolved(Model):
    """A convolution without bias, and what is computed with it and the norm."""

    def __init__(self, compute, activation=None, **more):
        conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        super().__init__(compute, activation, **{"conv": conv, **more})


# how a norm follows a convolution, and whether the two are one call in training
STATISTICS = {
    "alone": (lambda m, x: m.bn(m.conv(x)), True),
    "relu": (lambda m, x: F.relu(m.bn(m.conv(x))), True),
    "added": (lambda m, x: F.relu(m.bn(m.conv(x)) + x), True),
    "+=": (lambda m, x: F.relu(operator.iadd(m.bn(m.conv(x)), x)), True),
    "broadcast": (lambda m, x: F.relu(m.bn(m.conv(x)) + x[:1]), False),
    "used twice": (lambda m, x: (y := m.conv(x)) + m.bn(y), False),
    "between": (lambda m, x: m.bn(m.conv(x) * 2), False),
    "moved": (lambda m, x: (y := m.conv(x), z := x + 1) and F.relu(m.bn(y) + z), False),
    "fresh": (lambda m, x: (y := m.conv(m.first(x)), z := x + 1) and F.relu(m.bn(y) + z), True),
}


@reference
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_come_from_the_convolution(name, monkeypatch):
    compute, together = STATISTICS[name]
    model = Convolved(compute, first=nn.Conv2d(3, 3, 1))
    if name == "used twice":
        assert fused_of(pair(model)[1]) == {}
        return
    calls = []
    monkeypatch.setattr(
        ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm), raising=True
    )
    check_same(model)
    # of three steps of training; in evaluation one kernel has nothing to tell the other
    assert len(calls) == 3 * together


def noting(calls, op):
    def call(*args, **kwargs):
        calls.append(kwargs["activation"])
        return op(*args, **kwargs)

    return call


@reference
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 3, 3, padding=1),
        nn.Conv2d(3, 3, 3, padding=1, bias=False, padding_mode="circular"),
        nn.Conv2d(3, 3, 3, padding="same", bias=False),
        nn.Conv2d(3, 3, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(2, 1), bias=False),
        nn.Conv2d(3, 3, 3, bias=False, groups=3),
    ],
    ids=["bias", "circular", "same", "odd", "groups"],
)
@pytest.mark.parametrize("kind", ["alone", "relu", "+="])
def test_convolutions_in_front_of_a_norm(conv, kind):
    compute, _ = STATISTICS[kind]
    if kind == "+=":
        model = Convolved(
            lambda m, x: F.relu(m.bn(m.conv(x)) + m.side(x)), conv=conv, side=copy.deepcopy(conv)
        )
    else:
        model = Convolved(compute, conv=conv)
    check_same(model)


@reference
def test_hooks_of_a_convolution_see_what_they_would_have_seen():
    _, fused = pair(Convolved(STATISTICS["relu"][0]))
    assert fused_of(fused) == {"conv": "statistics of bn", "bn": "relu"}
    seen = []
    fused.conv.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    x = images()
    fused(x)
    assert_close(seen, [F.conv2d(x, fused.conv.weight, padding=1)])


@reference
def test_a_norm_of_running_statistics_alone_is_not_asked_for_any(monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm))
    _, fused = pair(Convolved(STATISTICS["relu"][0]))
    fused.bn.eval()
    fused(images())
    assert calls == []


@reference
@pytest.mark.parametrize("enabled", [False, True])
def test_statistics_under_autocast(enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "conv2d_batch_norm", noting(calls, ops.conv2d_batch_norm))
    converted, fused = pair(Convolved(STATISTICS["added"][0]))
    x = images().float()
    found = []
    for model in (converted.float(), fused.float()):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(model(x))
    # what is added is float32, the convolution is not
    assert len(calls) == (not enabled)
    assert_close(found[1], found[0])


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@reference
@pytest.mark.parametrize("again", [copy.deepcopy, pickled, saved])
def test_copies_are_fused_and_their_own(again, epilogues):
    network = tritorch.convert(resnet.resnet18((1, 1), 5, width=4).double())
    fused = tritorch.fuse(network)
    made = again(fused)
    assert type(made) is type(fused)
    assert not {id(p) for p in made.parameters()} & {id(p) for p in fused.parameters()}
    x = images(4, 3, 16, 16)
    state = copy.deepcopy(fused.state_dict())
    assert_close(trained(made, x), trained(copy.deepcopy(network), x))
    assert len(epilogues) == 4 * 5
    # training the copy has changed nothing else
    assert_close(fused.state_dict(), state)


@reference
def test_checkpoints_load_both_ways():
    network = resnet.resnet18((1, 1), 5, width=4)
    fused = tritorch.fuse(resnet.resnet18((1, 1), 5, width=4))
    fused.load_state_dict(network.state_dict())
    assert_close(fused.state_dict(), network.state_dict())
    trained(fused.double(), images(4, 3, 16, 16))
    network.double().load_state_dict(fused.state_dict())
    x = images(2, 3, 16, 16)
    assert_close(network.eval()(x), fused.eval()(x))


@reference
def test_a_block_in_two_places_is_fused_in_both():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    fused = check_same(nn.Sequential(block, block))
    assert fused[0] is fused[1]
    assert fused_of(fused) == {"0.1": "relu", "1.1": "relu"}


@reference
def test_compiles_without_a_break():
    network = resnet.resnet18((1, 1), 5, width=4).double()
    fused = tritorch.fuse(network)
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    x = images(4, 3, 16, 16)
    assert_close(compiled(x), fused(x))
    assert set(fused_of(compiled._orig_mod)) == set(fused_of(fused))


@reference
def test_report_prints_as_a_table():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    assert str(tritorch.fusion_report(tritorch.fuse(model))).splitlines() == [
        "1 fused, 1 kept",
        "0  fused  relu",
        "2  kept   no activation follows",
    ]
    converted = tritorch.convert(model)
    assert kept_of(converted) == {"0": "not fused", "2": "no activation follows"}


@reference
@pytest.mark.parametrize("function", [tritorch.fuse, tritorch.fusion_report])
def test_what_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a Module, not list"):
        function([nn.Linear(3, 2)])


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
