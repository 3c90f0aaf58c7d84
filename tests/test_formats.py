"""The memory format of outputs where one argument alone is channels_last."""

import pytest
import torch
from torch import Tensor

import tritorch.ops  # noqa: F401  declares the specs
from tritorch.registry import Maker, specs
from tritorch.testing import battery_torch
from tritorch.testing.trials import Case

pytestmark = pytest.mark.interpret


def images():
    """Every image of the samples that are repeated with every layout."""
    return [
        pytest.param(spec, sample.name, name, id=f"{spec.name}-{sample.name}-{name}")
        for spec in specs()
        if spec.keeps_format
        for sample in spec.samples(Maker(torch.float32, "meta"))
        if sample.layouts
        for name, value in sample.arguments.items()
        if isinstance(value, Tensor) and value.dim() == 4
    ]


@pytest.mark.parametrize(("spec", "name", "argument"), images())
def test_outputs_have_torchs_format(spec, name, argument, device):
    found = battery_torch.format_of_outputs(spec, Case(name, torch.float32, device), argument)
    assert not found, found[0].message
