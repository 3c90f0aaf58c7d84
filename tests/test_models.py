"""Whole networks, converted, against torch.nn's: outputs, gradients and running statistics.

Both train for two steps from the same weights, by torch's loss and optimizer.  The truth is
torch.nn's training in float64, and the rule that of `tritorch.testing.tolerances`.  How far
rounding may carry a tensor through so many layers is measured: s2 is how far from the truth
torch.nn's own trainings end whose images and parameters are off by up to one rounding, in units of
the roundoff.

What trains in bfloat16 does so as most users have it: parameters in float32, under autocast.
"""

import contextlib
import copy
import hashlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import tritorch
from examples.models import convnext, densenet, mobilenet, resnet, squeezenet, unet, vgg
from tritorch import backend, launch, nn, ops
from tritorch.testing import tolerances

STEPS = 2
CLASSES = 5
# trainings of torch.nn that start off by a rounding
SHAKEN = 5

# by name: a tiny network, and the shape of its images
TINY = {
    "resnet18": (lambda: resnet.resnet18((1, 1), CLASSES, width=4), (4, 3, 16, 16)),
    "resnet50": (lambda: resnet.resnet50((2, 1), CLASSES, width=4), (4, 3, 16, 16)),
    "vgg11_bn": (lambda: vgg.vgg11_bn(CLASSES, dropout=0.0, width=2, size=1), (4, 3, 32, 32)),
    "densenet121": (
        lambda: densenet.densenet121((2, 2), CLASSES, growth=4, width=8),
        (4, 3, 16, 16),
    ),
    "squeezenet1_1": (
        lambda: squeezenet.squeezenet1_1(CLASSES, dropout=0.0, width=2),
        (2, 3, 33, 33),
    ),
    "mobilenet_v2": (
        lambda: mobilenet.mobilenet_v2(
            CLASSES,
            width=0.25,
            stages=((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 1, 2)),
            divisor=4,
            last=32,
            dropout=0.0,
        ),
        (4, 3, 16, 16),
    ),
    "unet": (lambda: unet.UNet(num_classes=CLASSES, width=4, depth=1), (2, 1, 12, 12)),
    "convnext_tiny": (
        lambda: convnext.convnext_tiny((1, 2), CLASSES, width=8, layer_scale=0.5, dropped=0.0),
        (2, 3, 32, 32),
    ),
}
ALL = [
    (network, dtype, layout)
    for network in TINY
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
]
# what is interpreted, which takes fifty times as long
INTERPRETED = [
    *(one for one in ALL if one[0] == "resnet18"),
    ("resnet50", torch.bfloat16, torch.channels_last),
    ("vgg11_bn", torch.float32, torch.contiguous_format),
    ("densenet121", torch.float32, torch.channels_last),
    ("squeezenet1_1", torch.float32, torch.channels_last),
    ("mobilenet_v2", torch.float32, torch.channels_last),
    ("unet", torch.float32, torch.contiguous_format),
    ("unet", torch.bfloat16, torch.channels_last),
    ("convnext_tiny", torch.bfloat16, torch.channels_last),
]


class Problem(NamedTuple):
    model: torch.nn.Module
    images: torch.Tensor
    labels: torch.Tensor


def problem(network, layout, device):
    make, shape = TINY[network]
    torch.manual_seed(0)
    model = make().to(device, memory_format=layout)
    images = torch.randn(shape).to(device, memory_format=layout)
    with torch.no_grad():
        size = copy.deepcopy(model)(images).shape
    labels = torch.randint(CLASSES, (size[0], *size[2:])).to(device)
    return Problem(model, images, labels)


