"""Generated from the specs: one function per property, never per op."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import backend, launch
from tritorch.registry import Maker, specs
from tritorch.testing import cases, interpreter

pytestmark = pytest.mark.interpret

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


def samples(select=lambda spec, sample: True, dtypes=tuple(NAMES), where=lambda spec: True):
    """Parameters (spec, dtype, sample name) of every selected sample, made without memory."""
    return [
        pytest.param(spec, dtype, sample.name, id=f"{spec.name}-{NAMES[dtype]}-{sample.name}")
        for spec in specs()
        if where(spec)
        for dtype in spec.dtypes
        if dtype in dtypes
        for sample in spec.samples(Maker(dtype, "meta"))
        if select(spec, sample)
    ]


def by_op(where=lambda spec: True):
    """One parameter per op."""
    return [pytest.param(spec, id=spec.name) for spec in specs() if where(spec)]


def seed(spec, name):
    return f"{spec.name}/{name}"


def arguments(spec, dtype, name, device, **options):
    make = Maker(dtype, device, seed(spec, name), **options)
    return dict(cases.sample_of(spec, name, make).arguments)


def gradient(spec, name, layout=None):
    return cases.random_gradient(seed(spec, name) + "/gradient", layout)


def differentiable(spec):
    return bool(spec.gradients)


def layouts_sample(spec):
    """The first sample that is repeated with every layout: small, with every argument."""
    return next(s.name for s in spec.samples(Maker(torch.float32, "meta")) if s.layouts)


def check(found):
    failures = [f"{what}: {verdict.failure}" for what, verdict in found if not verdict.accepted]
    assert not failures, "\n".join(failures)


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


@pytest.mark.parametrize(("spec", "dtype", "name"), samples())
def test_values_and_gradients_match_float64(spec, dtype, name, device):
    given = arguments(spec, dtype, name, device)
    check(cases.verdicts(spec, given, gradient(spec, name)))


@pytest.mark.parametrize(
    ("spec", "dtype", "name"), samples(where=lambda spec: spec.accuracy == "multilinear")
)
def test_integers_are_exact(spec, dtype, name, device):
    """Every product and sum is exact, so that one wrong index is a wrong number."""
    given = arguments(spec, dtype, name, device, integers=True)
    make_grad = cases.integer_gradient(seed(spec, name) + "/gradient")
    actual = cases.run(spec.op, spec, given, grad_outputs=make_grad)
    truth = cases.run(
        spec.reference,
        spec,
        given,
        grad_outputs=lambda like: make_grad(like.to(dtype)).double(),
        dtype=torch.float64,
    )
    for (what, value), (_, true) in zip(actual.named(), truth.named(), strict=True):
        assert torch.equal(value, true.to(value.dtype)), what


@pytest.mark.parametrize("spec", by_op(lambda spec: spec.autocast == "lower"))
def test_tf32_is_used_where_torch_allows_it(spec, device):
    """Right within TF32's rounding, and not within float32's: it was asked for and happened."""
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    for flags in PRODUCTS:
        flags.fp32_precision = "tf32"
    rounds = interpreter.corrected(tf32=True) if device == "cpu" else contextlib.nullcontext()
    with rounds:
        actual = cases.run(spec.op, spec, given, grad_outputs=gradient(spec, name))
    check(cases.judge(spec, given, actual, gradient(spec, name), unit_in=2**-11))
    ieee = dict(cases.judge(spec, given, actual, gradient(spec, name)))
    assert not ieee["output 0"].accepted


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.layouts, dtypes=(torch.float32, torch.bfloat16)),
)
def test_any_input_layout(spec, dtype, name, layout, device):
    given = arguments(spec, dtype, name, device)
    for argument, value in given.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        # an expanded tensor cannot be written to
        if layout == "expanded" and argument in spec.mutates:
            continue
        found = cases.verdicts(
            spec, given | {argument: cases.relayout(value, layout)}, gradient(spec, name)
        )
        check([(f"{argument} {layout}, {what}", verdict) for what, verdict in found])


@pytest.mark.parametrize("layout", cases.GRAD_LAYOUTS)
@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(
        lambda spec, sample: sample.layouts,
        dtypes=(torch.float32, torch.bfloat16),
        where=differentiable,
    ),
)
def test_any_grad_output_layout(spec, dtype, name, layout, device):
    """`.sum().backward()` sends a stride-0 tensor; gradcheck only ever sends contiguous ones."""
    given = arguments(spec, dtype, name, device)
    check(cases.verdicts(spec, given, gradient(spec, name, layout)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("spec", by_op(lambda spec: spec.non_finite))
def test_special_values(spec, value, device):
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    for argument in spec.non_finite:
        tensor = given[argument].clone()
        flat = tensor.view(-1)
        flat[:: max(flat.numel() // 3, 1)] = value
        found = cases.verdicts(spec, given | {argument: tensor}, gradient(spec, name))
        check([(f"{value} in {argument}, {what}", verdict) for what, verdict in found])


@pytest.mark.parametrize("spec", by_op(differentiable))
def test_each_gradient_alone(spec, device):
    """A gradient that is not wanted changes nothing and costs no launch."""
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    make_grad = gradient(spec, name)
    with launch.recorded() as all_launches:
        everything = cases.run(spec.op, spec, given, grad_outputs=make_grad)
    counts = []
    assert set(everything.grads) == {
        n for n in spec.gradients if isinstance(given[n], Tensor) and given[n].is_floating_point()
    }
    for wanted in everything.grads:
        with launch.recorded() as launches:
            alone = cases.run(spec.op, spec, given, grad_outputs=make_grad, wanted=[wanted])
        assert list(alone.grads) == [wanted]
        assert torch.equal(alone.grads[wanted], everything.grads[wanted])
        counts.append(len(launches))
    if len(everything.grads) > 1:
        # one gradient may be made of the very sums that are the others, and then it costs them all
        assert min(counts) < len(all_launches) >= max(counts), counts
    with launch.recorded() as launches:
        nothing = cases.run(spec.op, spec, given, grad_outputs=make_grad, wanted=[])
    assert not nothing.grads
    assert launches == all_launches[: len(launches)]
    for value, before in zip(nothing.outputs, everything.outputs, strict=True):
        assert torch.equal(value, before)


@pytest.mark.parametrize("spec", by_op())
def test_repeats_bitwise(spec, device):
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    first, second = (
        cases.run(spec.op, spec, given, grad_outputs=gradient(spec, name)) for _ in range(2)
    )
    for (what, value), (_, again) in zip(first.named(), second.named(), strict=True):
        assert torch.equal(value, again), what


@pytest.mark.parametrize("spec", by_op())
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_layout_of_results(spec, channels_last, device):
    """Outputs and gradients have torch's strides for a dense input of either memory format."""
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    if channels_last:
        given = {
            k: cases.relayout(v, "channels_last") if isinstance(v, Tensor) else v
            for k, v in given.items()
        }
    actual, expected = (
        cases.run(function, spec, given, grad_outputs=gradient(spec, name))
        for function in (spec.op, spec.reference)
    )
    for (what, value), (_, other) in zip(actual.named(), expected.named(), strict=True):
        # an expanded gradient costs no memory; torch may or may not write it out
        if 0 in value.stride():
            continue
        strides = [s for s, n in zip(value.stride(), value.shape, strict=True) if n > 1]
        wanted = [s for s, n in zip(other.stride(), other.shape, strict=True) if n > 1]
        assert strides == wanted, what


