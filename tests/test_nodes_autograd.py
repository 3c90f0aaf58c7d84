"""Calls with a gradient that are repeated, beside what else autograd and its users do."""

import gc
import threading
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils import checkpoint

from tests.repeating import ENOUGH, backward, gradient, leaf, trained
from tests.repeating import again as again
from tests.repeating import images as images
from tests.repeating import kernels_only as kernels_only
from tests.test_repeats import assert_same
from tritorch import backend, launch, nn, ops
from tritorch.repeats import composed

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, images, again):
    x = leaf(images)

    def block(x):
        return ops.relu(ops.silu(x))

    def grad():
        y = checkpoint.checkpoint(block, x, use_reentrant=reentrant)
        return torch.autograd.grad(y.sum(), x)[0] if not reentrant else backward(y, x)

    assert torch.allclose(trained(grad), gradient(lambda x: F.silu(x).relu(), images), atol=1e-5)
    assert again


def test_saved_tensors_go_through_hooks(images, again):
    """Which bring others back: of another layout, and what was changed meanwhile."""
    x = leaf(images)
    trained(lambda: backward(ops.silu(x), x))
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.detach().clone()

    def unpack(tensor):
        return tensor.mul(2).contiguous(memory_format=torch.channels_last)

    again.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = ops.silu(x)
    assert again == ["call", "node"]
    assert len(packed) == 1
    assert torch.allclose(backward(y, x), gradient(F.silu, 2 * images), atol=1e-5)


def test_autocast_casts_a_weight_once_in_a_region(images, again, device):
    weight = leaf(torch.randn(5, 3, 1, 1, device=device))
    x = leaf(images)

    def step():
        with torch.autocast(device, torch.bfloat16):
            y, z = ops.conv2d(x, weight), ops.conv2d(x, weight)
        both = [one.grad_fn.next_functions[1][0] for one in (y, z)]
        assert both[0] is both[1]
        return y, torch.autograd.grad((y + z).sum(), (x, weight))

    trained(step)
    again.clear()
    with torch.no_grad():
        weight.mul_(-2)
    y, found = step()
    assert again.count("call") == 2
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), F.conv2d(images, weight), rtol=0.05, atol=0.1)
    with launch.recorded():
        _, expected = step()
    assert_same(found, expected)
    assert [one.dtype for one in found] == [torch.float32] * 2


def test_transforms_go_their_way(images, again):
    x = leaf(images)
    trained(lambda: ops.silu(x))
    again.clear()
    expected = gradient(F.silu, images)
    with backend.strict(False):
        found = torch.func.grad(lambda x: ops.silu(x).sum())(images)
        with forward_ad.dual_level():
            along = ops.silu(forward_ad.make_dual(x, torch.ones_like(x)))
            tangent = forward_ad.unpack_dual(along).tangent
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(tangent, expected, atol=1e-5)
    assert not again


def test_another_graph_of_equal_calls_is_another(images, again, device):
    """What one call keeps no other one has."""
    x, other = leaf(images), leaf(images.flip(0))
    trained(lambda: ops.silu(x))
    y, z = ops.silu(x), ops.silu(other)
    assert again[-4:] == ["call", "node"] * 2
    z.sum().backward()
    y.sum().backward()
    assert torch.allclose(x.grad, gradient(F.silu, x), atol=1e-5)
    assert torch.allclose(other.grad, gradient(F.silu, other), atol=1e-5)


def test_no_tensor_is_kept(images, again, device):
    scale = torch.ones(3, device=device, requires_grad=True)

    def step():
        x = leaf(images)
        y = ops.batch_norm(x, None, None, scale, None, training=True, activation="silu")
        y.sum().backward()
        return [weakref.ref(one) for one in (x, y, x.grad, y.grad_fn)]

    gc.disable()
    try:
        found = [one() for _ in range(ENOUGH) for one in step()]
    finally:
        gc.enable()
    assert "call" in again
    assert found == [None] * 4 * ENOUGH


def test_a_thread_watches_its_own_nodes(images, again):
    """What others call meanwhile is no part of what is repeated."""
    x, other = leaf(images), leaf(images + 1)

    def beside_another(x):
        thread = threading.Thread(target=lambda: found.append(ops.silu(other)))
        thread.start()
        thread.join()
        return ops.relu(x)

    found = []
    trained(lambda: beside_another(x))
    _, composition = composed.watch(beside_another, (x,), {})
    assert len(composition.steps) == 1
    found[-1].sum().backward()
    composition((x,)).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    assert torch.allclose(other.grad, gradient(F.silu, other), atol=1e-5)


def test_an_error_leaves_nothing_behind(images):
    x = leaf(images)
    for _ in range(ENOUGH):
        with pytest.raises(RuntimeError, match="kernel"):
            ops.max_pool2d(x, 99)
        with (
            mock.patch.object(launch.Prepared, "_by_triton", side_effect=RuntimeError("no memory")),
            pytest.raises(RuntimeError, match="no memory"),
        ):
            ops.tanh(x)
        assert not launch.thread.is_whole
        assert launch.thread.watcher is launch.thread.composer is None
    assert torch.allclose(backward(ops.tanh(x), x), gradient(torch.tanh, x), atol=1e-5)


def test_layers_learn_what_torchs_learn(again, device):
    """Ten steps, of which most are repeats."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    )
    theirs.load_state_dict(ours.state_dict())
    losses = []
    for model in (ours.to(device), theirs.to(device)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        for _ in range(10):
            images = torch.randn(4, 3, 6, 5, device=device)
            loss = model(images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for one, other in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=1e-3, atol=1e-5)
    assert again.count("call") > 20
