"""Decides whether a result is right up to rounding: a bound from the data, never a fixed tolerance.

`compare` measures a result against the truth, which is the same op in float64 on the same inputs.
Write o for the result, t for the truth, r for the truth rounded to the result's dtype, u for the
unit roundoff of that dtype, v for that of the accumulator (2^-24; 2^-53 for float64), and, for
each element, K for the number of products summed, s1 for the sum of their magnitudes, s2 for the
root of the sum of their squares (`scales.py` derives all three).  A result is accepted if it has

    C0  for an `exact` comparison: o = r everywhere; else NaN and infinity exactly where r has them,
    C1  every element within   u |t| + 6 sqrt(2) ((sqrt(K) v + w) s2 + sqrt(K) v |t| / 3)
                               + 2 v s1 + 2 w |t| + half the smallest subnormal,
    C2  an RMS error of at most the larger of   2 rms(torch - t)   and
                               rms(r - t) + (1 + 6 / sqrt(2 n)) rms(d),
        where d = sqrt(K) v (s2 / 2 + |t| / 3) + w (s2 + 2 |t|) and n is the number of elements,
    C3  a slope <o - t, t> / <t, t> that leaves the interval spanned by 0, r's slope and twice
        torch's by at most     6 sqrt(sum t^2 (d^2 + u^2 t^2 / 3)) / <t, t> + 8 v + 2 w,
        unless torch's is beyond 1/2: such a truth is what rounding left of zero.

C1 is the probabilistic bound of Higham and Mary (A new approach to probabilistic rounding error
analysis, SIAM J. Sci. Comput. 41, 2019): rounding errors of K terms add up like a random walk, and
partial sums of terms that agree in sign grow with |t|.  w is the unit roundoff to which the op may
shorten its operands; hardware that truncates them shrinks the result by up to 2 w.  C2 asks for
torch's accuracy, and neither a bad nor a lucky run of torch moves it far.  C3 sees a wrong factor
far below the noise of one element: a divisor, an epsilon, a momentum.

Composite ops (batch norm, losses) are no such sums.  There K is 16, for a chain of elementwise
steps, s2 is |t| + rms(t) or what `derive_conditions` finds, which sees how far the result moves
with its operands (the largest of them where it is zero and stays so), and s1 is sqrt(K) s2.  Where
s1 is not given C1 grows by 2 k s2, with k the worst error of torch's own result beyond r's, in
units of s2: where an op cancels, so does torch.  C3 grows by sum |t| d / <t, t>: the rounding of
one mean or root is in every element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# one rounding error in 5e8 leaves six standard deviations
_LAMBDA = 6.0
COMPOSITE_TERMS = 16.0


@dataclass(frozen=True)
class Verdict:
    """What `compare` found.

    `headroom`: the largest share that any clause uses of its limit, so that `accepted` is headroom
    <= 1; in C1 and C2 what counts is the error beyond the rounded truth's, which no result can do
    without.  `ratio`: RMS error over torch's, None without a baseline.  `failure`: the clauses
    broken, each named and with its numbers; empty if accepted.  `index`: the element that comes
    worst under C1 (C0 where that fails), with its `actual` and `truth`; None if there is none.
    `wrong`: which elements break C0 or C1 by themselves; None if none can be named.
    """

    accepted: bool
    headroom: float
    ratio: float | None
    failure: str
    index: tuple[int, ...] | None = None
    actual: float = math.nan
    truth: float = math.nan
    wrong: Tensor | None = field(default=None, compare=False, repr=False)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to `dtype`: 2^-24 for float32, 2^-8 for bfloat16."""
    return float(torch.finfo(dtype).eps) / 2


