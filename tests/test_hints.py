"""What wrong results look like, and which sentence each gets."""

import pytest
import torch

from tritorch.testing import hints

pytestmark = pytest.mark.reference

TRUTH = torch.randn(20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def changed(index, value=3.0):
    actual = TRUTH.float()
    actual[index] += value
    return actual


def rounded(dtype, error):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(TRUTH.shape, generator=generator, dtype=torch.float64)
    return (TRUTH + error * noise).to(dtype)


@pytest.mark.parametrize(
    ("actual", "ratio", "said"),
    [
        (TRUTH.float(), 1.0, ""),
        (torch.zeros(20, 24), None, "it is zero everywhere: is anything stored?"),
        (0.5 * TRUTH.float(), None, "off by the factor 0.5: a divisor, a count or an epsilon?"),
        (-TRUTH.float(), None, "off by the factor -1: a sign?"),
        (1.001 * TRUTH.float(), 1e4, "the error is 10000 times torch's"),
        (1.001 * TRUTH.float(), None, "off by the factor 1.001"),
        (TRUTH.float() + 2, None, "it is right but for 2 added everywhere"),
        (TRUTH.mT.contiguous().view(20, 24).float(), None, "it is the transposed result"),
        (changed((slice(16, None), slice(None))), None, "only from 16 of 20 on along dimension 0"),
        (changed((slice(None), slice(16, None))), None, "only from 16 of 24 on along dimension 1"),
        (changed((slice(5, None), slice(None))), None, ""),
        (changed((3, 3)), None, ""),
        (changed((slice(16, None), slice(None)), float("nan")), None, "96 elements are not finite"),
        (changed((slice(16, None), slice(None)), float("nan")), None, "the tail mask?"),
        (rounded(torch.float16, 2e-3), 4.0, "the error is 4.0 times torch's: does it accumulate"),
        (rounded(torch.float16, 1e-3), 2.0, "every error is a few roundings of 16 bits"),
        (rounded(torch.float32, 3e-4), 5e3, "products in TF32, or sums in 16 bits?"),
        (torch.zeros(3), None, ""),
    ],
)
def test_an_error_is_recognised_by_its_looks(actual, ratio, said):
    found = hints.of_values(actual, TRUTH, ratio)
    assert said in found if said else found == ""


def test_the_elements_known_to_be_wrong_are_believed():
    wrong = torch.zeros(20, 24, dtype=torch.bool)
    wrong[:, 16:] = True
    actual = changed((slice(None), slice(16, None)), 1e-4)
    assert "only from 16 of 24" in hints.of_values(actual, TRUTH, None, wrong)
