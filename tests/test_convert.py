"""Swapping the layers of a model and back: what is shared, what is kept and why."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing import assert_close

import tritorch
from tritorch import nn

pytestmark = pytest.mark.reference


class Block(torch.nn.Module):
    """Two convolutions around a shortcut, as in a residual network."""

    def __init__(self, channels_in, channels, stride=1):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(channels)
        self.relu = torch.nn.ReLU(inplace=True)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or channels_in != channels:
            conv = torch.nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.pool = torch.nn.MaxPool2d(2)
        self.body = torch.nn.Sequential(Block(4, 4), Block(4, 6, stride=2))
        self.dropout = torch.nn.AlphaDropout(0.0)
        self.head = torch.nn.Linear(6, 5)

    def forward(self, x):
        y = self.body(self.pool(self.stem(x)))
        return self.head(self.dropout(y.mean((2, 3))))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8)


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


def gradients(model, images):
    model.zero_grad()
    model(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_model_computes_the_same_and_every_layer_is_ours(network, images):
    torchs = copy.deepcopy(network)
    converted = tritorch.convert(network)
    assert_close(converted(images), torchs(images))
    assert_close(gradients(converted, images), gradients(torchs, images))
    assert_close(converted.state_dict(), torchs.state_dict())
    assert {t.__module__ for t in types(converted).values()} == {
        "tritorch.nn",
        __name__,
        "torch.nn.modules.container",
        "torch.nn.modules.dropout",
    }


def test_copy_shares_parameters_and_buffers_and_nothing_else(network):
    before = types(network)
    converted = tritorch.convert(network)
    assert types(network) == before
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(converted, kind)()), dict(getattr(network, kind)())
        assert list(ours) == list(theirs)
        assert all(ours[name] is theirs[name] for name in theirs)
    assert not set(converted.modules()) & set(network.modules())
    converted.body[0].train(False)
    assert network.body[0].training


def test_in_place_keeps_every_object(network):
    modules, parameters = list(network.modules()), list(network.parameters())
    assert tritorch.convert(network, inplace=True) is network
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert type(network.head) is nn.Linear


@pytest.mark.parametrize("inplace", [True, False])
def test_revert_undoes_convert(network, images, inplace):
    before = types(network)
    converted = tritorch.convert(network, inplace=inplace)
    expected = converted(images)
    reverted = tritorch.revert(converted, inplace=inplace)
    assert types(reverted) == before
    assert (reverted is converted) == inplace
    assert type(converted.head) is (torch.nn.Linear if inplace else nn.Linear)
    assert_close(reverted(images), expected)
    assert reverted.stem.weight is network.stem.weight


def test_optimizer_made_before_trains_the_converted_model(network, images):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    twin = copy.deepcopy(network)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    converted = tritorch.convert(network)
    for model, step in ((converted, optimizer), (twin, twin_optimizer)):
        for _ in range(2):
            gradients(model, images)
            step.step()
    assert_close(converted.state_dict(), twin.state_dict())
    # the original is trained with it
    assert_close(network.state_dict(), twin.state_dict())


def test_hooks_flags_and_attributes_are_kept(network, images):
    seen = []
    network.stem.register_forward_hook(lambda module, args, output: seen.append(module))
    network.stem.note = "mine"
    network.body.eval()
    network.head.weight.requires_grad_(False)
    converted = tritorch.convert(network)
    converted(images)
    assert seen == [converted.stem]
    assert converted.stem.note == "mine"
    assert converted.training
    assert not converted.body[1].bn1.training
    assert not converted.head.weight.requires_grad


def test_module_in_two_places_stays_one():
    layer = torch.nn.Linear(3, 3)
    tied = torch.nn.Linear(3, 3)
    tied.weight = layer.weight
    converted = tritorch.convert(torch.nn.ModuleList([layer, tied, layer]))
    assert converted[0] is converted[2]
    assert type(converted[0]) is nn.Linear
    assert converted[1].weight is layer.weight
    report = tritorch.conversion_report(converted)
    assert report.converted == {"0": "Linear", "1": "Linear", "2": "Linear"}


def test_module_in_a_plain_list_is_converted_with_its_place():
    """A forward that loops over a list of its own sees the converted layers in the copy too."""
    network = Network()
    network.order = [network.stem, network.pool]
    converted = tritorch.convert(network)
    assert converted.order[0] is converted.stem


@pytest.mark.parametrize("inplace", [True, False])
def test_single_layer(inplace):
    layer = torch.nn.Linear(3, 2)
    converted = tritorch.convert(layer, inplace=inplace)
    assert type(converted) is nn.Linear
    assert type(layer) is (nn.Linear if inplace else torch.nn.Linear)
    assert converted.weight is layer.weight
    assert tritorch.conversion_report(converted).converted == {"": "Linear"}


def linears(model):
    report = tritorch.conversion_report(model)
    return set(report.converted)


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({"include": "head"}, {"head"}),
        ({"include": "body.*.conv1"}, {"body.0.conv1", "body.1.conv1"}),
        # below what it names
        ({"include": "body.0"}, {f"body.0.{n}" for n in ("conv1", "bn1", "conv2", "bn2", "relu")}),
        ({"include": torch.nn.Linear}, {"head"}),
        ({"include": nn.Linear}, {"head"}),
        ({"include": ["head", torch.nn.MaxPool2d]}, {"head", "pool"}),
        ({"exclude": [Block, "stem"]}, {"head", "pool"}),
        ({"include": ["head", "pool"], "exclude": nn.MaxPool2d}, {"head"}),
        ({"exclude": "*"}, set()),
        ({"include": []}, set()),
        ({"include": "no such module"}, set()),
    ],
)
def test_include_and_exclude(network, options, converted):
    assert linears(tritorch.convert(network, **options)) == converted


def test_shared_module_is_excluded_under_any_of_its_names():
    layer = torch.nn.Linear(3, 3)
    model = torch.nn.ModuleDict({"a": layer, "b": layer, "c": torch.nn.Linear(3, 3)})
    assert linears(tritorch.convert(model, exclude="b")) == {"c"}
    assert linears(tritorch.convert(model, include="b")) == {"a", "b"}


class Scaled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def patched():
    layer = torch.nn.Linear(3, 3)
    layer.forward = lambda input: input
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Scaled(3, 3), "Scaled is a subclass of Linear that may compute something else"),
        (patched, "its forward is replaced on the instance"),
        (lambda: parametrizations.weight_norm(torch.nn.Linear(3, 3)), "parametrized"),
        (
            lambda: prune.l1_unstructured(torch.nn.Linear(3, 3), "weight", 0.5),
            "its weight is computed by a hook",
        ),
        (lambda: torch.nn.LazyLinear(3), "lazy: its shapes are not known yet"),
        (lambda: torch.nn.ELU(), "no kernel for ELU"),
        (
            lambda: torch.nn.MultiheadAttention(3, 1).out_proj,
            "NonDynamicallyQuantizableLinear is a subclass of Linear that may compute"
            " something else",
        ),
    ],
)
def test_layer_is_left_alone_for_a_reason(make, reason):
    layer = make()
    model = torch.nn.ModuleDict({"layer": layer})
    kind = type(layer)
    tritorch.convert(model, inplace=True)
    assert type(model["layer"]) is kind
    assert tritorch.conversion_report(model).kept["layer"] == reason
    if not isinstance(layer, torch.nn.LazyLinear | torch.nn.modules.lazy.LazyModuleMixin):
        input = torch.randn(2, 3)
        assert_close(tritorch.convert(model)["layer"](input), layer(input), rtol=0, atol=0)


def test_old_weight_norm_is_left_alone():
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(torch.nn.Linear(3, 3))
    input = torch.randn(2, 3)
    # its weight is a tensor that autograd made, which Python's own deepcopy refuses
    layer(input)
    converted = tritorch.convert(layer)
    assert type(converted) is torch.nn.Linear
    assert tritorch.conversion_report(layer).kept == {"": "its weight is computed by a hook"}
    assert_close(converted(input), layer(input), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_layer_is_left_alone():
    import torch.ao.nn.quantized

    layer = torch.ao.nn.quantized.Linear(3, 3)
    assert tritorch.conversion_report(layer).kept[""] == "quantized"
    assert tritorch.convert(layer, inplace=True) is layer
    assert type(layer) is torch.ao.nn.quantized.Linear


def test_report_gives_a_reason_for_every_layer(network):
    converted = tritorch.convert(network, include=["body", "head"], exclude="head")
    report = tritorch.conversion_report(converted, include=["body", "head"], exclude="head")
    assert report.converted["body.1.shortcut.0"] == "Conv2d"
    assert report.kept == {
        "stem": "not included",
        "pool": "not included",
        "dropout": "no kernel for AlphaDropout",
        "head": "excluded by 'head'",
    }
    assert tritorch.conversion_report(converted).kept["head"] == "not converted"


def test_report_prints_as_a_table():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.AlphaDropout())
    lines = str(tritorch.conversion_report(tritorch.convert(model))).splitlines()
    assert lines == [
        "1 converted, 1 kept",
        "0  converted  Linear",
        "1  kept       no kernel for AlphaDropout",
    ]
    (_, alone) = str(tritorch.conversion_report(torch.nn.Linear(3, 2))).splitlines()
    assert alone == "(model)  kept       not converted"


@pytest.mark.parametrize(
    "function", [tritorch.convert, tritorch.revert, tritorch.conversion_report]
)
def test_what_is_not_a_module_is_refused(function):
    message = f"{function.__name__}: model must be a Module, not list"
    with pytest.raises(TypeError, match=message):
        function([torch.nn.Linear(3, 2)])


@pytest.mark.parametrize("selector", [3, int, [None]])
def test_what_is_not_a_selector_is_refused(selector):
    with pytest.raises(TypeError, match="pattern of qualified names or a class of modules"):
        tritorch.convert(torch.nn.Linear(3, 2), exclude=selector)
    with pytest.raises(TypeError, match="pattern of qualified names or a class of modules"):
        tritorch.conversion_report(torch.nn.Linear(3, 2), include=selector)


def test_converting_twice_changes_nothing(network):
    converted = tritorch.convert(tritorch.convert(network))
    assert types(converted) == types(tritorch.convert(network))


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_parametrized_after_conversion_are_reverted(inplace):
    model = tritorch.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 5)))
    parametrizations.weight_norm(model[0])
    parametrizations.orthogonal(model[1])
    report = tritorch.conversion_report(model)
    assert report.converted == {"0": "Conv2d", "1": "Linear"}
    assert not report.kept.keys() & {"0", "1"}
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    reverted = tritorch.revert(model, inplace=inplace)
    assert_close(reverted(x), expected)
    for layer, kind in zip(reverted, (torch.nn.Conv2d, torch.nn.Linear), strict=True):
        assert type(layer).__bases__ == (kind,)
        assert parametrize.is_parametrized(layer, "weight")
    assert tritorch.conversion_report(reverted).converted == {}
    assert tritorch.conversion_report(reverted).kept["0"] == "parametrized"
    # the other model is as it was
    assert (model is reverted) == inplace
    assert [type(layer).__bases__ == (nn.Conv2d,) for layer in model[:1]] == [not inplace]
    # a parametrization ends as it does on torch's layer, and a copy has it
    assert_close(copy.deepcopy(reverted)(x), expected)
    parametrize.remove_parametrizations(reverted[0], "weight")
    assert type(reverted[0]) is torch.nn.Conv2d
    assert_close(reverted(x), expected)
