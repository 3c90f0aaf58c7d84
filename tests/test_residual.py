"""Residuals that products and convolutions add to their result before the activation."""

import pytest
import torch
from torch.testing import assert_close

import tritorch.nn
from tests.test_epilogues import made
from tritorch import launch, ops
from tritorch.ops.activation import REFERENCES
from tritorch.ops.activation_function import needs_output

pytestmark = pytest.mark.interpret

# every kernel that stores, with the sum in one piece or split
NAMES = ("linear", "linear-splits", "conv2d", "conv2d-splits", "depthwise")

# of a tensor in the result's order one of the same values in another
ORDERS = {
    "as-the-result": lambda residual: residual.clone(),
    "reversed": lambda residual: (
        residual.permute(*range(residual.dim())[::-1])
        .contiguous()
        .permute(*range(residual.dim())[::-1])
    ),
    "gaps": lambda residual: torch.stack((residual, residual), -1)[..., 0],
    "rows-with-gaps": lambda residual: torch.cat((residual, residual), -1)[
        ..., : residual.shape[-1]
    ],
    "expanded": lambda residual: residual[:1, :1].clone().expand_as(residual),
}


def plain(theirs, activation, given):
    def run(input, weight, bias, residual):
        y = theirs(input, weight, bias, **given) + residual
        return y if activation is None else REFERENCES[activation](y)

    return run


def with_residual(name, device, dtype=torch.float64, order="as-the-result"):
    """Our op and torch's, the operands and a residual, and what else the call takes."""
    ours, theirs, leaves, given = made(name, device, dtype)
    y = theirs(*leaves, **given)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    residual = ORDERS[order](values.contiguous())
    return ours, theirs, [*leaves, residual.detach().requires_grad_()], given


def derivatives(call, leaves, twice):
    """The value, its gradients and theirs."""
    y = call(*leaves)
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grad = grad.to(y.device, y.dtype).requires_grad_()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(y, wanted, grad, create_graph=twice)
    found = [y, *grads]
    if twice:
        total = sum(one.square().sum() for one in grads)
        found += torch.autograd.grad(total, [*wanted, grad], materialize_grads=True)
    return [one.detach() for one in found]


def assert_as_in_torch(name, device, activation, order="as-the-result", wanted=range(4)):
    ours, theirs, leaves, given = with_residual(name, device, order=order)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    *operands, residual = leaves

    def call(input, weight, bias, residual):
        return ours(input, weight, bias, **given, activation=activation, residual=residual)

    results = [
        derivatives(one, [*operands, residual], "splits" not in name)
        for one in (call, plain(theirs, activation, given))
    ]
    assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_both_gradients(name, activation, device):
    """Of the output and of what went into the activation, in float64."""
    assert_as_in_torch(name, device, activation)


@pytest.mark.parametrize("order", list(ORDERS)[1:])
@pytest.mark.parametrize("name", NAMES)
def test_a_residual_of_any_strides(name, order, device):
    assert_as_in_torch(name, device, "silu", order)


