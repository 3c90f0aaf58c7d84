"""A fused model is hooked, changed, copied, saved, compiled and reverted as any other."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import tritorch
from examples.models import resnet
from tests.fusing import Model, behind_a_norm, check_same, fused_of, images, kept_of, pair, trained
from tests.fusing import epilogues as epilogues

pytestmark = pytest.mark.reference


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


@pytest.mark.parametrize("change", CHANGES)
def test_changes_after_fusing_take_effect(change):
    converted, fused = pair(behind_a_norm(nn.LeakyReLU()))
    for model in (converted, fused):
        CHANGES[change](model)
    assert_close(trained(fused, images()), trained(converted, images()))


def test_attribute_that_is_deleted_is_missed():
    _, fused = pair(Model(lambda m, x: F.relu(m.bn(x)) * m.factor, factor=2))
    assert fused_of(fused) == {"bn": "relu"}
    del fused.factor
    with pytest.raises(AttributeError, match="factor"):
        fused(images())


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


def test_in_place_keeps_every_object_and_its_class():
    network = resnet.resnet18((1, 1), 5, width=4)
    modules, state = list(network.modules()), list(network.state_dict())
    assert tritorch.fuse(network, inplace=True) is network
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    assert list(network.state_dict()) == state
    assert isinstance(network.layer1[0], resnet.BasicBlock)
    assert type(network.layer1[0]).__name__ == "FusedBasicBlock"
    assert type(network.layer1[0].conv1) is tritorch.nn.Conv2d


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


def test_fusing_twice_or_converting_again_changes_nothing():
    fused = tritorch.fuse(resnet.resnet18((1, 1), 5, width=4))
    types = {name: type(module) for name, module in fused.named_modules()}
    for again in (tritorch.fuse(fused), tritorch.convert(fused)):
        assert {name: type(module) for name, module in again.named_modules()} == types


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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


def test_checkpoints_load_both_ways():
    network = resnet.resnet18((1, 1), 5, width=4)
    fused = tritorch.fuse(resnet.resnet18((1, 1), 5, width=4))
    fused.load_state_dict(network.state_dict())
    assert_close(fused.state_dict(), network.state_dict())
    trained(fused.double(), images(4, 3, 16, 16))
    network.double().load_state_dict(fused.state_dict())
    x = images(2, 3, 16, 16)
    assert_close(network.eval()(x), fused.eval()(x))


def test_a_block_in_two_places_is_fused_in_both():
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
    fused = check_same(nn.Sequential(block, block))
    assert fused[0] is fused[1]
    assert fused_of(fused) == {"0.1": "relu", "1.1": "relu"}


def test_compiles_without_a_break():
    network = resnet.resnet18((1, 1), 5, width=4).double()
    fused = tritorch.fuse(network)
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    x = images(4, 3, 16, 16)
    assert_close(compiled(x), fused(x))
    assert set(fused_of(compiled._orig_mod)) == set(fused_of(fused))


def test_report_prints_as_a_table():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    assert str(tritorch.fusion_report(tritorch.fuse(model))).splitlines() == [
        "1 fused, 1 kept",
        "0  fused  relu",
        "2  kept   no activation follows",
    ]
    converted = tritorch.convert(model)
    assert kept_of(converted) == {"0": "not fused", "2": "no activation follows"}


@pytest.mark.parametrize("function", [tritorch.fuse, tritorch.fusion_report])
def test_what_is_not_a_module_is_refused(function):
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a Module, not list"):
        function([nn.Linear(3, 2)])
