"""What the battery says of an op that does less for autograd, autocast or a compiler than torch."""

from dataclasses import replace

import pytest
import torch

from tests.subjects import CASE, CUBE, PRODUCT, kinds, wrong
from tritorch.registry import Sample
from tritorch.testing import battery, battery_gradients, battery_torch

pytestmark = pytest.mark.reference


class Squared(torch.autograd.Function):
    """input^2 whose backward divides by a detached copy: right once, wrong twice."""

    @staticmethod
    def forward(ctx, input):
        ctx.save_for_backward(input)
        return input**3

    @staticmethod
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return grad * 3 * input.detach() ** 2


class OnlyOnce(Squared):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (input,) = ctx.saved_tensors
        return grad * 3 * input**2


def test_strides_of_results_are_torchs():
    subject = wrong(lambda input, weight: (input @ weight).t().contiguous().t(), gradients=())
    (found,) = battery_torch.layout_of_results(subject, CASE)
    assert found.message == "output 0 has strides (1, 6), torch's (7, 1)"


class MeanOfRows(torch.autograd.Function):
    """Whose gradient is an expanded view, which a hook cannot write into."""

    @staticmethod
    def forward(ctx, input):
        ctx.shape = input.shape
        return input.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        return (grad / ctx.shape[1]).expand(ctx.shape)


def test_a_gradient_that_torch_writes_out_is_no_view():
    means = replace(CUBE, reference=lambda input: input.mean(1, keepdim=True))
    (found,) = battery_torch.layout_of_results(wrong(MeanOfRows.apply, means), CASE)
    assert found.message == "gradient of input has strides (1, 0), torch's (5, 1)"
    assert battery_torch.layout_of_results(wrong(means.reference, means), CASE) == []


def test_an_output_that_forgets_the_format_of_an_argument_is_told():
    def forgetful(input, weight):
        return torch.conv2d(input, weight).contiguous()

    images = replace(
        PRODUCT,
        op=forgetful,
        reference=torch.conv2d,
        samples=lambda make: iter(
            [Sample("typical", input=make(2, 3, 5, 5), weight=make(4, 3, 2, 2))]
        ),
    )
    for argument in ("input", "weight"):
        (found,) = battery_torch.format_of_outputs(images, CASE, argument)
        assert found.message == "output 0 has strides (64, 16, 4, 1), torch's (64, 1, 16, 4)"
        right = replace(images, op=torch.conv2d)
        assert battery_torch.format_of_outputs(right, CASE, argument) == []


def test_a_write_that_autograd_does_not_see_is_told():
    def unseen(input, weight):
        # of .data autograd keeps no count
        input.data.add_(1)

    def seen(input, weight):
        input.add_(1)

    subject = wrong(unseen, reference=seen, mutates=("input",), gradients=())
    (found,) = battery_torch.counts_writes(subject, CASE)
    assert (found.kind, found.argument) == ("mutation", "input")
    assert found.message.startswith("input has changed and its version has not")
    assert battery_torch.counts_writes(replace(subject, op=seen), CASE) == []


def test_a_gradient_lost_in_a_view_is_told():
    def op(input, weight):
        # a view is no leaf
        return (input if input.is_leaf else input.detach()) @ weight

    found = battery_gradients.views(wrong(op), CASE)
    assert {f.argument for f in found} == {"gradient of input"}
    assert [f.message.split(": ")[0] for f in found] == [
        "input is leaf.mT",
        "input is leaf[1:]",
    ]


def test_a_gradient_of_one_tensor_given_twice_is_told():
    def op(input, weight):
        return (input.detach() if input is weight else input) @ weight

    def square(make):
        yield Sample("typical", input=make(5, 5), weight=make(5, 5))

    found = battery_gradients.views(wrong(op, samples=square), CASE)
    assert [f.message.split(": ")[0] for f in found] == ["weight is input"]


def test_a_second_gradient_is_right_or_refused():
    case = replace(CASE, dtype=torch.float64)
    assert battery_gradients.second_gradient(CUBE, case) == []
    wrong_twice = replace(CUBE, op=Squared.apply)
    assert kinds(battery_gradients.second_gradient(wrong_twice, case)) == ["gradients"]
    once = replace(CUBE, op=OnlyOnce.apply, double_backward=False)
    assert battery_gradients.second_gradient(once, case) == []
    assert battery_gradients.once_differentiable(once, case) == []
    assert kinds(battery_gradients.once_differentiable(CUBE, case)) == ["gradients"]


def test_half_of_a_second_gradient_is_told_where_none_is_claimed():
    class Half(Squared):
        @staticmethod
        def backward(ctx, grad):
            (input,) = ctx.saved_tensors
            return grad * 3 * input.detach() * input

    subject = replace(CUBE, op=Half.apply, double_backward=False)
    assert battery.values(subject, CASE) == []
    (found,) = battery_gradients.second_gradient(subject, CASE)
    assert "once_differentiable" in found.message


def test_autocast_lowers_where_it_is_claimed():
    subject = replace(PRODUCT, autocast="lower")
    assert battery_torch.autocast(subject, CASE) == []

    def deaf(input, weight):
        with torch.autocast("cpu", enabled=False):
            return input @ weight

    found = battery_torch.autocast(replace(subject, op=deaf), CASE)
    assert kinds(found)[0] == "shape"
    assert "torch.float32, torch's torch.bfloat16" in found[0].message


def test_a_break_of_the_graph_is_told():
    def op(input, weight):
        torch._dynamo.graph_break()
        return input @ weight

    assert kinds(battery_torch.compiles(wrong(op), CASE)) == ["compilation"]


def test_a_library_op_is_checked():
    with torch.library._scoped_library("tritorch_test", "FRAGMENT") as scope:
        scope.define("twice(Tensor input) -> Tensor")
        scope.impl("twice", lambda input: 2 * input, "CPU")
        subject = replace(CUBE, op=torch.ops.tritorch_test.twice, gradients=())
        (found,) = battery_torch.library(subject, CASE)
        assert found.kind == "library"
        assert "twice" in found.message
        scope.impl("twice", lambda input: input.new_empty(input.shape, dtype=torch.int64), "Meta")
        (found,) = battery_torch.library(subject, CASE)
        assert found.kind == "library"
        assert found.message.endswith("Dtypes torch.float32 and torch.int64 are not equal!")
    (found,) = battery_torch.library(CUBE, CASE, required=True)
    assert found.message == "no library op was called"
