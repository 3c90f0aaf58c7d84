"""Every layer of tritorch.nn against torch.nn's, on the reference path and through the kernels."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from torch.testing import assert_close

import tritorch.nn as nn
from tests.layers import CASES, IMAGES, ONE_OF_EACH, Case, cases, make_call, make_layer
from tritorch import launch
from tritorch.registry import specs

pytestmark = [pytest.mark.reference, pytest.mark.interpret]


def run(layer, call):
    """Outputs, gradients of input and parameters, and buffers of one training step."""
    # a leaf cannot be written in place
    outputs = layer(call[0] * 1.0, *call[1:])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(3)
    outputs[0].backward(torch.randn_like(outputs[0]))
    named = dict(layer.named_parameters())
    grads = {name: parameter.grad for name, parameter in named.items()}
    return outputs, {"input": call[0].grad, **grads}, dict(layer.named_buffers())


@cases(CASES)
def test_layer_computes_what_torchs_does(case, device, rung):
    expected = run(make_layer(torch.nn, case, device), make_call(case, device))
    with launch.recorded() as launches:
        actual = run(make_layer(nn, case, device), make_call(case, device))
    assert_close(actual, expected)
    assert bool(launches) == (rung != "reference")


@cases(ONE_OF_EACH)
def test_output_can_be_changed_in_place(case, device):
    """Wherever torch's can: not where the layer keeps its output for the gradient."""

    def gradient(module):
        call = make_call(case, device)
        output = make_layer(module, case, device)(*call)
        output = output[0] if isinstance(output, tuple) else output
        output *= 2.0
        output.sum().backward()
        return call[0].grad

    try:
        expected = gradient(torch.nn)
    except RuntimeError:
        return
    assert_close(gradient(nn), expected)


@cases(ONE_OF_EACH)
def test_layer_is_torchs_in_everything_but_forward(case):
    layer, torchs = make_layer(nn, case), make_layer(torch.nn, case)
    assert isinstance(layer, type(torchs))
    assert type(layer) is not type(torchs)
    assert repr(layer) == repr(torchs)
    assert layer.state_dict().keys() == torchs.state_dict().keys()
    assert layer.state_dict()._metadata == torchs.state_dict()._metadata
    assert inspect.signature(type(layer)) == inspect.signature(type(torchs))
    # the same random numbers in the same order
    assert_close(layer.state_dict(), torchs.state_dict(), rtol=0, atol=0)


def randomize(layer):
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2.0)


@cases([case for case in ONE_OF_EACH if make_layer(nn, case).state_dict()])
def test_state_dict_loads_both_ways(case):
    for source, target in ((nn, torch.nn), (torch.nn, nn)):
        saved, loaded = make_layer(source, case), make_layer(target, case)
        randomize(saved)
        loaded.load_state_dict(saved.state_dict(), strict=True)
        assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@cases(ONE_OF_EACH)
def test_copy_and_pickle(case, duplicate, device):
    layer = make_layer(nn, case, device)
    randomize(layer)
    again = duplicate(layer)
    assert type(again) is type(layer)
    assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)
    expected = run(layer, make_call(case, device))
    assert_close(run(again, make_call(case, device)), expected, rtol=0, atol=0)


def test_hooks_see_inputs_outputs_and_gradients(device):
    case = next(case for case in CASES if case.layer == "Conv2d")
    seen = {}
    for module in (torch.nn, nn):
        layer = make_layer(module, case, device)
        seen[module] = record = []
        layer.register_forward_pre_hook(lambda _, args, to=record: to.append(args))
        layer.register_forward_hook(lambda _, args, out, to=record: to.append((args, out)))
        layer.register_full_backward_hook(lambda _, into, out, to=record: to.append((into, out)))
        run(layer, make_call(case, device))
    assert len(seen[nn]) == 3
    assert_close(seen[nn], seen[torch.nn])


BATCH_NORM_FLAGS = list(itertools.product((True, False), (True, False), (0.3, None)))