def compare(
    actual: Tensor,
    truth: Tensor,
    *,
    baseline: Tensor | None = None,
    scale: Tensor | None = None,
    magnitude: Tensor | None = None,
    terms: Tensor | float | None = None,
    unit_in: float = 0.0,
    exact: bool = False,
) -> Verdict:
    """Whether `actual` is `truth` up to the rounding that its dtype and the data excuse.

    `truth`: float64, or any dtype for an `exact` comparison (integer and bool results are always
    compared exactly).  `baseline`: torch's own result, of the dtype that `actual` must have.
    `scale`, `magnitude`, `terms`: s2, s1 and K of the module's text, each a tensor that broadcasts
    to `truth`; all optional.  s1 alone stands in for s2.
    `unit_in`: 2^-11 if the op may use TF32, 2^-8 if it may shorten operands to bfloat16.

    Raises TypeError for a truth that is not float64 or a complex result, ValueError for a baseline
    of another shape than the truth's.
    """
    actual, truth = actual.detach().to(truth.device), truth.detach()
    if actual.is_complex():
        raise TypeError(f"compare: expects a real result, received {actual.dtype}")
    if actual.shape != truth.shape:
        return _rejected(f"shape: {tuple(actual.shape)}, where the truth has {tuple(truth.shape)}")
    if baseline is not None:
        if baseline.shape != truth.shape:
            raise ValueError(
                f"compare: expects a baseline of shape {tuple(truth.shape)}, "
                f"received {tuple(baseline.shape)}"
            )
        if baseline.dtype != actual.dtype:
            return _rejected(f"dtype: {actual.dtype}, where torch gives {baseline.dtype}")
        baseline = baseline.detach().to(truth.device)
    if exact or not actual.is_floating_point():
        return _compare_exactly(actual, truth)
    if truth.dtype != torch.float64:
        raise TypeError(f"compare: expects a truth in float64, received {truth.dtype}")
    if truth.numel() == 0:
        return Verdict(True, 0.0, None, "")

    rounded = truth.to(actual.dtype)
    budget = _budget(actual.dtype, truth, rounded, baseline, scale, magnitude, terms, unit_in)
    # a truth this close to the largest number may overflow or not
    borderline = (truth.abs() - torch.finfo(actual.dtype).max).abs() <= budget.bound
    special = ~(actual.isfinite() & rounded.isfinite())
    wrong = special & ~_same(actual, rounded) & ~borderline
    if wrong.any():
        return _different(actual, truth, wrong, "C0 NaN and infinity")
    return _judge(actual, truth, rounded, baseline, budget, ~special)


def _rejected(failure: str) -> Verdict:
    return Verdict(False, math.inf, None, failure)


def _same(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual == expected) | (actual.isnan() & expected.isnan())


def _compare_exactly(actual: Tensor, truth: Tensor) -> Verdict:
    wrong = ~_same(actual, truth.to(actual.dtype))
    return (
        _different(actual, truth, wrong, "C0 exact")
        if wrong.any()
        else Verdict(True, 0.0, None, "")
    )


def _different(actual: Tensor, truth: Tensor, wrong: Tensor, clause: str) -> Verdict:
    index = tuple(wrong.nonzero()[0].tolist())
    got, expected = actual[index].item(), truth[index].item()
    failure = (
        f"{clause}: {int(wrong.sum())} of {wrong.numel()} elements differ, "
        f"at {index} {got} where the truth is {expected}"
    )
    return Verdict(False, math.inf, None, failure, index, float(got), float(expected), wrong)


@dataclass(frozen=True)
class _Budget:
    """`bound` of C1, `noise` d of C2 and C3, how much of it is `in_step`, `slope` of C3."""

    bound: Tensor
    noise: Tensor
    in_step: float
    slope: float


def _budget(
    dtype: torch.dtype,
    truth: Tensor,
    rounded: Tensor,
    baseline: Tensor | None,
    scale: Tensor | None,
    magnitude: Tensor | None,
    terms: Tensor | float | None,
    unit_in: float,
) -> _Budget:
    unit = unit_roundoff(dtype)
    unit_acc = unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)
    size = truth.abs()
    if terms is None:
        terms = COMPOSITE_TERMS if scale is None and magnitude is None else 1.0
    walk = torch.as_tensor(terms, dtype=torch.float64, device=truth.device).sqrt() * unit_acc
    if magnitude is None:
        guess = size + root_mean_square(truth[rounded.isfinite()])
        scale = (guess if scale is None else scale).to(truth)
        slack, in_step = 2 * (walk + _excess(truth, rounded, baseline, scale)) * scale, 1.0
    else:
        scale = (magnitude if scale is None else scale).to(truth)
        slack, in_step = 2 * unit_acc * magnitude.to(truth), 0.0
    # torch does not name the smallest subnormal of every dtype
    tiny = torch.finfo(dtype).tiny * unit
    bound = (
        unit * size
        + _LAMBDA * math.sqrt(2) * ((walk + unit_in) * scale + walk * size / 3)
        + 2 * unit_in * size
        + tiny
        + slack
    )
    noise = walk * (scale / 2 + size / 3) + unit_in * (scale + 2 * size)
    return _Budget(bound, noise, in_step, 8 * unit_acc + 2 * unit_in)