def shaken(given, unit, seed):
    """Images and parameters off by up to one rounding."""
    generator = torch.Generator().manual_seed(seed)

    def shake(tensor):
        drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor * (1 + unit * (2 * drawn - 1)).to(tensor)

    model = copy.deepcopy(given.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(shake(parameter))
    return Problem(model, shake(given.images), given.labels)


def trained(given, dtype):
    """What training a copy makes, by its name, and the format of what each layer returns."""
    model, images, labels = copy.deepcopy(given)
    lower = dtype == torch.bfloat16
    found, formats = {}, {}

    def note(name):
        def hook(layer, arguments, output):
            sizes = zip(output.shape, output.stride(), strict=True)
            # the stride of a dimension of one element says nothing
            strides = [stride if size > 1 else 0 for size, stride in sizes]
            # on a GPU, which the kernels are for, autocast computes it in float32
            differs = lower and isinstance(layer, torch.nn.LayerNorm)
            formats[name] = None if differs else output.dtype, output.shape, strides

        return hook

    for name, layer in model.named_modules():
        if not any(layer.children()):
            layer.register_forward_hook(note(name))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    with torch.autocast(images.device.type, dtype) if lower else contextlib.nullcontext():
        for step in range(1, STEPS + 1):
            with torch.enable_grad():
                logits = model(images)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            found[f"step {step}: logits"] = logits.detach()
            for name, parameter in model.named_parameters():
                found[f"step {step}: gradient of {name}"] = parameter.grad.clone()
            optimizer.step()
        found |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.no_grad():
            found["logits of the trained network"] = model.eval()(images)
    return found, formats


def in_float64(given):
    return Problem(copy.deepcopy(given.model).double(), given.images.double(), given.labels)


def rms(values):
    return values.square().mean().sqrt()


def verdicts(network, dtype, layout, device):
    """By tensor, how the converted network did; and where a format is not torch's."""
    given = problem(network, layout, device)
    unit = tolerances.unit_roundoff(dtype)
    truth, _ = trained(in_float64(given), torch.float64)
    baseline, formats = trained(given, dtype)
    runs = [trained(shaken(given, unit, seed), dtype)[0] for seed in range(SHAKEN)]
    ours, our_formats = trained(given._replace(model=tritorch.convert(given.model)), dtype)
    found = {}
    for name, t in truth.items():
        scale = None
        if t.is_floating_point():
            moved = torch.stack([(run[name] - t).square() for run in runs]).mean(0).sqrt()
            scale = (moved + rms(moved)) / unit + t.abs() + rms(t)
        found[name] = tolerances.compare(
            ours[name],
            t,
            baseline=baseline[name],
            scale=scale,
            terms=16.0,
            unit_in=unit if dtype == torch.bfloat16 else 0.0,
        )
    different = {
        name: (our_formats[name], expected)
        for name, expected in formats.items()
        if our_formats[name] != expected
    }
    return found, different


def name_of(value):
    return {torch.contiguous_format: "nchw", torch.channels_last: "channels_last"}.get(
        value, str(value).removeprefix("torch.")
    )


@pytest.mark.parametrize(
    ("network", "dtype", "layout"),
    [
        *(pytest.param(*one, marks=pytest.mark.interpret) for one in INTERPRETED),
        *(pytest.param(*one, marks=pytest.mark.reference) for one in ALL),
    ],
    ids=name_of,
)
def test_converted_network_trains_as_torchs_does(network, dtype, layout, device, rung):
    backend.reset()
    with launch.recorded() as launches:
        found, different = verdicts(network, dtype, layout, device)
    assert not {name: v.failure for name, v in found.items() if not v.accepted}
    assert not different
    assert backend.explain() == {}
    assert bool(launches) == (rung != "reference")


@pytest.mark.reference
def test_a_slightly_wrong_layer_is_seen(monkeypatch):
    right = ops.relu

    def wrong(x, inplace=False):
        y = right(x, inplace)
        # the value stays, the gradient is a ten-thousandth too large
        return y + 1e-4 * (y - y.detach())

    monkeypatch.setattr(ops, "relu", wrong)
    found, _ = verdicts("resnet18", torch.float32, torch.contiguous_format, "cpu")
    refused = {name for name, verdict in found.items() if not verdict.accepted}
    assert "step 1: gradient of conv1.weight" in refused
    assert "step 1: logits" not in refused


@pytest.mark.reference
@pytest.mark.parametrize("network", TINY)
def test_nothing_is_left_behind_that_has_a_layer(network):
    make, _ = TINY[network]
    model = tritorch.convert(make())
    layers = {name for name, value in vars(nn).items() if isinstance(value, type)}
    kept = tritorch.conversion_report(model).kept
    modules = dict(model.named_modules())
    torchs = [base.__name__ for name in kept for base in type(modules[name]).__mro__]
    assert not layers.intersection(torchs), kept
    # only what computes nothing is torch's or the network's own
    assert {type(modules[name]).__name__ for name in kept} <= {
        "Flatten",
        "Permute",
        "StochasticDepth",
    }


# of torchvision's model: parameters, and SHA-256 of its sorted state_dict, a line of name, shape
# and dtype for each tensor
TORCHVISION = {
    resnet.resnet18: (11689512, "a7f7e7e4fd6a41ee"),
    resnet.resnet50: (25557032, "2c98c46aa007d795"),
    vgg.vgg11_bn: (132868840, "b3e2bd12a998c929"),
    densenet.densenet121: (7978856, "6ced290d87de6d15"),
    squeezenet.squeezenet1_1: (1235496, "953af50ba43fa0f8"),
    mobilenet.mobilenet_v2: (3504872, "1a6a73d4cce32596"),
    convnext.convnext_tiny: (28589128, "0f668544ca313feb"),
}


@pytest.mark.reference
@pytest.mark.parametrize("make", TORCHVISION, ids=lambda make: make.__name__)
def test_checkpoint_is_torchvisions(make):
    parameters, digest = TORCHVISION[make]
    with torch.device("meta"):
        model = tritorch.convert(make())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    state = model.state_dict()
    lines = sorted(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in state.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest().startswith(digest)
