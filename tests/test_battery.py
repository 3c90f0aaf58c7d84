"""What each property of the battery says of an op that lacks it, and of one that has it."""

from dataclasses import replace

import pytest
import torch

from tests.subjects import CASE, CUBE, PRODUCT, kinds, product, wrong
from tritorch.testing import battery, battery_gradients, battery_torch, calls, cases, trials
from tritorch.testing.trials import Case

pytestmark = pytest.mark.reference

PROPERTIES = [
    battery.values,
    battery.exactness,
    battery.scaled,
    battery.each_gradient_alone,
    battery.repeatability,
    battery_torch.layout_of_results,
    battery_gradients.views,
    battery_gradients.second_gradient,
    battery_torch.library,
    battery_torch.compiles,
]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
def test_the_reference_has_every_property(check):
    case = replace(CASE, dtype=torch.float64) if check.__name__ == "second_gradient" else CASE
    assert check(PRODUCT, case) == []


@pytest.mark.parametrize("number", battery.SPECIAL)
def test_the_reference_has_its_own_special_values(number):
    for at in (None, *trials.corners((6, 5), [4])):
        case = replace(CASE, special=("input", number), special_at=at)
        assert battery.special_values(PRODUCT, case, strict=True) == []


def test_the_reference_has_no_history():
    sequence = battery.history_of(PRODUCT, CASE, ["typical", "tail"])
    assert [str(case) for case in sequence] == [
        "typical, float32",
        "typical, float32",
        "typical, float32, input misaligned",
        "typical, float32, weight misaligned",
        "tail, float32",
        "typical, float16",
        "typical, bfloat16",
        "typical, float64",
    ]
    assert battery.history(PRODUCT, sequence) == []


def test_a_wrong_element_is_told_with_its_place():
    def op(input, weight):
        output = input @ weight
        return output + torch.nn.functional.pad(torch.ones(1, 2), (5, 0, 0, 0))

    (found,) = battery.values(wrong(op, gradients=()), Case("typical", torch.float32))
    assert (found.kind, found.argument, found.case) == ("values", "output 0", "typical, float32")
    assert "C1 element: 12 of 42 out of bounds" in found.message
    assert "only from 5 of 7" not in found.message
    assert found.lanes == ((0, 5), (0, 6), (1, 5), (1, 6))
    assert found.count == 12


@pytest.mark.parametrize("name", ["input", "weight"])
def test_a_wrong_gradient_is_told(name):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.view_as(tensor)

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    subject = wrong(lambda **given: product(**given | {name: Scaled.apply(given[name])}))
    (found,) = battery.values(subject, CASE)
    assert (found.kind, found.argument) == ("gradients", f"gradient of {name}")
    assert "off by the factor 0.5" in found.message
    (found,) = battery_gradients.gradcheck(subject, replace(CASE, dtype=torch.float64))
    assert found.kind == "gradients"


def test_a_gradient_that_is_not_there_is_told():
    found = battery.values(wrong(lambda input, weight: input @ weight.detach()), CASE)
    assert [f.argument for f in found] == ["gradient of weight"]
    assert "missing" in found[0].message
    found = battery.each_gradient_alone(wrong(lambda input, weight: input @ weight.detach()), CASE)
    assert "there is no gradient of weight" in found[0].message


@pytest.mark.parametrize(
    ("op", "said"),
    [
        (lambda input, weight: (input @ weight).double(), "dtype: torch.float64"),
        (lambda input, weight: (input @ weight)[1:], "shape: (5, 7)"),
        (lambda input, weight: (input @ weight, input), "number: 2 outputs"),
        (lambda input, weight: None, "number: 0 outputs"),
    ],
    ids=["dtype", "shape", "two", "none"],
)
def test_another_form_of_result_is_told(op, said):
    found = battery.values(wrong(op, gradients=()), CASE)
    assert kinds(found) == ["shape"]
    assert said in found[0].message
    assert battery.exactness(wrong(op, gradients=()), CASE) or "dtype" in said


def test_results_may_come_in_lists_and_dicts_and_as_numbers():
    def several(form):
        return lambda input, weight: form(input @ weight, input.sum(), 3)

    for form in (
        lambda a, b, c: (a, b, c),
        lambda a, b, c: [a, (b, None), c],
        lambda a, b, c: {"x": a, "y": b, "z": c},
    ):
        subject = wrong(several(form), reference=several(lambda a, b, c: (a, b, c)))
        assert battery.values(replace(subject, accuracy="composite"), CASE) == []
    (found,) = battery.values(wrong(lambda input, weight: "text"), CASE)
    assert "returns str, where tensors are expected" in found.message


def test_arguments_go_by_position_where_their_names_differ():
    subject = wrong(lambda a, b, /: a @ b, reference=torch.matmul)
    assert battery.values(subject, CASE) == []
    assert calls.call(lambda x, *, weight: (x, weight), {"input": 1, "weight": 2}) == (1, 2)


def test_a_wrong_index_is_exact_evidence():
    def op(input, weight):
        return input.roll(1, 0) @ weight

    found = battery.exactness(wrong(op, gradients=()), replace(CASE, dtype=torch.bfloat16))
    assert kinds(found) == ["exactness"]
    assert "elements differ, first at" in found[0].message


def test_integers_whose_results_are_fractions_are_judged_by_rounding():
    third = 1 / 3
    subject = wrong(
        lambda input, weight: input @ weight * third,
        reference=lambda input, weight: input @ weight / 3,
        gradients=(),
    )
    assert battery.exactness(subject, CASE) == []
    assert kinds(battery.exactness(subject, CASE, fractions=True)) == ["exactness"]