def gradchecked(spec, name, device):
    given = arguments(spec, torch.float64, name, device)
    # a target may be class indices
    names = [n for n in spec.gradients if (t := given.get(n)) is not None and t.is_floating_point()]
    inputs = [given[n].clone().requires_grad_() for n in names]

    def call(*tensors):
        fresh = {n: cases.map_tensors(v, torch.clone) for n, v in given.items() if n not in names}
        result = spec.op(**fresh, **dict(zip(names, tensors, strict=True)))
        outputs = result if isinstance(result, tuple) else (result,)
        return tuple(output for output in outputs if output.is_floating_point())

    return call, inputs


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.gradcheck, dtypes=(torch.float64,), where=differentiable),
)
def test_gradcheck(spec, dtype, name, device):
    call, inputs = gradchecked(spec, name, device)
    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize(
    ("spec", "dtype", "name"),
    samples(lambda spec, sample: sample.gradcheck, dtypes=(torch.float64,), where=differentiable),
)
def test_gradgradcheck(spec, dtype, name, device):
    call, inputs = gradchecked(spec, name, device)
    if spec.double_backward:
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)
        return
    outputs = [output for output in call(*inputs) if output.requires_grad]
    grads = torch.autograd.grad(
        outputs, inputs, [torch.randn_like(o) for o in outputs], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(sum(g.sum() for g in grads if g is not None), inputs)


class Recorded(TorchDispatchMode):
    """Collects the calls of tritorch's library ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "tritorch":
            # the ops know nothing of autograd: the Function around them does
            detached = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.calls.append((function, *detached))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spec", by_op())
def test_library_ops_pass_opcheck(spec, device):
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    with Recorded() as recorded:
        cases.run(spec.op, spec, given, grad_outputs=gradient(spec, name))
    assert recorded.calls
    for function, args, kwargs in {call[0]: call for call in recorded.calls}.values():
        torch.library.opcheck(function, args, kwargs)


@pytest.mark.parametrize("spec", by_op())
def test_compiles_in_one_graph(spec, device):
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    make_grad = gradient(spec, name)
    torch.compiler.reset()
    compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager")
    actual = cases.run(compiled, spec, given, grad_outputs=make_grad)
    expected = cases.run(spec.op, spec, given, grad_outputs=make_grad)
    for (what, value), (_, eager) in zip(actual.named(), expected.named(), strict=True):
        assert torch.equal(value, eager), what


@pytest.mark.parametrize("spec", by_op(lambda spec: spec.gradients))
def test_autocast_has_torchs_dtypes(spec, device):
    name = layouts_sample(spec)
    given = arguments(spec, torch.float32, name, device)
    make_grad = gradient(spec, name)

    def autocast(function):
        def call(**arguments):
            with torch.autocast(device, dtype=torch.bfloat16):
                return function(**arguments)

        return call

    if spec.name == "binary_cross_entropy" and device == "cuda":
        # half precision cannot hold its logarithms, and torch says so
        for function in (spec.op, spec.reference):
            with pytest.raises(RuntimeError, match="with_logits"):
                cases.run(autocast(function), spec, given, wanted=[])
        return
    actual = cases.run(autocast(spec.op), spec, given, grad_outputs=make_grad)
    expected = cases.run(autocast(spec.reference), spec, given, grad_outputs=make_grad)
    for (what, value), (_, other) in zip(actual.named(), expected.named(), strict=True):
        assert value.dtype == other.dtype, what
    if spec.autocast == "lower":
        rounded = {
            n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in given.items()
        }
    else:
        rounded = given
    plain = cases.run(spec.op, spec, rounded, grad_outputs=make_grad)
    for (what, value), (_, other) in zip(actual.named(), plain.named(), strict=True):
        assert torch.equal(value, other.to(value.dtype)), what


def rejects():
    return [
        pytest.param(spec, reject.name, id=f"{spec.name}-{reject.name}")
        for spec in specs()
        for reject in spec.rejects(Maker(torch.float32, "meta"))
    ]


@pytest.mark.reference
@pytest.mark.parametrize(("spec", "name"), rejects())
def test_rejects_bad_calls(spec, name, device):
    """The exception class is torch's on the same call; the message names op, rule and what was
    received.
    """
    make = Maker(torch.float32, device, seed(spec, name))
    reject = next(r for r in spec.rejects(make) if r.name == name)
    expected = reject.raises
    if expected is None:
        with pytest.raises(Exception) as torchs:  # noqa: PT011  the class is what is asked for
            spec.reference(**reject.arguments)
        expected = torchs.type
    with pytest.raises(expected, match=reject.message) as ours:
        spec.op(**reject.arguments)
    assert ours.type is expected
