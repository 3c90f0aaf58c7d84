"""Generated from the specs: one property a test, each a call of the battery, never one per op."""

from dataclasses import replace

import pytest
import torch

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import backend
from tritorch.registry import Maker, specs
from tritorch.testing import battery, battery_gradients, battery_torch, cases, trials
from tritorch.testing.trials import Case

pytestmark = pytest.mark.interpret

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


def samples(select=lambda spec, sample: True, dtypes=tuple(NAMES), where=lambda spec: True):
    """Parameters (spec, dtype, sample name) of every selected sample, made without memory."""
    return [
        pytest.param(spec, dtype, sample.name, id=f"{spec.name}-{NAMES[dtype]}-{sample.name}")
        for spec in specs()
        if where(spec)
        for dtype in spec.dtypes
        if dtype in dtypes
        for sample in trials.samples_of(spec, dtype)
        if select(spec, sample)
    ]


def by_op(where=lambda spec: True):
    """One parameter per op."""
    return [pytest.param(spec, id=spec.name) for spec in specs() if where(spec)]


def differentiable(spec):
    return bool(spec.gradients)


def typical_name(spec):
    """The first sample that is repeated with every layout: small, with every argument."""
    return next(s.name for s in trials.samples_of(spec, torch.float32) if s.layouts)


def typical(spec, device, **options):
    return Case(typical_name(spec), torch.float32, device, **options)


def is_typical(spec, sample):
    return sample.name == typical_name(spec)


def check(findings):
    assert not findings, "\n".join(f"{f.kind} [{f.case}] {f.message}" for f in findings)


@pytest.fixture(autouse=True)
def kernels_only():
    """A fallback to the reference path would compare the reference with itself: it is an error
    here.
    """
    backend.reset()
    yield
    unexpected = {
        op: reasons
        for op, reasons in backend.explain().items()
        if any(spec.name == op for spec in specs())
    }
    assert not unexpected, f"calls left the kernels: {unexpected}"


# bfloat16 runs float16's configurations, and float64 takes float32's ways through the code: what is
# their own shows on the samples that are marked
EVERYWHERE = (torch.float32, torch.float16)
MARKED = (torch.bfloat16, torch.float64)


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(dtypes=EVERYWHERE)
    + samples(lambda spec, sample: sample.layouts or sample.gradcheck, dtypes=MARKED),
)
def test_values_and_gradients_match_float64(spec, dtype, name, device):
    check(battery.values(spec, Case(name, dtype, device)))


@pytest.mark.parametrize(
    ("spec", "dtype", "name"), samples(where=lambda spec: spec.accuracy == "multilinear")
)
def test_integers_are_exact(spec, dtype, name, device):
    """Every product and sum is exact, so that one wrong index is a wrong number."""
    check(battery.exactness(spec, Case(name, dtype, device), fractions=True))


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        pytest.param(spec, scale, id=f"{spec.name}-{scale:g}")
        for spec in specs()
        for scale in (1e-3, 1e3)
        # a probability cannot be any size
        if not trials.refused(spec, typical(spec, "cpu", scale=scale))
    ],
)
def test_any_scale(spec, scale, device):
    check(battery.scaled(spec, typical(spec, device, scale=scale)))


@pytest.mark.parametrize("spec", by_op(lambda spec: spec.autocast == "lower"))
def test_tf32_is_used_where_torch_allows_it(spec, device):
    """Right within TF32's rounding, and not within float32's: it was asked for and happened."""
    check(battery_torch.tf32_is_used(spec, typical(spec, device)))


@pytest.mark.parametrize("spec", by_op(lambda spec: spec.autocast == "lower"))
def test_tf32_is_not_used_elsewhere(spec, device):
    check(battery_torch.tf32_is_not_used(spec, typical(spec, device)))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.layouts, dtypes=(torch.float32,))
    + samples(is_typical, dtypes=(torch.bfloat16,)),
)
def test_any_input_layout(spec, dtype, name, layout, device):
    case = Case(name, dtype, device)
    laid_out = trials.with_each_layout(spec, case, layout)
    check([finding for one in laid_out for finding in battery.values(spec, one)])


@pytest.mark.parametrize("layout", cases.GRAD_LAYOUTS)
@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.layouts, dtypes=(torch.float32,), where=differentiable)
    + samples(is_typical, dtypes=(torch.bfloat16,), where=differentiable),
)
def test_any_grad_output_layout(spec, dtype, name, layout, device):
    """`.sum().backward()` sends a stride-0 tensor; gradcheck only ever sends contiguous ones."""
    check(battery.values(spec, Case(name, dtype, device, grad_layout=layout)))