@pytest.mark.parametrize("order", ORDERS)
def test_each_group_has_its_channels_of_it(order, device):
    generator = torch.Generator().manual_seed(0)
    x, w, values = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((2, 6, 4, 3), (4, 3, 2, 2), (2, 4, 3, 2))
    )
    residual = ORDERS[order](values)
    y = ops.conv2d(x, w, groups=2, residual=residual)
    assert_close(y, torch.nn.functional.conv2d(x, w, groups=2) + residual, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
@pytest.mark.parametrize("wanted", [(3,), (0, 3), (2,)], ids=str)
def test_some_gradients_alone(name, activation, wanted, device):
    """Among them that of the residual, for which nothing is multiplied."""
    assert_as_in_torch(name, device, activation, wanted=wanted)


@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
def test_second_gradients_are_checked_numerically(name, device):
    ours, _, leaves, given = with_residual(name, device)

    def call(*leaves):
        *operands, residual = (leaf * one for leaf, one in zip(leaves, fixed, strict=True))
        y = ours(*operands, **given, activation="silu", residual=residual)
        return (
            y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=device).view(y.shape)
        ).sum()

    # few numbers that are moved, and one result
    fixed = [leaf.detach() for leaf in leaves]
    moved = [torch.ones((), dtype=torch.float64, device=device, requires_grad=True) for _ in fixed]
    assert torch.autograd.gradgradcheck(call, moved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_rounded_once(name, dtype, device):
    """The residual is added to a sum that nothing has rounded, and so is what follows."""
    ours, theirs, leaves, given = with_residual(name, device, dtype)
    y = ours(*leaves[:3], **given, residual=leaves[3])
    exact = plain(theirs, None, given)(*(leaf.double() for leaf in leaves))
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    # half a unit in the last place, and what float32 sums are off by
    assert ((y.double() - exact).abs() <= 0.51 * unit + 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("activation", [None, *REFERENCES])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_autograd_keeps_one_tensor_and_the_residual_for_second_gradients(name, activation, device):
    """The residual only beside what went into an activation, which is told from it again."""
    ours, _, leaves, given = with_residual(name, device)
    saved = []

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours(*leaves[:3], **given, activation=activation, residual=leaves[3])
    own = {leaf.data_ptr() for leaf in leaves[:3]}
    others = [pointer for pointer in saved if pointer not in own]
    if activation is None:
        assert not others
    elif needs_output(activation):
        assert others == [y.data_ptr()]
    else:
        assert len(others) == 2
        assert leaves[3].data_ptr() in others


@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
def test_one_kernel_does_it_all(name, device):
    ours, _, leaves, given = with_residual(name, device, torch.float16)
    with torch.no_grad(), launch.recorded() as names:
        ours(*leaves[:3], **given, activation="relu", residual=leaves[3])
    assert len(names) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if "splits" in name])
def test_of_a_split_sum_it_is_added_last(name, device):
    ours, _, leaves, given = with_residual(name, device)
    with torch.no_grad(), launch.recorded() as names:
        ours(*leaves[:3], **given, activation="gelu", residual=leaves[3])
    assert names[-1] == "split_sum_kernel"


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_autocast_gives_it_the_dtype_of_the_result(layer, residual_dtype, device):
    made = {
        "linear": (tritorch.nn.Linear(4, 3), (2, 4), (2, 3)),
        "conv2d": (tritorch.nn.Conv2d(4, 3, 1), (2, 4, 2, 2), (2, 3, 2, 2)),
    }
    module, shape, result = made[layer]
    module.to(device)
    x, residual = torch.randn(shape, device=device), torch.randn(result, device=device)
    residual = residual.to(residual_dtype)
    found = []
    with torch.autocast(device, torch.float16):
        for choice in ("auto", "reference"):
            with tritorch.backend.use(choice):
                found.append(module(x, "relu", residual))
    assert found[0].dtype == torch.float16
    assert_close(*found, rtol=2e-3, atol=2e-3)


def test_layers_pass_it_on(device):
    x, residual = torch.randn(2, 4, 3, 3, device=device), torch.randn(2, 5, 3, 3, device=device)
    layer = tritorch.nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular").to(device)
    with tritorch.backend.use("reference"):
        expected = (layer(x) + residual).relu(), layer(x) + residual
    assert_close(layer(x, "relu", residual), expected[0])
    assert_close(layer(x, residual=residual), expected[1])
    line = tritorch.nn.Linear(3, 3).to(device)
    expected = line(x) + x
    assert_close(line(x, residual=x), expected)


def test_images_in_another_order_are_copied_with_it(device):
    """Enough products of 16-bit numbers for copies in channels_last: of three tensors."""
    x = torch.randn(2, 32, 3, 5, device=device).half()
    w = (torch.randn(24, 32, 3, 3, device=device) / 17).half()
    residual = torch.randn(2, 24, 3, 5, device=device).half()
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1) + residual.double()
    # what is in that order already is no copy
    for order, copies in ((torch.contiguous_format, 3), (torch.channels_last, 1)):
        one = x.contiguous(memory_format=order)
        with launch.recorded() as names:
            y = ops.conv2d(one, w, padding=1, residual=residual)
        assert names.count("reorder_kernel") == copies
        assert y.is_contiguous(memory_format=order)
        assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)
