"""The rule of `tritorch.testing.tolerances` accepts every right result here and no wrong one.

The results are plain torch on the CPU: the tiled, reordered and split sums that a kernel could use,
and the mistakes that a kernel could make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch.testing.scales import derive_conditions, derive_scales
from tritorch.testing.tolerances import compare

pytestmark = pytest.mark.reference

TF32 = 2.0**-11


@dataclass
class Case:
    """One output tensor: its truth, torch's own, and results in float32, yet to be rounded.

    `shortened`: right where the op may use TF32, wrong where not.  `given`: s1, s2 and K.
    """

    label: str
    truth: Tensor
    baseline: Tensor
    right: dict[str, Tensor]
    wrong: dict[str, Tensor]
    given: dict[str, Any] = field(default_factory=dict)
    shortened: dict[str, Tensor] = field(default_factory=dict)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], grad_output: Tensor
) -> tuple[Tensor, ...]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    return torch.autograd.grad(function(*leaves), leaves, grad_output)


def round_to_tf32(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def truncate_to_tf32(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def blunders(result: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What can go wrong with any result."""
    # an element of ordinary size: one that is all rounding noise may as well be zero
    typical = result.abs().flatten().median(0).indices
    wrong = {
        "one element zero": result.flatten().index_fill(0, typical, 0).view_as(result),
        "two rows swapped": result[torch.tensor([1, 0, *range(2, result.shape[0])])],
        "scaled by 1 + 2^-9": result * (1 + 2**-9),
    }
    if dtype == torch.float32:
        wrong["rounded to bfloat16"] = result.bfloat16().float()
    return wrong


