"""The memory format of outputs where one argument alone is channels_last."""

import pytest
import torch
from torch import Tensor

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import cases

pytestmark = pytest.mark.interpret

# its losses are laid out as the input, torch's as one of the intermediate results
OWN_FORMAT = {"binary_cross_entropy_with_logits"}


def images():
    """Every image of the samples that are repeated with every layout."""
    return [
        pytest.param(spec, sample.name, name, id=f"{spec.name}-{sample.name}-{name}")
        for spec in specs()
        if spec.name not in OWN_FORMAT
        for sample in spec.samples(Maker(torch.float32, "meta"))
        if sample.layouts
        for name, value in sample.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 4
    ]


def order(tensor):
    """The strides that some offset uses."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


@pytest.mark.parametrize(("spec", "name", "argument"), images())
def test_outputs_have_torchs_format(spec, name, argument, device):
    """Of gradients torch promises less: on a CPU convolution's follow the library that it calls."""
    make = Maker(torch.float32, device, f"{spec.name}/{name}")
    given = dict(cases.sample_of(spec, name, make).arguments)
    given[argument] = cases.relayout(given[argument], "channels_last")
    actual, expected = (cases.run(f, spec, given) for f in (spec.op, spec.reference))
    for value, other in zip(actual.outputs, expected.outputs, strict=True):
        assert order(value) == order(other)
