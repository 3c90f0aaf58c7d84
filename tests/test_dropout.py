"""Dropout: its mask by seed, generator, layout and program, and torch's rules around it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import nn, ops
from tritorch.ops.dropout import _random_numbers, dropout_reference

pytestmark = pytest.mark.interpret


@pytest.fixture
def seed(device):
    return torch.tensor([-(2**62) + 12345], device=device)


def kept(y):
    return y != 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_zeros(p, seed, device):
    n = 1 << 15
    zeros = n - int(kept(ops.dropout(torch.ones(n, device=device), p, seed=seed)).sum())
    # five standard deviations
    assert abs(zeros - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_neighbours_and_seeds_are_independent(seed, device):
    n = 1 << 14
    mask = kept(ops.dropout(torch.ones(n, device=device), seed=seed)).float() - 0.5
    other = kept(ops.dropout(torch.ones(n, device=device), seed=seed + 1)).float() - 0.5
    high = kept(ops.dropout(torch.ones(n, device=device), seed=seed + 2**32)).float() - 0.5
    limit = 5 * 0.25 * math.sqrt(n)
    for distance in (1, 2, 3, 4, 512, 1024, 2048):
        assert abs(float((mask[distance:] * mask[:-distance]).sum())) < limit
    assert abs(float((mask * other).sum())) < limit
    assert abs(float((mask * high).sum())) < limit


@pytest.mark.parametrize("p", [0.25, 0.5])
def test_what_is_kept_is_scaled_exactly(p, seed, device):
    x = torch.randn(999, dtype=torch.float64, device=device)
    y = ops.dropout(x, p, seed=seed)
    assert torch.equal(y, torch.where(kept(y), x * (1 / (1 - p)), 0.0))


def test_scale_is_not_rounded_to_float32(seed, device):
    y = ops.dropout(torch.ones(64, dtype=torch.float64, device=device), 0.1, seed=seed)
    assert set(y.tolist()) == {0.0, 1 / 0.9}


def test_manual_seed_repeats_a_call(device):
    x = torch.ones(4096, device=device)
    torch.manual_seed(5)
    first, second = ops.dropout(x), ops.dropout(x)
    torch.manual_seed(5)
    assert torch.equal(ops.dropout(x), first)
    assert not torch.equal(first, second)


VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[..., ::2],
    "transposed": lambda x: x.mT,
}


@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("grad", ["like", "contiguous", "expanded"])
@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_has_the_mask_of_the_output(layout, grad, inplace, device):
    """Also where the gradient is laid out in another order than the input."""
    leaf = torch.rand(2, 3, 6, 10, device=device, requires_grad=True)
    x = VIEWS[layout](leaf + 1)
    version = x._version
    y = ops.dropout(x, 0.4, inplace=inplace)
    assert (y is x) == (x._version > version) == inplace
    grads = {
        "like": torch.ones_like(y),
        "contiguous": torch.ones(y.shape, device=device),
        "expanded": torch.ones((), device=device).expand(y.shape),
    }
    (found,) = torch.autograd.grad(y, leaf, grads[grad])
    mask = kept(y)
    assert 0 < int(mask.sum()) < mask.numel()
    assert torch.equal(kept(VIEWS[layout](found)), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_reference_path_has_the_same_mask(layout, seed, device):
    x = torch.rand(2, 3, 20, 30, device=device) + 1
    x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
    assert_close(ops.dropout(x, 0.3, seed=seed), dropout_reference(x, 0.3, seed=seed))


def test_philox_has_its_published_numbers():
    """The known answer of Philox4x32-10 for a counter and a key of zeros."""
    numbers = _random_numbers(torch.zeros(1, dtype=torch.int64), 4)
    assert [n % 2**32 for n in numbers.tolist()] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, False)])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_dropped_and_the_input_returned(p, training, inplace, device):
    x = torch.randn(5, device=device, requires_grad=True)
    for function in (ops.dropout, F.dropout):
        assert function(x, p, training, inplace) is x
    empty = torch.ones(0, device=device)
    assert ops.dropout(empty, 0.5) is empty


def test_everything_is_dropped(device):
    x = torch.tensor([1.0, -2.0, math.inf, math.nan], device=device)
    assert_close(ops.dropout(x, 1.0), F.dropout(x, 1.0), equal_nan=True)


def test_dropped_infinity_is_nan_as_in_torch(seed, device):
    x = torch.full((64,), math.inf, device=device)
    y = ops.dropout(x, seed=seed)
    mask = kept(ops.dropout(torch.ones(64, device=device), seed=seed))
    assert torch.equal(y.isnan(), ~mask)
    theirs = F.dropout(x)
    assert bool(theirs.isnan().any())
    assert not theirs.isfinite().any()


def test_in_place_refuses_a_leaf(device):
    leaf = torch.ones(3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf"):
        ops.dropout(leaf, inplace=True)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_probabilities_outside_are_refused_as_by_torch(p):
    for function in (ops.dropout, F.dropout):
        with pytest.raises(ValueError, match=r"from 0 to 1|between 0 and 1"):
            function(torch.ones(2), p)


def test_only_the_seed_is_saved(device):
    sizes = []

    def note(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    x = torch.randn(4096, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ops.dropout(x)
    assert sizes == [8]


def test_checkpoint_recomputes_the_same_mask(device):
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(256, device=device, requires_grad=True)
    y = checkpoint(lambda t: ops.dropout(t * 2), x, use_reentrant=False)
    y.sum().backward()
    assert torch.equal(kept(x.grad), kept(y))


def test_layer_follows_training_and_copies(device):
    layer = nn.Dropout(0.5)
    x = torch.ones(512, device=device)
    assert layer.eval()(x) is x
    assert 0 < int(kept(copy.deepcopy(layer.train())(x)).sum()) < 512


def test_compiled_layer_drops_the_same_in_both_directions(device):
    layer = torch.compile(nn.Dropout(0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(256, device=device, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(kept(x.grad), kept(y))
    assert 0 < int(kept(y).sum()) < 256
    assert not torch.equal(layer(x), y)