def product(
    a: Tensor,
    b: Tensor,
    tile: int = 32,
    *,
    accumulator: torch.dtype = torch.float32,
    operand: Callable[[Tensor], Tensor] = torch.clone,
    backwards: bool = False,
) -> Tensor:
    """a @ b as a kernel computes it, tile by tile, in float32."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=accumulator)
    starts = list(range(0, a.shape[1], tile))
    for k in reversed(starts) if backwards else starts:
        part = operand(a[:, k : k + tile].float()) @ operand(b[k : k + tile].float())
        total = (total.float() + part).to(accumulator)
    return total.float()


def product_case(
    label: str,
    a: Tensor,
    b: Tensor,
    truth: Tensor,
    baseline: Tensor,
    given: Any,
    finish: Callable[[Tensor], Tensor] = torch.clone,
) -> Case:
    """Variants of `finish(a @ b)`."""
    right = {
        "tiles of 16": product(a, b, 16),
        "tiles of 32 backwards": product(a, b, 32, backwards=True),
        "tiles of 128": product(a, b, 128),
        "split into 4": sum((product(a[:, i::4], b[i::4]) for i in range(4)), torch.zeros(())),
    }
    wrong = {"last term dropped": product(a[:, :-1], b[:-1])}
    if a.shape[1] > 64:
        wrong["bfloat16 accumulator"] = product(a, b, 16, accumulator=torch.bfloat16)
        if a.dtype != torch.bfloat16:
            wrong["float16 accumulator"] = product(a, b, 16, accumulator=torch.float16)
    shortened = {}
    if a.dtype == torch.float32:
        shortened["rounded to TF32"] = product(a, b, operand=round_to_tf32)
        shortened["truncated to TF32"] = product(a, b, operand=truncate_to_tf32)
    right, wrong, shortened = (
        {name: finish(matrix) for name, matrix in results.items()}
        for results in (right, wrong, shortened)
    )
    wrong |= blunders(right["tiles of 16"], a.dtype)
    return Case(label, truth, baseline, right, wrong, dict(given), shortened)


def matmul_cases(dtype: torch.dtype, scale: float) -> Iterator[Case]:
    for terms in (9, 64, 1000):
        a = (random(67, terms, seed=terms) * scale).to(dtype)
        b = random(terms, 45, seed=terms + 1).to(dtype)
        given = derive_scales(torch.matmul, (a, b)).output
        yield product_case(f"K {terms}", a, b, a.double() @ b.double(), a @ b, given)
    # products of one sign: the partial sums grow instead of wandering
    a, b = a.abs(), b.abs()
    given = derive_scales(torch.matmul, (a, b)).output
    yield product_case("one sign", a, b, a.double() @ b.double(), a @ b, given)


def conv_cases(dtype: torch.dtype, scale: float) -> Iterator[Case]:
    x = (random(4, 6, 10, 10, seed=1) * scale).to(dtype)
    weight = random(16, 6, 3, 3, seed=2).to(dtype)
    grad_y = random(4, 16, 10, 10, seed=3).to(dtype)

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=1)

    def to_y(matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, (4, 10, 10)).transpose(0, 1)

    def to_grad_x(matrix: Tensor) -> Tensor:
        return F.fold(matrix.unflatten(1, (4, 100)).transpose(0, 1), (10, 10), 3, padding=1)

    patches = F.unfold(x.float(), 3, padding=1).transpose(0, 1).flatten(1).to(dtype)
    filters, grads = weight.flatten(1), grad_y.transpose(0, 1).flatten(1)
    scales = derive_scales(conv, (x, weight), grad_y)
    given_x, given_weight = scales.grads
    truth = conv(x.double(), weight.double())
    true_x, true_weight = gradients(conv, (x.double(), weight.double()), grad_y.double())
    torch_x, torch_weight = gradients(conv, (x, weight), grad_y)
    yield product_case("y", filters, patches, truth, conv(x, weight), scales.output, to_y)
    yield product_case("grad x", filters.T, grads, true_x, torch_x, given_x, to_grad_x)
    results = grads, patches.T, true_weight, torch_weight
    yield product_case("grad weight", *results, given_weight, lambda m: m.view_as(weight))


def batch_norm_cases(dtype: torch.dtype, scale: float) -> Iterator[Case]:
    # few positions, or one more or less of them is no more than bfloat16's rounding
    channels, count = 96, 64
    x = ((random(4, channels, 4, 4, seed=1) + 0.5) * scale).to(dtype)
    weight, bias = (random(channels, seed=2) + 2).to(dtype), random(channels, seed=3).to(dtype)
    grad_y = random(4, channels, 4, 4, seed=4).to(dtype)
    eps = 0.1 * scale**2

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)

    def to_images(rows: Tensor) -> Tensor:
        return rows.view(4, 4, 4, channels).permute(0, 3, 1, 2)

    def statistics(rows: Tensor, tile: int) -> tuple[Tensor, Tensor]:
        # Welford's update, a tile of rows at a time
        mean, squares, seen = torch.zeros(channels), torch.zeros(channels), 0
        for part in rows.split(tile):
            delta, total = part.mean(0) - mean, seen + len(part)
            squares += (part - part.mean(0)).square().sum(0)
            squares += delta.square() * (seen * len(part) / total)
            mean, seen = mean + delta * (len(part) / total), total
        return mean, squares / seen

    # one row per position
    rows, grads = (t.float().permute(0, 2, 3, 1).reshape(count, channels) for t in (x, grad_y))
    gain, shift = weight.float(), bias.float()

    def forward(mean: Tensor, inverse: Tensor) -> Tensor:
        return to_images((rows - mean) * inverse * gain + shift)

    mean, variance = statistics(rows, count)
    other_mean, other_variance = statistics(rows.flip(0), 12)
    inverse = (variance + eps).rsqrt()
    welford = forward(other_mean, (other_variance + eps).rsqrt())
    y = forward(mean, inverse)
    fused = to_images(rows * (inverse * gain) + (shift - mean * inverse * gain))
    arguments = (x.double(), weight.double(), bias.double())
    scales = derive_conditions(norm, arguments, grad_y)
    yield Case(
        "y",
        norm(*arguments),
        norm(x, weight, bias),
        {"two passes": y, "Welford": welford, "one multiplication": fused},
        blunders(y, dtype)
        | {
            "variance over n - 1": forward(mean, (variance * count / (count - 1) + eps).rsqrt()),
            "epsilon outside the root": forward(mean, 1 / (variance.sqrt() + eps**0.5)),
            "epsilon twice": forward(mean, (variance + 2 * eps).rsqrt()),
            "mean of all but one": forward(rows[:-1].mean(0), inverse),
        },
        dict(scales.output),
    )

    true_grads = gradients(norm, arguments, grad_y.double())
    torch_grads = gradients(norm, (x, weight, bias), grad_y)
    normalised = (rows - mean) * inverse
    products = grads * normalised
    sums, tiled = grads.sum(0), sum(t.sum(0) for t in grads.split(12))
    dots, tiled_dots = products.sum(0), sum(t.sum(0) for t in products.split(12))

    def backward(sums: Any, dots: Any, factor: Tensor) -> Tensor:
        return to_images(factor * (grads - sums / count - normalised * dots / count))

    grad_x = backward(sums, dots, inverse * gain)
    yield Case(
        "grad x",
        true_grads[0],
        torch_grads[0],
        {"plain": grad_x, "tiled": backward(tiled, tiled_dots, inverse * gain)},
        blunders(grad_x, dtype)
        | {
            "no mean of the gradient": backward(0, dots, inverse * gain),
            "no product term": backward(sums, 0, inverse * gain),
            "sums for means": backward(sums * count, dots * count, inverse * gain),
            "no weight": backward(sums, dots, inverse),
        },
    )
    yield Case(
        "grad weight",
        true_grads[1],
        torch_grads[1],
        {"plain": dots, "tiled": tiled_dots},
        {"last row dropped": products[:-1].sum(0), "a mean": dots / count},
        dict(scales.grads[1] or {}),
    )


def avg_pool_cases(dtype: torch.dtype, scale: float) -> Iterator[Case]:
    x = (random(4, 8, 13, 13, seed=1) * scale).to(dtype)
    grad_y = (random(4, 8, 7, 7, seed=2) * scale).to(dtype)
    window: dict[str, Any] = {"kernel_size": 3, "padding": 1, "stride": 2}
    terms = F.unfold(x.float(), **window).view(4, 8, 9, 7, 7)
    inside = F.unfold(torch.ones(1, 1, 13, 13), **window).view(9, 7, 7).sum(0)

    def spread(grads: Tensor) -> Tensor:
        columns = grads.unsqueeze(2).expand(4, 8, 9, 7, 7).reshape(4, 72, 49)
        return F.fold(columns, (13, 13), **window)

    for padding_counts in (True, False):

        def pool(x: Tensor, padding_counts: bool = padding_counts) -> Tensor:
            return F.avg_pool2d(x, **window, count_include_pad=padding_counts)

        divisors = torch.full((7, 7), 9.0), inside
        divisor, other = divisors if padding_counts else divisors[::-1]
        scales = derive_scales(pool, (x,), grad_y)
        y = terms.sum(2) / divisor
        yield Case(
            f"y {padding_counts}",
            pool(x.double()),
            pool(x),
            {
                "divided": y,
                "times the reciprocal": terms.flip(2).sum(2) * (1 / divisor),
                "summed one by one": sum(terms.unbind(2), torch.zeros(())) / divisor,
            },
            blunders(y, dtype)
            | {
                "the other divisor": terms.sum(2) / other,
                "one term missing": terms[:, :, :-1].sum(2) / divisor,
            },
            dict(scales.output),
        )
        grad_x = spread(grad_y.float() / divisor)
        yield Case(
            f"grad x {padding_counts}",
            *gradients(pool, (x.double(),), grad_y.double()),
            *gradients(pool, (x,), grad_y),
            {"divided": grad_x, "times the reciprocal": spread(grad_y.float() * (1 / divisor))},
            blunders(grad_x, dtype)
            | {
                "the other divisor": spread(grad_y.float() / other),
                "unscaled": spread(grad_y.float()),
            },
            dict(scales.grads[0] or {}),
        )


def cross_entropy_cases(dtype: torch.dtype, scale: float) -> Iterator[Case]:
    batch, classes = 512, 50
    logits = (random(batch, classes, seed=1) * 2).to(dtype)
    target = torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(2))
    z = logits.float()

    def log_sum(z: Tensor, tile: int) -> Tensor:
        # the online softmax, a tile of classes at a time
        top, total = torch.full((batch,), -math.inf), torch.zeros(batch)
        for part in z.split(tile, 1):
            new = torch.maximum(top, part.amax(1))
            total = total * (top - new).exp() + (part - new[:, None]).exp().sum(1)
            top = new
        return top + total.log()

    def losses(log_sums: Tensor, target: Tensor = target) -> Tensor:
        return log_sums - z.gather(1, target[:, None])[:, 0]

    whole, tiled, short = log_sum(z, classes), log_sum(z, 16), log_sum(z[:, :-1], classes)
    yield Case(
        "losses",
        F.cross_entropy(logits.double(), target, reduction="none"),
        F.cross_entropy(logits, target, reduction="none"),
        {"two passes": losses(whole), "online": losses(tiled)},
        blunders(losses(whole), dtype)
        | {
            "last class dropped": losses(short),
            "target off by one": losses(whole, (target + 1) % classes),
        },
    )
    total = losses(whole).sum()
    wrong = {"sum": total}
    if dtype != torch.bfloat16:
        # one part in 511 is less than the rounding of a single bfloat16
        wrong["mean over n - 1"] = total / (batch - 1)
    yield Case(
        "mean loss",
        F.cross_entropy(logits.double(), target),
        F.cross_entropy(logits, target),
        {"plain": total / batch, "tiled": losses(tiled).view(16, -1).sum(1).sum() / batch},
        wrong,
    )

    def grad(log_sums: Tensor, factor: Tensor) -> Tensor:
        return ((z - log_sums[:, None]).exp() - F.one_hot(target, classes)) * factor

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z, target)

    grad_output = torch.tensor(batch * scale).to(dtype)
    factor = grad_output.float() / batch
    probabilities = (z - z.amax(1, keepdim=True)).exp()
    softmax = probabilities / probabilities.sum(1, keepdim=True)
    yield Case(
        "grad logits",
        *gradients(loss, (logits.double(),), grad_output.double()),
        *gradients(loss, (logits,), grad_output),
        {
            "from the softmax": (softmax - F.one_hot(target, classes)) * factor,
            "from the loss": grad(tiled, factor),
        },
        blunders(grad(whole, factor), dtype)
        | {
            "not divided by the batch": grad(whole, factor * batch),
            "incoming gradient ignored": grad(whole, torch.tensor(1 / batch)),
            "no target": softmax * factor,
            "last class dropped": grad(short, factor),
        },
    )


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "cases",
    [matmul_cases, conv_cases, batch_norm_cases, avg_pool_cases, cross_entropy_cases],
    ids=lambda cases: cases.__name__,
)
def test_right_results_are_accepted_and_wrong_ones_are_not(
    cases: Callable[[torch.dtype, float], Iterator[Case]], dtype: torch.dtype, scale: float
) -> None:
    mistakes = []
    for case in cases(dtype, scale):
        for results, expected, unit_in in (
            (case.right, True, 0.0),
            (case.shortened, True, TF32),
            (case.shortened, False, 0.0),
            (case.wrong, False, 0.0),
        ):
            given = case.given | {"baseline": case.baseline, "unit_in": unit_in}
            for name, result in results.items():
                verdict = compare(result.to(dtype), case.truth, **given)
                if verdict.accepted != expected:
                    mistakes.append(f"{case.label}: {name}, right {expected}: {verdict}")
    assert not mistakes, "\n".join(mistakes)