@pytest.mark.parametrize("value", battery.SPECIAL)
@pytest.mark.parametrize("spec", by_op(lambda spec: spec.non_finite))
def test_special_values(spec, value, device):
    """In a few places at once, and in each corner alone."""
    case = typical(spec, device)
    found = []
    for argument in spec.non_finite:
        one = typical(spec, device, special=(argument, value))
        shape = case.arguments(spec)[argument].shape
        for at in (None, *trials.corners(shape)):
            found += battery.special_values(spec, replace(one, special_at=at), strict=True)
    check(found)


@pytest.mark.parametrize("spec", by_op(differentiable))
def test_each_gradient_alone(spec, device):
    """A gradient that is not wanted changes nothing and costs no launch."""
    check(battery.each_gradient_alone(spec, typical(spec, device), launches=True))


@pytest.mark.parametrize("spec", by_op(differentiable))
def test_views(spec, device):
    """Gradients reach the tensor that an argument is a view of."""
    check(battery_gradients.views(spec, typical(spec, device)))


@pytest.mark.parametrize("spec", by_op())
def test_repeats_bitwise(spec, device):
    check(battery.repeatability(spec, typical(spec, device)))


@pytest.mark.parametrize("spec", by_op())
def test_no_call_depends_on_others(spec, device):
    """Other numbers, memory, dtypes and shapes come between two calls that are the same."""
    others = [sample.name for sample in trials.samples_of(spec, torch.float32)][:3]
    check(battery.history(spec, battery.history_of(spec, typical(spec, device), others)))


@pytest.mark.parametrize("spec", by_op())
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_layout_of_results(spec, channels_last, device):
    """Outputs and gradients have torch's strides for a dense input of either memory format."""
    case = typical(spec, device)
    check(battery_torch.layout_of_results(spec, case, channels_last=channels_last))


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.gradcheck, dtypes=(torch.float64,), where=differentiable),
)
def test_gradcheck(spec, dtype, name, device):
    check(battery_gradients.gradcheck(spec, Case(name, dtype, device)))


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.gradcheck, dtypes=(torch.float64,), where=differentiable),
)
def test_gradgradcheck(spec, dtype, name, device):
    case = Case(name, dtype, device)
    if spec.double_backward:
        check(battery_gradients.second_gradient(spec, case))
    else:
        check(battery_gradients.once_differentiable(spec, case))


@pytest.mark.parametrize("spec", by_op())
def test_library_ops_pass_opcheck(spec, device):
    check(battery_torch.library(spec, typical(spec, device), required=True))


@pytest.mark.parametrize("spec", by_op())
def test_compiles_in_one_graph(spec, device):
    check(battery_torch.compiles(spec, typical(spec, device)))


@pytest.mark.parametrize("spec", by_op(lambda spec: spec.gradients))
def test_autocast_has_torchs_dtypes(spec, device):
    if spec.name == "binary_cross_entropy" and device == "cuda":
        # half precision cannot hold its logarithms, and torch says so
        arguments = typical(spec, device).arguments(spec)
        for function in (spec.op, spec.reference):
            half = torch.autocast(device, dtype=torch.bfloat16)
            with half, pytest.raises(RuntimeError, match="with_logits"):
                function(**arguments)
        return
    check(battery_torch.autocast(spec, typical(spec, device)))


def rejects():
    return [
        pytest.param(spec, reject.name, id=f"{spec.name}-{reject.name}")
        for spec in specs()
        for reject in spec.rejects(Maker(torch.float32, "meta"))
    ]


@pytest.mark.reference
@pytest.mark.parametrize(("spec", "name"), rejects())
def test_rejects_bad_calls(spec, name, device):
    """The exception class is torch's on the same call on the CPU; the message names op, rule and
    what was received.
    """

    def rejected(device):
        make = Maker(torch.float32, device, f"{spec.name}/{name}")
        return next(r for r in spec.rejects(make) if r.name == name)

    reject = rejected(device)
    expected = reject.raises
    if expected is None:
        with pytest.raises(Exception) as torchs:  # noqa: PT011  the class is what is asked for
            spec.reference(**rejected("cpu").arguments)
        expected = torchs.type
    with pytest.raises(expected, match=reject.message) as ours:
        spec.op(**reject.arguments)
    assert ours.type is expected
