"""What each clause of `tritorch.testing.tolerances` accepts, catches and says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch.testing.scales import derive_conditions, derive_scales
from tritorch.testing.tolerances import compare, unit_roundoff

pytestmark = pytest.mark.reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_clause_is_named_by_what_it_alone_catches() -> None:
    truth = random(200, 200, seed=1).double()
    given = {"scale": truth.abs() + 1, "magnitude": truth.abs() + 1, "terms": 100}
    right = truth.float()
    noise = random(200, 200, seed=2).double()

    one = right.clone()
    one[3, 4] += 1e-3
    verdict = compare(one, truth, **given)
    assert verdict.failure.startswith("C1 element: 1 of 40000")
    assert verdict.index == (3, 4)
    assert verdict.actual == one[3, 4]
    assert verdict.truth == truth[3, 4]

    noisy = (truth + noise * 1e-6).float()
    assert compare(noisy, truth, **given).failure.startswith("C2 rms")
    assert compare(noisy, truth, baseline=noisy, **given).accepted

    scaled = (truth * (1 + 6.5e-7)).float()
    assert compare(scaled, truth, **given).failure.startswith("C3 bias: scaled by 1 +6.5")


def test_headroom_and_ratio_measure_the_error() -> None:
    truth = random(100, 100, seed=1).double()
    noise = random(100, 100, seed=2).double() * 1e-7
    baseline = (truth + noise).float()
    small, large = (
        compare((truth + noise * factor).float(), truth, baseline=baseline, scale=truth.abs() + 1)
        for factor in (1.0, 1.5)
    )
    assert compare(truth.bfloat16(), truth).headroom < 0.2
    assert small.headroom < large.headroom < 1
    assert small.ratio == 1
    assert large.ratio is not None
    assert 1.2 < large.ratio < 1.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_of_the_truth_is_accepted_down_to_the_smallest_number(
    dtype: torch.dtype,
) -> None:
    exponents = torch.linspace(-160, 0, 4001, dtype=torch.float64)
    truth = torch.exp2(exponents) * random(4001, seed=1).double()
    # nothing but its own rounding is excused
    verdict = compare(truth.to(dtype), truth, scale=torch.zeros(()))
    assert verdict.accepted, verdict
    assert verdict.headroom <= 1


def test_unit_roundoff_is_half_the_spacing_at_one() -> None:
    units = [unit_roundoff(dtype) for dtype in DTYPES]
    assert units == [2.0**-24, 2.0**-11, 2.0**-8, 2.0**-53]


def test_nan_and_infinity_must_be_where_the_truth_has_them() -> None:
    values = [1.0, math.nan, math.inf, -math.inf, 1e6, -1e6]
    truth = torch.tensor(values, dtype=torch.float64)
    right = truth.half()
    assert right[4] == math.inf, "1e6 is out of float16's range"
    assert compare(right, truth).accepted
    for i, value in enumerate(values):
        for other in (0.0, math.nan, math.inf, -math.inf, 65504.0):
            wrong = right.clone()
            wrong[i] = other
            same = wrong[i] == right[i] or (math.isnan(other) and math.isnan(value))
            verdict = compare(wrong, truth)
            assert verdict.accepted == bool(same), verdict
            if i > 0 and not same:
                assert verdict.failure.startswith("C0")
                assert verdict.index == (i,)


def test_a_truth_at_the_edge_of_the_range_may_overflow_or_not() -> None:
    truth = torch.tensor([65519.9, 65520.1, -65520.1], dtype=torch.float64)
    for result in ([65504.0, math.inf, -math.inf], [math.inf, 65504.0, -65504.0]):
        assert compare(torch.tensor(result).half(), truth).accepted
    assert not compare(torch.tensor([65504.0] * 3).half(), truth * 1.01).accepted


def test_exact_comparisons_accept_equality_alone() -> None:
    for right, wrong in (
        ([0, 1, 2], [0, 2, 2]),
        ([True, False, True], [True, True, True]),
        ([0.5, math.nan, -math.inf], [0.5, 0.0, -math.inf]),
        ([0.5, math.inf, 1.0], [0.5, -math.inf, 1.0]),
    ):
        truth = torch.tensor(right)
        assert compare(truth, truth, exact=True).accepted
        assert compare(truth, truth.double(), exact=True).accepted
        verdict = compare(torch.tensor(wrong), truth, exact=True)
        assert not verdict.accepted
        assert verdict.failure.startswith("C0 exact: 1 of 3")
        assert verdict.index == (1,)
    truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
    neighbour = torch.tensor([1.0, 2.0 + 2**-22])
    assert compare(neighbour, truth).accepted
    assert not compare(neighbour, truth, exact=True).accepted


def test_integer_results_are_compared_exactly_unasked() -> None:
    indices = torch.tensor([3, 1, 4])
    assert compare(indices, indices.double()).accepted
    assert not compare(indices + 1, indices.double()).accepted


def test_shape_and_dtype_must_match() -> None:
    truth = torch.ones(2, 3, dtype=torch.float64)
    assert compare(torch.ones(3, 2), truth).failure.startswith("shape: (3, 2)")
    assert compare(torch.ones(1, 3), truth).failure.startswith("shape")
    verdict = compare(torch.ones(2, 3), truth, baseline=torch.ones(2, 3).half())
    assert not verdict.accepted
    assert verdict.failure.startswith("dtype: torch.float32")


def test_what_cannot_be_compared_raises() -> None:
    ones = torch.ones(2)
    with pytest.raises(TypeError, match="truth in float64"):
        compare(ones, ones)
    with pytest.raises(TypeError, match="real result"):
        compare(ones.to(torch.complex64), ones.double())
    with pytest.raises(ValueError, match="baseline of shape"):
        compare(ones, ones.double(), baseline=torch.ones(1))


def test_empty_scalar_and_zero_results() -> None:
    assert compare(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)).accepted
    pi = torch.tensor(math.pi, dtype=torch.float64)
    assert compare(pi.float(), pi).accepted
    assert compare(pi.float(), pi, baseline=pi.float(), terms=10).index == ()
    assert not compare(pi.float() * (1 + 2**-12), pi).accepted
    zeros = torch.zeros(4, dtype=torch.float64)
    assert compare(zeros.float(), zeros, baseline=zeros.float()).accepted
    assert not compare(torch.tensor([0.0, 0.0, 1e-30, 0.0]), zeros).accepted


def test_float64_results_are_held_to_float64() -> None:
    a, b = random(20, 300, seed=1).double(), random(300, 20, seed=2).double()
    given = derive_scales(torch.matmul, (a, b)).output
    # the truth itself is rounded, and its order of summation is not the only one
    other = (a.flip(1) @ b.flip(0)).add(0)
    split = sum((a[:, i::3] @ b[i::3] for i in range(3)), torch.zeros(()).double())
    assert compare(other, a @ b, baseline=a @ b, **given).accepted
    assert compare(split, a @ b, baseline=a @ b, **given).accepted
    assert not compare((a.float() @ b.float()).double(), a @ b, baseline=a @ b, **given).accepted


def test_either_scale_serves_without_the_other() -> None:
    a, b = random(30, 200, seed=1), random(200, 30, seed=2)
    truth = a.double() @ b.double()
    given = derive_scales(torch.matmul, (a, b)).output
    right, wrong = a @ b, a @ b.half().float()
    for options in (
        {"terms": given["terms"], "scale": given["scale"]},
        {"terms": given["terms"], "magnitude": given["magnitude"]},
    ):
        assert compare(right, truth, **options).accepted
        assert not compare(wrong, truth, **options).accepted


def test_derived_scales_of_a_product() -> None:
    a, b, grad = random(3, 5, seed=1), random(5, 4, seed=2), random(3, 4, seed=3)
    scales = derive_scales(torch.matmul, (a, b), grad)
    x, y, g = a.double().abs(), b.double().abs(), grad.double().abs()
    for found, left, right in (
        (scales.output, x, y),
        (scales.grads[0], g, y.T),
        (scales.grads[1], x.T, g),
    ):
        assert found is not None
        torch.testing.assert_close(found["magnitude"], left @ right)
        torch.testing.assert_close(found["scale"], (left**2 @ right**2).sqrt())
        assert (found["terms"] == left.shape[1]).all()


def test_derived_terms_count_what_padding_leaves() -> None:
    x, weight, bias = random(2, 3, 4, 4, seed=1), random(5, 3, 3, 3, seed=2), random(5, seed=3)
    grad = random(2, 5, 4, 4, seed=4)
    scales = derive_scales(
        lambda x, w, b, padding, none: F.conv2d(x, w, b, padding=padding),
        (x, weight, bias, 1, None),
        grad,
    )
    terms = scales.output["terms"]
    assert terms[0, 0, 0, 0] == 3 * 2 * 2 + 1
    assert terms[0, 0, 1, 1] == 3 * 3 * 3 + 1
    assert [grad is None for grad in scales.grads] == [False, False, False, True, True]
    grad_bias = scales.grads[2]
    assert grad_bias is not None
    assert (grad_bias["terms"] == 2 * 4 * 4).all()
    torch.testing.assert_close(grad_bias["magnitude"], grad.double().abs().sum((0, 2, 3)))
    assert derive_scales(F.conv2d, (x, weight, bias)).grads == (None, None, None)


def test_an_average_keeps_its_divisor_out_of_the_product_of_its_scales() -> None:
    x = random(1, 1, 6, 6, seed=1)
    given = derive_scales(lambda x: F.avg_pool2d(x, 3), (x,)).output
    expected = 9**0.5 * (F.avg_pool2d(x.double() ** 2, 3) * 9 / 9**2).sqrt()
    torch.testing.assert_close(given["terms"].sqrt() * given["scale"], expected)


def norm(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


def test_derived_conditions_see_an_op_cancel() -> None:
    x, grad = random(8, 4, 32, seed=1), random(8, 4, 32, seed=2)
    near, far = (derive_conditions(norm, (x.double() + mean,), grad) for mean in (0.0, 1000.0))
    assert 1 < near.output["scale"].mean() < 5
    assert 500 < far.output["scale"].mean() < 2000
    (near_grad,), (far_grad,) = near.grads, far.grads
    assert near_grad is not None
    assert far_grad is not None
    assert far_grad["scale"].mean() > 10 * near_grad["scale"].mean()


def test_cancellation_is_excused_and_a_formula_that_doubles_it_is_not() -> None:
    x = random(8, 4, 32, seed=1) + 1000
    mean = x.mean((0, 2), keepdim=True)
    two_passes = (x - mean).square().mean((0, 2), keepdim=True)
    one_pass = x.square().mean((0, 2), keepdim=True) - mean.square()
    right, wrong = ((x - mean) * (v.clamp(min=0) + 1e-5).rsqrt() for v in (two_passes, one_pass))
    given = derive_conditions(norm, (x,)).output
    for options in ({}, {"baseline": norm(x)}):
        assert compare(right, norm(x.double()), **given, **options).accepted
        assert not compare(wrong, norm(x.double()), **given, **options).accepted
    assert not compare(right, norm(x.double())).accepted, "the data do not cancel"


def test_what_cancels_whatever_its_operands_are_is_held_to_their_rounding() -> None:
    z, target, grad = random(40, 1, seed=1), torch.zeros(40, dtype=torch.int64), random(40, seed=2)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(z, target, reduction="none")

    scales = derive_conditions(loss, (z, target), grad)
    truth = torch.zeros(40, dtype=torch.float64)
    # as from a sum in base 2
    rounded = z[:, 0] * math.log2(math.e) * math.log(2) - z[:, 0]
    assert (rounded != 0).any()
    assert compare(rounded, truth, baseline=truth.float(), **scales.output).accepted
    assert not compare(z[:, 0].half() - z[:, 0], truth, **scales.output).accepted
    assert scales.grads[0] is not None
    assert compare(rounded[:, None] * grad[:, None], truth[:, None], **scales.grads[0]).accepted
    # beside what is no zero, zero has the scale of the rest
    some = derive_conditions(lambda x: x.relu(), (torch.tensor([-1e6, 1.0]),)).output
    # torch's root is that of the processor, and may be a rounding away
    assert math.isclose(some["scale"][0], 0.5**0.5, rel_tol=1e-15)


def test_the_excess_of_torch_is_excused_where_the_scale_is_a_guess() -> None:
    truth = random(100, seed=1).double()
    rough = truth.float() + random(100, seed=2) * 1e-5
    assert not compare(rough, truth).accepted
    assert compare(rough, truth, baseline=rough).accepted
    assert compare(rough, truth, baseline=rough, scale=truth.abs()).accepted
    assert not compare(rough, truth, baseline=rough, magnitude=truth.abs()).accepted


def test_a_domain_that_ends_is_shaken_inwards():
    """Of probabilities of 1 nothing can be more: the condition is that of a little less."""

    def log(input):
        if (input > 1).any():
            raise RuntimeError("no probability")
        return input.log()

    certain = torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64)
    found = derive_conditions(log, [certain])
    # |x d/dx log x| is 1 everywhere, by the root mean square of a few draws
    moved = found.output["scale"] - certain.log().abs() - certain.log().square().mean().sqrt()
    assert (moved > 0.3).all()
    assert (moved < 3).all()
