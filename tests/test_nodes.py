"""Calls with a gradient that are repeated: what they give and leave is what other calls do."""

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.repeating import ENOUGH, gradient, leaf, trained
from tests.repeating import again as again
from tests.repeating import images as images
from tests.repeating import kernels_only as kernels_only
from tests.test_repeats import assert_same
from tritorch import launch, ops
from tritorch.registry import Maker, specs
from tritorch.testing import calls

pytestmark = pytest.mark.interpret

# of an op
MOST_SAMPLES = 3
# their nodes are repeated and not what the op does before, which makes views, or draws seeds
PARTS = {
    "adaptive_avg_pool1d",
    "avg_pool1d",
    "conv1d",
    "conv_transpose1d",
    "dropout",
    "l1_loss",
    "matmul",
    "max_pool1d",
    "mse_loss",
    "smooth_l1_loss",
}
# they look at values, on a CPU each time
LOOK = {"binary_cross_entropy", "cross_entropy", "nll_loss"}

SPECS = [pytest.param(spec, id=spec.name) for spec in specs() if spec.gradients]


def step(spec, sample, second=False):
    """What a call and its gradients give, of other numbers each time, and the versions of what the
    call was given.
    """
    given = {
        name: calls.map_tensors(value, torch.clone) for name, value in sample.arguments.items()
    }
    leaves = [
        given[name].requires_grad_()
        for name in spec.gradients
        if given.get(name) is not None and given[name].is_floating_point()
    ]
    torch.manual_seed(0)
    outputs = [one for one in calls.outputs_of(calls.call(spec.op, given)) if one.requires_grad]
    torch.manual_seed(1)
    grads = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, leaves, grads, create_graph=second, allow_unused=True)
    if second:
        some = [one for one in found if one is not None and one.requires_grad]
        total = sum((one.double() ** 2).sum() for one in some)
        if some:
            found += torch.autograd.grad(total, leaves, allow_unused=True)
    versions = [one._version for value in given.values() for one in calls.tensors_of(value)]
    return [*outputs, *found], versions


def assert_equal(found, expected):
    assert [one is None for one in found] == [one is None for one in expected]
    present = [one is not None for one in found]
    assert_same(
        [one.detach() for one in itertools.compress(found, present)],
        [one.detach() for one in itertools.compress(expected, present)],
    )


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_are_those_of_a_call_that_goes_its_way(spec, again, device):
    """Samples of every op, with other numbers in the last call."""
    kinds = set()
    of_seeds = [spec.samples(Maker(device=device, seed=seed)) for seed in (1, 2)]
    for sample, other in itertools.islice(zip(*of_seeds, strict=True), MOST_SAMPLES):
        trained(lambda sample=sample: step(spec, sample))
        again.clear()
        found, versions = step(spec, other)
        kinds.update(again)
        with launch.recorded():
            expected, expected_versions = step(spec, other)
        assert_equal(found, expected)
        assert versions == expected_versions
    if spec.name not in LOOK:
        assert kinds == ({"node"} if spec.name in PARTS else {"node", "call"})


@pytest.mark.parametrize("spec", SPECS)
def test_second_gradients_go_through_repeated_nodes(spec, again, device):
    sample = next(sample for sample in spec.samples(Maker(device=device)) if sample.gradcheck)
    trained(lambda: step(spec, sample, second=True))
    assert again or spec.name in LOOK
    found, _ = step(spec, sample, second=True)
    with launch.recorded():
        expected, _ = step(spec, sample, second=True)
    assert_equal(found, expected)


def test_a_node_has_the_name_of_its_function(images, again):
    x = leaf(images)
    names = [type(ops.relu(x).grad_fn).__name__ for _ in range(ENOUGH)]
    assert set(names) == {"ActivationBackward"}
    assert len(again) > 2


def test_what_needs_no_gradient_gets_none(images, again):
    weight = torch.randn(5, 3, 1, 1, device=images.device)

    def launches(image, weight):
        y = trained(lambda: ops.conv2d(image, weight))
        with mock.patch.object(
            launch.Prepared, "__call__", side_effect=launch.Prepared.__call__, autospec=True
        ) as launched:
            y.sum().backward()
        return launched.call_count

    of_image, of_weight = launches(leaf(images), weight), launches(images, leaf(weight))
    both = launches(leaf(images), leaf(weight))
    assert 0 < of_image < both
    assert 0 < of_weight < both
    frozen, image = leaf(weight).requires_grad_(False), leaf(images)
    ops.conv2d(image, frozen).sum().backward()
    assert frozen.grad is None
    assert image.grad is not None


def test_what_is_returned_beside_has_no_gradient(images, again):
    x = leaf(images)
    y, indices = trained(lambda: ops.max_pool2d(x, 2, return_indices=True))
    assert "node" in again
    assert y.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("inplace", [False, True])
def test_running_statistics_and_written_inputs_count_each_time(inplace, images, again, device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    theirs = mean.clone(), var.clone()
    x, scale = leaf(images), torch.ones(3, device=device, requires_grad=True)
    for turn in range(1, ENOUGH + 1):
        y = ops.batch_norm(x, mean, var, scale, None, training=True)
        expected = F.batch_norm(x, *theirs, scale, None, training=True)
        assert y._version == 0
        z = ops.relu(y, inplace)
        assert (z is y) is inplace
        assert y._version == inplace
        assert mean._version == turn
        (found,) = torch.autograd.grad(z.square().sum(), x)
        (right,) = torch.autograd.grad(expected.relu().square().sum(), x)
        assert torch.allclose(found, right, atol=1e-4)
    assert torch.allclose(mean, theirs[0])
    assert torch.allclose(var, theirs[1])
    assert again.count("call") > 2


def test_what_may_not_be_written_is_refused_after_repeats(images):
    weight = leaf(images)
    trained(lambda: ops.relu(weight * 2, inplace=True))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf that requires a gradient"):
        ops.relu(weight, inplace=True)
    with pytest.raises(RuntimeError, match="a view of a leaf"):
        ops.relu(weight.view(images.shape), inplace=True)
    trained(lambda: ops.relu((weight * 2).view(images.shape), inplace=True))
    with pytest.raises(RuntimeError, match="autograd cannot follow"):
        ops.relu((weight * 2).unbind()[0], inplace=True)
    assert torch.equal(weight, before)


def test_a_saved_tensor_that_was_written_is_noticed(images, again):
    x = leaf(images)
    product = x * 1
    y = trained(lambda: ops.silu(product))
    assert again
    product.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_graph_is_gone_through_once(images, again):
    x = leaf(images)
    y = trained(lambda: ops.silu(x)).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert again
    with pytest.raises(RuntimeError, match="a second time"):
        y.backward()
    assert torch.allclose(x.grad, 2 * gradient(F.silu, images), atol=1e-5)
