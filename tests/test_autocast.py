"""Casts of autocast: each leaf once in a region, as torch's, and anew in the next."""

import functools
import gc

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tritorch
import tritorch.nn as nn
from tests.test_transforms import counting
from tritorch import binding

pytestmark = pytest.mark.interpret

DTYPE = torch.bfloat16


def saved_by(call):
    """What autograd keeps of `call()`, by address, and its result."""
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    return saved, result


SHARED = {
    "Linear": (lambda module: module.Linear(16, 16), (3, 16)),
    "Conv2d": (lambda module: module.Conv2d(4, 4, 3, padding=1), (1, 4, 3, 3)),
    "ConvTranspose2d": (lambda module: module.ConvTranspose2d(4, 4, 3, padding=1), (1, 4, 3, 3)),
}


@pytest.mark.parametrize(("make", "shape"), SHARED.values(), ids=SHARED)
def test_a_shared_layer_keeps_one_cast_of_its_weight(make, shape, device):
    kept, gradients = [], []
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        layer, x = make(module).to(device), torch.randn(shape).to(device)
        own = [*layer.parameters(), x]
        with torch.autocast(device, dtype=DTYPE), counting(own) as storages:
            y = layer(layer(layer(x)))
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        y.float().sum().backward()
        gradients.append(layer.weight.grad)
    assert kept[0] <= kept[1]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)


def test_a_region_casts_anew(device):
    """What is written behind autograd's back is seen in the next one, as by torch."""
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    x = torch.ones(1, 2, device=device)
    results = []
    for value in (1.0, 3.0):
        # no version moves
        weight.data.fill_(value)
        with torch.autocast(device, dtype=DTYPE):
            results.append(nn.functional.linear(x, weight))
    assert [result.tolist() for result in results] == [[[2.0, 2.0]], [[6.0, 6.0]]]


def test_a_nested_region_is_the_same(device):
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    x = torch.ones(1, 2, device=device)

    def call():
        with torch.autocast(device, dtype=DTYPE):
            first = nn.functional.linear(x.requires_grad_(), weight)
            with torch.autocast(device, enabled=False):
                full = nn.functional.linear(x, weight)
            with torch.autocast(device, dtype=torch.float16):
                half = nn.functional.linear(x, weight)
            return first, full, half, nn.functional.linear(x, weight)

    saved, results = saved_by(call)
    assert [result.dtype for result in results] == [DTYPE, torch.float32, torch.float16, DTYPE]
    shapes = [(tensor.dtype, tensor.shape) for tensor in saved.values()]
    assert shapes.count((DTYPE, weight.shape)) == 1
    assert shapes.count((torch.float16, weight.shape)) == 1


def test_no_cast_outlives_its_region(device):
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    with torch.autocast(device, dtype=DTYPE):
        y = nn.functional.linear(torch.ones(1, 2, device=device, requires_grad=True), weight)
        cast = torch.utils.weak.TensorWeakRef(y.grad_fn.saved_tensors[1])
        y.sum().backward()
        del y
        gc.collect()
        assert cast() is not None
    assert cast() is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_region_ends_under_any_default_dtype(dtype, device, monkeypatch):
    """What is written past autograd is cast anew in the next region, and no cast is kept."""
    monkeypatch.setattr(binding, "_REGIONS", {})
    layer = nn.Linear(8, 8, device=device, dtype=torch.float32)
    x, kind = torch.randn(2, 8, device=device), torch.device(device).type
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        for factor in (1.0, 3.0):
            layer.weight.data.mul_(factor)
            with torch.autocast(kind, dtype=DTYPE):
                y = layer(x.float())
                expected = torch.nn.functional.linear(x.float(), layer.weight, layer.bias)
            assert_close(y, expected)
        del y, expected
    finally:
        torch.set_default_dtype(before)
    assert binding._REGIONS[kind]._casts == {}


def test_selective_checkpoints_hear_of_no_product_that_is_not_theirs(device):
    """One that keeps products finds in its second pass as many as in the first."""

    def step(module, inputs):
        blocks = torch.nn.ModuleList([torch.nn.Linear(8, 8, device=device) for _ in range(2)])
        blocks.load_state_dict(state)
        blocks = tritorch.convert(blocks) if module is nn else blocks
        h = inputs
        keeping = functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]
        )
        with torch.autocast(torch.device(device).type, dtype=DTYPE):
            for block in blocks:
                h = checkpoint(block, h, use_reentrant=False, context_fn=keeping)
        h.float().sum().backward()
        return h, *(parameter.grad for parameter in blocks.parameters())

    state = torch.nn.ModuleList(
        [torch.nn.Linear(8, 8, device=device) for _ in range(2)]
    ).state_dict()
    inputs = torch.randn(4, 8, device=device)
    for ours, theirs in zip(step(nn, inputs), step(torch.nn, inputs), strict=True):
        assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_a_step_within_a_region_is_seen(device):
    """Where torch goes on with the old weight."""
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    x = torch.ones(1, 2, device=device)
    optimizer = tritorch.optim.SGD([weight], lr=1.0)
    with torch.autocast(device, dtype=DTYPE):
        nn.functional.linear(x, weight).sum().backward()
        optimizer.step()
        assert nn.functional.linear(x, weight).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("off", ["cache", "gradients"])
def test_without_the_cache_or_gradients_nothing_is_shared(off, device):
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    x = torch.ones(1, 2, device=device)
    with (
        torch.autocast(device, dtype=DTYPE, cache_enabled=off != "cache"),
        torch.set_grad_enabled(off != "gradients"),
    ):
        first = nn.functional.linear(x, weight)
        weight.data.fill_(3.0)
        second = nn.functional.linear(x, weight)
    assert (first.tolist(), second.tolist()) == ([[2.0, 2.0]], [[6.0, 6.0]])


def test_compiled_programs_cast_too(device):
    torch.compiler.reset()
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))

    def program(x):
        with torch.autocast(device, dtype=DTYPE):
            return tritorch.matmul(tritorch.matmul(x, weight), weight)

    x = torch.ones(1, 2, device=device)
    y = torch.compile(program, fullgraph=True, backend="aot_eager")(x)
    y.float().sum().backward()
    assert (y.dtype, y.tolist()) == (DTYPE, [[4.0, 4.0]])
    assert weight.grad.tolist() == [[4.0, 4.0], [4.0, 4.0]]
