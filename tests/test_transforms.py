"""Every layer under what torch makes of modules: memory kept, programs, transforms."""

import contextlib
import itertools
import math
from typing import ClassVar

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

import tritorch
import tritorch.nn as nn
from tests.layers import ONE_OF_EACH, cases, make_call, make_layer

pytestmark = [pytest.mark.reference, pytest.mark.interpret]

RANDOM = {"Dropout"}


def called(layer, call):
    """The output, or the first of several, of a call that may write into its input."""
    output = layer(call[0] * 1.0, *call[1:])
    return output[0] if isinstance(output, tuple) else output


def grown(case, rows):
    return case._replace(input=(case.input[0] + rows, *case.input[1:]))


@contextlib.contextmanager
def counting(own):
    """Bytes that autograd keeps besides the storages of `own`, by storage."""
    kept = {}
    known = {tensor.untyped_storage()._cdata for tensor in own}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            # held, so that no other can have its address
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def bytes_kept(call, own):
    """Bytes that `call()` keeps for the gradient, besides the storages of `own`."""
    with counting(own) as storages:
        output = call()
    kept = sum(storage.nbytes() for storage in storages.values())
    del output
    return kept


@cases(ONE_OF_EACH)
def test_no_more_is_kept_for_the_gradient_than_by_torch(case, device):
    kept = []
    for module in (nn, torch.nn):
        layer, call = make_layer(module, case, device), make_call(case, device)
        input = call[0] * 1.0
        own = [*layer.parameters(), *layer.buffers(), *call, input]
        kept.append(bytes_kept(lambda of=layer, x=input, rest=call[1:]: of(x, *rest), own))
    ours, torchs = kept
    assert ours <= torchs


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(64, 1), (64, 2), (64, 3), (8, 1000), (2, 2, 8, 8), (2, 9, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_keeps_no_more_than_torch(
    shape, probabilities, reduction, label_smoothing, device
):
    """Where it keeps the logits, which torch does not, these live on in any case or are no more
    than torch's logarithms; long rows have two or three numbers each besides.
    """
    kept = {}
    for module in (nn.functional, torch.nn.functional):
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=device)
        if probabilities:
            target = torch.full(shape, 1 / shape[1], device=device)
        # as a layer makes them: nothing else needs them
        logits = torch.zeros(shape, device=device, requires_grad=True) * 1.0
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        for own in ((logits, target), ()):

            def call(of=module, x=logits, y=target, options=options):
                return of.cross_entropy(x, y, **options)

            kept.setdefault(own == (), []).append(bytes_kept(call, own))
    ours, torchs = kept[False]
    assert ours <= torchs
    ours, torchs = kept[True]
    rows = shape[0] * math.prod(shape[2:])
    assert ours <= torchs + (12 * rows if shape[1] > 8 else 0)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"])
def test_losses_of_a_distance_keep_no_more_than_torch(loss, device):
    """Besides input and target at first, then with them."""
    kept = {}
    for module in (nn.functional, torch.nn.functional):
        for own in (True, False):
            pair = [torch.zeros(4, 64, device=device, requires_grad=True) * 1.0 for _ in range(2)]

            def call(of=module, pair=pair):
                return getattr(of, loss)(*pair)

            kept.setdefault(own, []).append(bytes_kept(call, pair if own else ()))
    ours, torchs = kept[True]
    assert ours <= torchs
    ours, torchs = kept[False]
    # torch keeps the difference, one tensor that nothing else needs, instead of both
    assert ours <= torchs * (2 if loss == "l1_loss" else 1)


