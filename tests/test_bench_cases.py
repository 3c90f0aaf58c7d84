"""Numbers that a case is timed and judged on."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tritorch.bench.cases import Slot
from tritorch.bench.resnet50 import Shapes

pytestmark = pytest.mark.reference


def least(case):
    """The least size of a sum of a batch norm and a residual."""
    given = Slot.of(case, "cpu", seed=1).arguments
    sums = F.batch_norm(
        given["input"].double(),
        None,
        None,
        given["weight"].double(),
        given["bias"].double(),
        training=True,
    )
    return float((sums + given["residual"].double()).abs().min())


def test_no_sum_is_at_the_kink_of_a_relu_behind_it():
    shapes = Shapes(4, torch.bfloat16, shrink=2)
    cases = [case for case in shapes.batch_norms() if case.op == "batch_norm_add_relu"]
    assert cases
    for case in cases:
        assert least(case) > 0.9 * 2.0**-10
    # numbers as they are drawn are, among so many
    assert any(least(replace(case, settle=None)) < 2.0**-14 for case in cases)
