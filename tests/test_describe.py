"""What a check finds out of a reference: the rule of its rounding, gradients, what it writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tritorch.registry import Maker, Sample
from tritorch.testing import inputs
from tritorch.testing.describe import bind, describe, gives_gradients

pytestmark = pytest.mark.reference


def described(reference, text, fn=None, **options):
    """The subject of a function that is its own reference."""
    parsed = inputs.parse(text)
    samples = parsed.samples([dict(zip(parsed.letters, (5, 3, 7, 2), strict=False))])
    return describe(fn or reference, reference, samples, **options)


def rms_norm(x, weight):
    return x * x.square().mean(-1, keepdim=True).rsqrt() * weight


def double_(x):
    x.mul_(2)


def add_(x, y):
    return x.add_(y)


RULES = {
    # sums of products, with what is added to them
    "matmul": (lambda x, y: x @ y, "x[M, K] y[K, N]", "multilinear"),
    "bias": (lambda x, w, b: x @ w + b, "x[M, K] w[K, N] b[N]", "multilinear"),
    "convolution": (lambda x, w: F.conv2d(x, w), "x[2, C, 5, 5] w[K, C, 3, 3]", "multilinear"),
    "sum": (lambda x: x.sum(-1), "x[M, N]", "multilinear"),
    "mean": (lambda x: x.mean(), "x[M, N]", "multilinear"),
    "product": (lambda x, y: x * y, "x[N] y[N]", "multilinear"),
    "scale": (lambda x: 2 * x, "x[N]", "multilinear"),
    "fma": (lambda a, b, c: a * b + c, "a[N] b[N] c[N]", "multilinear"),
    # gradients of a row that is taken twice are sums
    "gather": (lambda x, index: x[index], "x[V, D] index[9]:int64<V", "multilinear"),
    # terms that cancel have no bound from the result of magnitudes
    "difference": (lambda x, y: x - y, "x[N] y[N]", "composite"),
    "laplacian": (lambda x: 2 * x[1:-1] - x[:-2] - x[2:], "x[M]", "composite"),
    "softmax": (lambda x: x.softmax(-1), "x[M, N]", "composite"),
    "rms norm": (rms_norm, "x[M, N] weight[N]", "composite"),
    "square": (lambda x: x * x, "x[N]", "composite"),
    "two results": (lambda x: (x.sum(), 2 * x), "x[N]", "composite"),
    "dict": (lambda x: {"y": 2 * x}, "x[N]", "multilinear"),
    # every value is an argument's
    "relu": (lambda x: x.relu(), "x[M, N]", "exact"),
    "transpose": (lambda x: x.t().contiguous(), "x[M, N]", "exact"),
    "maximum": (lambda x: x.amax(-1), "x[M, N]", "exact"),
    "argmax": (lambda x: x.argmax(-1), "x[M, N]", "exact"),
    "pooling": (lambda x: F.max_pool2d(x, 2), "x[2, C, 6, 6]", "exact"),
    "rows": (lambda x, index: x[index], "x[V, D] index[1]:int64<V", "exact"),
    # overlapping windows have gradients that are sums
    "overlap": (lambda x: F.max_pool1d(x, 3, stride=1), "x[2, C, 30]", "composite"),
}


@pytest.mark.parametrize(("reference", "text", "rule"), RULES.values(), ids=RULES)
def test_the_rule_of_rounding_follows_from_the_reference(reference, text, rule):
    assert described(reference, text).accuracy == rule


def test_the_rule_can_be_declared():
    assert described(lambda x: x.exp(), "x[N]", accuracy="exact").accuracy == "exact"


def test_what_the_reference_writes_is_what_may_be_written():
    assert described(double_, "x[N]").mutates == ("x",)
    assert described(add_, "x[N] y[N]").mutates == ("x",)
    assert described(add_, "x[N] y[N]", mutates=["x", "y"]).mutates == ("x", "y")
    assert described(lambda x: x + 1, "x[N]").mutates == ()

    def statistics(x, running):
        running.lerp_(x.mean(0), 0.1)
        return x - x.mean(0)

    found = described(statistics, "x[M, N] running[N]:float32")
    assert (found.mutates, found.gradients) == (("running",), ())


def test_arguments_in_lists_are_described_too():
    def samples(make):
        yield Sample("two", xs=[make(3), make(4)], scale=2.0)

    def scale_(xs, scale):
        for x in xs:
            x.mul_(scale)

    found = describe(scale_, scale_, samples)
    assert (found.mutates, found.gradients, found.non_finite) == (("xs",), (), ())


def test_gradients_go_where_the_reference_has_them():
    assert described(rms_norm, "x[M, N] weight[N]").gradients == ("x", "weight")
    assert described(lambda x, i: x[i], "x[V] i[M]:int64<V").gradients == ("x",)
    assert described(lambda x, y: x.detach() * y, "x[N] y[N]").gradients == ("y",)
    assert described(lambda x: x.argmax(-1), "x[M, N]").gradients == ()
    assert described(lambda x: {"y": x.exp()}, "x[N]").gradients == ("x",)
    assert described(double_, "x[N]").gradients == ()
    assert described(rms_norm, "x[M, N] weight[N]", gradients=["x"]).gradients == ("x",)


def test_whether_the_function_gives_gradients_is_asked_of_it():
    def without(x, weight):
        return rms_norm(x, weight).detach()

    subject = described(rms_norm, "x[M, N] weight[N]")
    assert gives_gradients(subject, torch.float32)
    subject = described(rms_norm, "x[M, N] weight[N]", fn=without)
    assert subject.gradients == ("x", "weight")
    assert not gives_gradients(subject, torch.float32)


def test_dtypes_that_the_reference_refuses_are_left_out():
    def only_32_bits(x):
        if x.dtype == torch.bfloat16:
            raise TypeError("no bfloat16")
        return x * 2

    assert described(only_32_bits, "x[N]").dtypes == (torch.float32, torch.float16)
    double, half = torch.float64, torch.float16
    assert described(only_32_bits, "x[N]", dtypes=[double, half]).dtypes == (double, half)
    with pytest.raises(ValueError, match="refuses the inputs: TypeError: no bfloat16"):
        described(only_32_bits, "x[N]", dtypes=[torch.bfloat16])


def test_a_reference_must_take_float64():
    def only_16_bits(x):
        if x.dtype.itemsize > 2:
            raise TypeError("too wide")
        return x * 2

    said = "the reference refuses float64, in which it says what is right: TypeError: too wide"
    with pytest.raises(ValueError, match=said):
        described(only_16_bits, "x[N]")


def test_what_no_reference_returns_is_refused():
    with pytest.raises(
        ValueError, match="refuses the inputs: TypeError: the reference returns str"
    ):
        described(lambda x: "twice", "x[N]")


@pytest.mark.parametrize(
    ("option", "names", "known"),
    [
        ("gradients", ["index"], "x"),
        ("mutates", ["y"], "x, index"),
        ("non_finite", ["index"], "x"),
    ],
)
def test_names_of_other_arguments_are_refused(option, names, known):
    said = f"{option}: expects some of {known}, received {names[0]}"
    with pytest.raises(ValueError, match=said):
        described(lambda x, index: x[index], "x[V] index[M]:int64<V", **{option: names})


def test_special_values_are_tried_in_every_number():
    text = "x[V] index[M]:int64<V"
    assert described(lambda x, index: x[index], text).non_finite == ("x",)
    assert described(lambda x, index: x[index], text, non_finite=()).non_finite == ()


def test_positional_arguments_get_their_names():
    assert bind(rms_norm, (1, 2)) == {"x": 1, "weight": 2}


def test_a_function_without_samples_is_refused():
    with pytest.raises(ValueError, match="there are no samples"):
        describe(rms_norm, rms_norm, lambda make: [])


def test_the_reference_sees_copies():
    x = torch.ones(3)

    def samples(make):
        yield Sample("one", x=x)

    describe(double_, double_, samples)
    assert x.tolist() == [1, 1, 1]
    assert next(iter(samples(Maker()))).arguments["x"] is x