def _excess(truth: Tensor, rounded: Tensor, baseline: Tensor | None, scale: Tensor) -> float:
    """The worst error of `baseline` beyond that of the rounded truth, in units of `scale`."""
    if baseline is None:
        return 0.0
    error, unavoidable = (baseline.double() - truth).abs(), (rounded.double() - truth).abs()
    excess = (error - unavoidable) / scale
    excess = excess[excess.isfinite() & rounded.isfinite()]
    return float(excess.max().clamp(min=0)) if excess.numel() else 0.0


def _judge(
    actual: Tensor,
    truth: Tensor,
    rounded: Tensor,
    baseline: Tensor | None,
    budget: _Budget,
    finite: Tensor,
) -> Verdict:
    """C1, C2 and C3 over the elements that are `finite`."""
    t = truth[finite]
    if t.numel() == 0:
        return Verdict(True, 0.0, None, "")
    error, unavoidable = actual[finite].double() - t, rounded[finite].double() - t
    bound, noise = budget.bound[finite], budget.noise[finite]
    of_torch = None
    if baseline is not None:
        of_torch = baseline[finite].double() - t
        # where torch overflows it is no yardstick
        of_torch = torch.where(of_torch.isfinite(), of_torch, torch.zeros_like(t))
    failures = []

    elements = _elements(error, unavoidable, bound)
    worst = int(elements.argmax())
    index = tuple(finite.nonzero()[worst].tolist())
    wrong = None
    if elements[worst] > 1:
        wrong = torch.zeros_like(finite)
        wrong[finite] = elements > 1
        failures.append(
            f"C1 element: {int((elements > 1).sum())} of {t.numel()} out of bounds, worst at "
            f"{index}: {actual[index].item()} where the truth is {t[worst].item()}, "
            f"error {abs(float(error[worst])):.3g}, bound {float(bound[worst]):.3g}"
        )
    rms, least = root_mean_square(error), root_mean_square(unavoidable)
    rms_limit = least + (1 + _LAMBDA / math.sqrt(2 * t.numel())) * root_mean_square(noise)
    if of_torch is not None:
        rms_limit = max(rms_limit, 2 * root_mean_square(of_torch))
    overall = _share(max(rms - least, 0), rms_limit - least)
    if overall > 1:
        compared = "" if of_torch is None else f", torch's {root_mean_square(of_torch):.3g}"
        failures.append(f"C2 rms: error {rms:.3g}, limit {rms_limit:.3g}{compared}")
    slope = _slope(error, t)
    excused = [0.0, _slope(unavoidable, t)]
    if of_torch is not None:
        excused.append(2 * _slope(of_torch, t))
    margin = budget.slope + _slope_noise(noise, t, unit_roundoff(actual.dtype))
    margin += budget.in_step * _slope(noise * t.sign(), t)
    slope_limit = max(excused) + margin if slope > 0 else margin - min(excused)
    bias = _share(abs(slope), slope_limit)
    if of_torch is not None and abs(_slope(of_torch, t)) > 0.5:
        # all of the truth is less than what torch rounds: it has no scale to be off from
        bias = 0.0
    if bias > 1:
        failures.append(f"C3 bias: scaled by 1 {slope:+.3g}, limit {slope_limit:.3g}")

    return Verdict(
        accepted=not failures,
        headroom=max(float(elements[worst]), overall, bias),
        ratio=None if of_torch is None else _share(rms, root_mean_square(of_torch)),
        failure="; ".join(failures),
        index=index,
        actual=float(actual[index]),
        truth=float(t[worst]),
        wrong=wrong,
    )


def _elements(error: Tensor, unavoidable: Tensor, bound: Tensor) -> Tensor:
    used = (error.abs() - unavoidable.abs()) / (bound - unavoidable.abs())
    # a bound of nothing is kept by using nothing of it
    return torch.where(error.abs() <= unavoidable.abs(), torch.zeros_like(used), used)


def _slope(error: Tensor, t: Tensor) -> float:
    power = float(t.square().sum())
    return float((error * t).sum()) / power if power > 0 else 0.0


def _slope_noise(noise: Tensor, t: Tensor, unit: float) -> float:
    power = float(t.square().sum())
    variance = (t.square() * (noise.square() + (unit * t).square() / 3)).sum()
    return _LAMBDA * math.sqrt(float(variance)) / power if power > 0 else 0.0


def root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _share(used: float, limit: float) -> float:
    if limit > 0:
        return used / limit
    return math.inf if used > 0 else 0.0