def test_a_lost_nan_is_told_and_rounding_is_not():
    def dropping(input, weight):
        return (input @ weight).nan_to_num()

    case = replace(CASE, special=("input", float("nan")))
    subject = wrong(dropping, gradients=())
    assert kinds(battery.special_values(subject, case)) == ["special values"]
    always = wrong(lambda input, weight: 1.01 * (input @ weight), gradients=())
    assert battery.special_values(always, case) == []
    assert kinds(battery.values(always, CASE)) == ["values"]


def test_a_fixed_epsilon_shows_at_small_scales_alone():
    def op(input, weight):
        return input @ weight + 1e-9

    subject = wrong(op, gradients=())
    assert battery.scaled(subject, CASE) == []
    assert kinds(battery.scaled(subject, replace(CASE, scale=1e-3))) == ["values"]


def test_overflow_of_the_reference_itself_is_no_finding():
    def norm(input):
        return input.square().sum(1).sqrt()

    subject = replace(CUBE, op=norm, reference=norm, gradients=())
    assert battery.scaled(subject, replace(CASE, scale=1e25)) == []


def test_an_argument_that_is_written_is_told():
    def op(input, weight):
        input[0] = 0
        return input @ weight

    (found,) = battery.values(wrong(op, gradients=()), CASE)
    assert (found.kind, found.argument) == ("mutation", "input")


def test_a_gradient_that_depends_on_what_is_wanted_is_told():
    def op(input, weight):
        return input @ (weight if input.requires_grad else 2 * weight)

    found = battery.each_gradient_alone(wrong(op), CASE)
    assert kinds(found) == ["gradients", "gradients"]
    assert "gradient of weight alone" in found[0].message


def test_other_bits_are_told():
    calls = []

    def op(input, weight):
        calls.append(None)
        return input @ weight + len(calls) % 2

    assert kinds(battery.repeatability(wrong(op, gradients=()), CASE)) == ["repeatability"]


def test_another_number_of_results_is_told():
    calls = []

    def op(input, weight):
        calls.append(None)
        return (input @ weight,) * len(calls)

    (found,) = battery.repeatability(wrong(op, gradients=()), CASE)
    assert (found.kind, found.argument) == ("repeatability", "output 1")


def test_a_stale_cache_is_told():
    kept = {}

    def op(input, weight):
        return input @ kept.setdefault(weight.shape, weight.clone())

    (found,) = battery.history(wrong(op, gradients=()), battery.history_of(PRODUCT, CASE))
    assert found.kind == "history"
    assert "the same call with other numbers came before" in found.message


def test_what_another_dtype_leaves_behind_is_told():
    seen = []

    def op(input, weight):
        seen.append(input.dtype)
        return input @ weight + float(torch.float16 in seen)

    found = battery.history(wrong(op, gradients=()), battery.history_of(PRODUCT, CASE))
    assert kinds(found) == ["history"]
    assert "float16" in found[0].message


def test_what_raises_is_told_with_its_line():
    def op(input, weight):
        assert input.shape[0] % 16 == 0, "rows"
        return input @ weight

    (found,) = battery.values(wrong(op), CASE)
    assert found.kind == "error"
    assert "rows" in found.message
    assert found.file == __file__
    assert found.source.startswith("assert input.shape[0]")


def test_what_the_reference_refuses_says_nothing():
    def refusing(input, weight):
        raise ValueError("not these")

    for op in (product, refusing):
        with pytest.raises(cases.Refused):
            battery.values(wrong(op, reference=refusing), CASE)


def test_a_layout_may_be_declined_but_not_misread():
    def declining(input, weight):
        if not input.is_contiguous():
            raise ValueError("contiguous rows only")
        return input @ weight

    def misreading(input, weight):
        return input.as_strided(input.shape, (5, 1)) @ weight

    (case,) = [
        one
        for one in trials.with_each_layout(PRODUCT, CASE, "transposed")
        if one.layout == ("input", "transposed")
    ]
    assert battery.values(PRODUCT, case) == []
    with pytest.raises(cases.Refused, match="declines input transposed"):
        battery.values(wrong(declining), case)
    assert kinds(battery.values(wrong(misreading, gradients=()), case)) == ["values"]


def test_a_gradient_of_stride_zero_must_be_taken():
    class Dense(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.as_strided(grad.shape, (grad.shape[1], 1))

    subject = replace(CUBE, op=Dense.apply, reference=torch.clone, accuracy="exact")
    assert battery.values(subject, CASE) == []
    assert kinds(battery.values(subject, replace(CASE, grad_layout="ones"))) == ["error"]


def test_corners_are_one_at_a_time():
    assert trials.corners((6, 5)) == [(5, 4), (0, 0)]
    assert trials.corners((6, 5), [4]) == [(5, 4), (0, 0), (4, 4), (3, 3)]
    assert trials.corners((0, 5)) == []
    tensor = trials.with_special(torch.zeros(6, 5), 1.0, (5, 4))
    assert tensor.nonzero().tolist() == [[5, 4]]


def test_a_case_is_the_same_every_time():
    again = Case("typical", torch.float32)
    assert again == CASE
    assert replace(CASE, seed=1) != CASE
    first, second = CASE.arguments(PRODUCT), again.arguments(PRODUCT)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = replace(CASE, seed=1).arguments(PRODUCT)
    assert not torch.equal(first["input"], other["input"])


def test_empty_results_are_compared():
    assert battery.values(PRODUCT, replace(CASE, sample="empty")) == []
    subject = wrong(lambda input, weight: input.sum(0) + weight.sum(), gradients=())
    assert kinds(battery.values(subject, replace(CASE, sample="empty"))) == ["shape"]
