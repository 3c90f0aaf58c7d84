"""Nested tensors, which have no shape, take the reference path."""

import copy

import pytest
import torch
from torch.testing import assert_close

import tritorch
from tritorch import backend, nn

pytestmark = [
    pytest.mark.reference,
    pytest.mark.interpret,
    # torch says so of every nested tensor
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

LAYERS = {
    "linear": lambda module: module.Linear(6, 4),
    "layer_norm": lambda module: module.LayerNorm(6),
    "relu": lambda module: module.ReLU(),
    "gelu": lambda module: module.GELU(),
    "silu": lambda module: module.SiLU(),
    "tanh": lambda module: module.Tanh(),
    "softmax": lambda module: module.Softmax(-1),
    "dropout": lambda module: module.Dropout(1.0),
}


def nested(device):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, 6, generator=generator).to(device) for count in (2, 3)]
    return torch.nested.nested_tensor(rows)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_a_nested_tensor(name, device, rung):
    found = []
    backend.reset()
    for module in (nn, torch.nn):
        torch.manual_seed(0)
        layer = LAYERS[name](module).to(device)
        found.append(layer(nested(device)).unbind())
    assert_close(*found)
    reasons = {} if rung == "reference" else {name: {"a nested tensor": 1}}
    assert backend.explain() == reasons
    backend.reset()


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_a_nested_tensor_is_written_in_place(name, device):
    x = nested(device)
    y = getattr(nn.functional, name)(x, inplace=True)
    assert y is x
    expected = getattr(torch.nn.functional, name)(nested(device))
    assert_close(x.unbind(), expected.unbind())


def test_a_product_takes_a_nested_tensor(device):
    x = nested(device)
    weight = torch.ones(2, 6, 3, device=device)
    factor = torch.nested.nested_tensor(list(weight))
    assert_close(tritorch.matmul(x, factor).unbind(), torch.matmul(x, factor).unbind())


def test_a_converted_encoder_takes_padded_batches(device):
    """Without a mask of its own torch packs them into nested tensors, also with a hook in the way
    of its fast path.
    """
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2).to(device).eval()
    converted = tritorch.convert(copy.deepcopy(encoder))
    for each in (encoder, converted):
        each.layers[0].linear1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 5, 16, device=device)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], device=device, dtype=torch.bool)
    with torch.no_grad():
        found, expected = (
            each(x, src_key_padding_mask=padding)[~padding] for each in (converted, encoder)
        )
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