def with_parameters():
    """Layers and those of their parameters and input that need a gradient."""
    for case in ONE_OF_EACH:
        names = [name for name, _ in make_layer(nn, case).named_parameters()]
        for count in range(1, 1 + bool(names) * (len(names) + 1)):
            for needed in itertools.combinations([*names, "input"], count):
                yield pytest.param(case, needed, id=f"{case.layer}-{'-'.join(needed)}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("case", "needed"), [*with_parameters()])
def test_no_more_is_kept_than_by_torch_where_parts_are_frozen(case, needed, training, device):
    kept = []
    for module in (nn, torch.nn):
        layer = make_layer(module, case, device).train(training)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(name in needed)
        input = make_call(case, device)[0].detach().requires_grad_("input" in needed) * 1.0
        own = [*layer.parameters(), *layer.buffers()]
        kept.append(bytes_kept(lambda of=layer, x=input: of(x), own))
    ours, torchs = kept
    if case.layer.startswith("BatchNorm") and not training:
        # torch's gradient reads running statistics that a later step of training has moved; ours
        # copies the two
        ours -= 2 * layer.running_mean.nbytes
    assert ours <= torchs


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_a_product_keeps_only_the_factor_that_its_gradient_needs(needed, device):
    kept = []
    for matmul in (tritorch.matmul, torch.matmul):
        factors = [
            torch.randn(shape, device=device).requires_grad_(needs)
            for shape, needs in zip(((2, 3, 4), (2, 4, 5)), needed, strict=True)
        ]
        kept.append(bytes_kept(lambda of=matmul, ab=factors: of(*ab), []))
    ours, torchs = kept
    assert ours == torchs > 0


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_one_program_serves_every_size_of_batch(case, device):
    """At most two are compiled: for the first size, and for any."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    programs = CompileCounterWithBackend("aot_eager")
    layer = make_layer(nn, case, device).eval()
    compiled = torch.compile(layer, fullgraph=True, backend=programs)
    for rows in range(4):
        call = [tensor.detach() for tensor in make_call(grown(case, rows), device)]
        assert_close(called(compiled, call), called(layer, call))
    assert programs.frame_count <= 2


@pytest.mark.parametrize("layer", ["BCELoss", "BCEWithLogitsLoss", "Linear"])
def test_a_vector_of_a_layer_meets_a_size_that_is_open(layer, device):
    """Its own size is a number for torch.compile, and that of the input a symbol."""
    x, target = (torch.rand(4, 3, device=device) for _ in range(2))
    if layer == "Linear":
        made, call = nn.Linear(3, 5), (x,)
        made.bias = torch.nn.Parameter(torch.randn(4, 5))
    else:
        made, call = getattr(nn, layer)(weight=torch.rand(3)), (x, target)
    made.to(device)
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(compiled(*call), made(*call))


class Heard(torch.Tensor):
    """Calls every function that it hears of."""

    functions: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_a_subclass_hears_of_no_more_than_of_torchs_and_may_write_into_its_result(case, device):
    results, heard = [], []
    for module in (torch.nn, nn):
        layer, (x, *others) = make_layer(module, case, device), make_call(case, device)
        input = (x * 1).as_subclass(Heard)
        Heard.functions.clear()
        output = layer(input, *others)
        heard.append(len(Heard.functions))
        output = output[0] if isinstance(output, tuple) else output
        assert type(output) is Heard
        found = output.as_subclass(torch.Tensor).clone()
        results.append([found, *torch.autograd.grad(found.sum(), [x], retain_graph=True)])
        output.mul_(2.0)
        assert_close(output.as_subclass(torch.Tensor), 2.0 * found)
    assert heard[1] <= heard[0]
    assert_close(*results)


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_an_exported_program_takes_any_batch(case, device):
    # torch.export asks all of cuDNN for one answer; of float64 it means nothing, and the fixture
    # that set another restores it
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    layer = make_layer(nn, case, device).eval()

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, *call):
            return called(self.layer, call)

    first = tuple(tensor.detach() for tensor in make_call(case, device))
    batch = torch.export.Dim("batch")
    shapes = {"call": tuple({0: batch} for _ in first)}
    program = torch.export.export(Called(), first, dynamic_shapes=shapes).module()
    other = [tensor.detach() for tensor in make_call(grown(case, 3), device)]
    assert_close(program(*other), called(layer, other))


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_func_grad_and_vmap_are_torchs(case, device):
    results = []
    for module in (nn, torch.nn):
        # a transform forbids the writes of training
        layer = make_layer(module, case, device).eval()
        input, *others = (tensor.detach() for tensor in make_call(case, device))

        def scalar(input, layer=layer, others=others):
            return called(layer, (input, *others)).sin().sum()

        mapped = torch.func.vmap(lambda x, of=layer, others=others: called(of, (x, *others)))
        results.append(
            (torch.func.grad(scalar)(input), mapped(torch.stack([input, 2 * input / 3])))
        )
    assert_close(*results)


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_forward_mode_derivatives_are_torchs(case, device):
    tangents = []
    for module in (nn, torch.nn):
        # a dual number forbids the writes of training
        layer = make_layer(module, case, device).eval()
        input, *others = (tensor.detach() for tensor in make_call(case, device))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(input, input.cos())
            tangents.append(forward_ad.unpack_dual(called(layer, (dual, *others))).tangent)
    assert_close(*tangents)


def test_forward_mode_goes_through_compiled_programs(device):
    input = torch.tensor([-1.0, 2.0], device=device)

    def program(x):
        return torch.func.jvp(nn.functional.silu, (x,), (torch.ones_like(x),))

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    expected = torch.func.jvp(torch.nn.functional.silu, (input,), (torch.ones_like(input),))
    assert_close(compiled(input), expected)


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda scalar: torch.func.vmap(torch.func.grad(scalar)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_go_through_compiled_programs(transform, device):
    """Which are not to differentiate a kernel as if it were a constant."""
    input, weight = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)

    def scalar(x, of=nn):
        return of.functional.silu(of.functional.linear(x, weight)).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(transform(scalar), fullgraph=True, backend="aot_eager")
    expected = transform(lambda x: scalar(x, torch.nn))(input)
    assert_close(compiled(input), expected)


@cases(ONE_OF_EACH)
def test_meta_tensors_have_torchs_shapes(case):
    shapes = []
    for module in (nn, torch.nn):
        layer = make_layer(module, case).to("meta")
        call = [tensor.detach().to("meta") for tensor in make_call(case)]
        output = called(layer, call)
        shapes.append((output.shape, output.dtype, output.stride(), output.device.type))
    assert shapes[0] == shapes[1]


@cases([case for case in ONE_OF_EACH if case.layer not in RANDOM])
def test_checkpoints_compute_the_same_gradient(case, device):
    from torch.utils.checkpoint import checkpoint

    layer = make_layer(nn, case, device).eval()
    gradients = []
    for run in (called, lambda *given: checkpoint(called, *given, use_reentrant=False)):
        call = make_call(case, device)
        run(layer, call).sin().sum().backward()
        gradients.append(call[0].grad)
    assert_close(*gradients, rtol=0, atol=0)