@pytest.mark.parametrize(("affine", "tracks", "momentum"), BATCH_NORM_FLAGS)
def test_batch_norm_over_three_steps_and_evaluation(affine, tracks, momentum, device):
    options = {"affine": affine, "track_running_stats": tracks, "momentum": momentum}
    case = Case("BatchNorm2d", {"num_features": 3, **options}, IMAGES)
    theirs, ours = make_layer(torch.nn, case, device), make_layer(nn, case, device)
    for step in range(4):
        # the last one evaluates
        values = make_call(case, device)[0].detach() * (step + 1) + step
        results = [
            run(layer.train(step < 3), (values.clone().requires_grad_(),))
            for layer in (ours, theirs)
        ]
        assert_close(*results)


@pytest.mark.parametrize("buffers", [(), ("running_mean", "running_var"), ("num_batches_tracked",)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_buffers(buffers, training, device):
    """A buffer set to None after construction, as some checkpoints and exporters do."""
    case = Case("BatchNorm2d", {"num_features": 3, "momentum": None}, IMAGES)
    results = []
    for module in (nn, torch.nn):
        layer = make_layer(module, case, device).train(training)
        for name in buffers:
            setattr(layer, name, None)
        results.append(run(layer, make_call(case, device)))
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_that_stops_tracking(training, device):
    """The flag cleared after construction leaves buffers that are neither used nor written."""
    case = Case("BatchNorm2d", {"num_features": 3}, IMAGES)
    results, buffers = [], []
    for module in (nn, torch.nn):
        layer = make_layer(module, case, device).train(training)
        layer.running_mean.fill_(0.5)
        layer.track_running_stats = False
        results.append(run(layer, make_call(case, device)))
        buffers.append(dict(layer.named_buffers()))
    assert_close(*results)
    assert_close(*buffers, rtol=0, atol=0)


def test_batch_norm_counts_a_batch_that_fails():
    layer, torchs = nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for one in (layer, torchs):
        with pytest.raises(ValueError, match=r"more than (1|one) value per channel"):
            one(torch.zeros(1, 3))
        assert one.num_batches_tracked == 1
        with pytest.raises(ValueError, match="expected 2D or 3D input"):
            one(torch.zeros(3))
        assert one.num_batches_tracked == 1


def test_batch_norm_fills_in_the_counter_of_an_old_checkpoint():
    layer = nn.BatchNorm2d(3)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        layer.load_state_dict(state)
    state._metadata[""]["version"] = 1
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == 0


def test_conv_forward_serves_subclasses_with_a_weight_of_their_own(device, rung):
    class Standardized:
        def forward(self, input):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return self._conv_forward(input, weight, self.bias)

    case = next(case for case in CASES if case.layer == "Conv2d")
    results = []
    for module in (torch.nn, nn):
        layer = make_layer(module, case, device)
        layer.__class__ = type("Standardized", (Standardized, type(layer)), {})
        with launch.recorded() as launches:
            results.append(run(layer, make_call(case, device)))
    assert_close(*results)
    assert bool(launches) == (rung != "reference")


def small_network(module):
    torch.manual_seed(0)
    return module.Sequential(
        module.Conv2d(3, 4, 3, padding=1),
        module.BatchNorm2d(4),
        module.ReLU(),
        module.MaxPool2d(2),
        module.Flatten(),
        module.Linear(4 * 3 * 2, 3),
    )


def test_network_compiles_in_one_graph(device):
    images = torch.randn(IMAGES, device=device)
    network, twin = (small_network(nn).to(device) for _ in range(2))
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for output in (compiled(images), twin(images)):
        output.square().sum().backward()
    assert_close(compiled(images), twin(images), rtol=0, atol=0)
    for actual, expected in zip(network.parameters(), twin.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, rtol=0, atol=0)


def test_specs_name_every_layer_and_no_other():
    declared = {layer for spec in specs() for layer in spec.layers}
    defined = {
        name
        for name, value in vars(nn).items()
        if isinstance(value, type) and value.__module__ == nn.__name__
    }
    assert declared == defined
    assert defined == {case.layer for case in CASES}
