"""Activations that products and convolutions apply to their result before they store it."""

from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tritorch import launch, ops
from tritorch.ops.activation import REFERENCES
from tritorch.ops.activation_function import needs_output
from tritorch.registry import specs

pytestmark = pytest.mark.interpret

# op, shapes of input and weight, arguments: every kernel that stores, and both ways to it
CALLS = {
    "linear": ("linear", (3, 4), (5, 4), {}),
    "linear-splits": ("linear", (2, 4100), (3, 4100), {}),
    "conv1d": ("conv1d", (2, 3, 5), (4, 3, 2), {"stride": 2}),
    "conv2d": ("conv2d", (2, 3, 4, 3), (4, 3, 2, 3), {"padding": 1}),
    "conv2d-splits": ("conv2d", (1, 256, 2, 1), (4, 256, 1, 1), {}),
    "depthwise": ("conv2d", (2, 3, 4, 3), (3, 1, 2, 3), {"padding": 1, "groups": 3}),
    "conv3d": ("conv3d", (1, 3, 2, 3, 2), (4, 3, 2, 1, 2), {}),
}
# of these every activation is tried, of the others one that keeps its output and one that does not
EVERY = ("linear", "conv2d")


def made(name, device, dtype=torch.float64):
    op, input, weight, given = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in (input, weight, weight[:1])
    ]
    # sums of any length spread over the bends of the activations
    tensors[1] *= 2 / weight[1] ** 0.5
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    return getattr(ops, op), getattr(F, op), leaves, given


def test_every_op_with_an_activation_is_here_or_among_the_norms():
    takes = {spec.name for spec in specs() if "activation" in signature(spec.op).parameters}
    assert takes == {op for op, *_ in CALLS.values()} | {"batch_norm", "conv2d_batch_norm"}


@pytest.mark.parametrize(
    ("name", "activation"),
    [(name, one) for name in CALLS for one in (REFERENCES if name in EVERY else ("tanh", "gelu"))],
)
def test_value_and_both_gradients(name, activation, device):
    """Against plain PyTorch in float64."""
    ours, theirs, leaves, given = made(name, device)
    # torch's hardsigmoid divides by 6 in float32 and has no second gradient; on a GPU hardswish
    # multiplies by the float32 next to 1/6
    shortened = ("hardsigmoid", "hardswish") if device == "cuda" else ("hardsigmoid",)
    rtol = 1e-6 if activation in shortened else 1e-10
    results, grad = [], None
    for call in (
        lambda *leaves: ours(*leaves, **given, activation=activation),
        lambda *leaves: REFERENCES[activation](theirs(*leaves, **given)),
    ):
        y = call(*leaves)
        grad = torch.randn_like(y).requires_grad_() if grad is None else grad
        # of a long sum the first gradient says enough: the second is made of the same calls
        twice = activation != "hardsigmoid" and "splits" not in name
        grads = torch.autograd.grad(y, leaves, grad, create_graph=twice)
        found = [y, *grads]
        if twice:
            total = sum(one.square().sum() for one in grads)
            found += torch.autograd.grad(total, [*leaves, grad], materialize_grads=True)
        results.append([one.detach() for one in found])
    assert_close(*results, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", [name for name in CALLS if "splits" in name])
def test_long_sums_are_split(name, device):
    ours, _, leaves, given = made(name, device)
    with torch.no_grad(), launch.recorded() as launches:
        ours(*leaves, **given, activation="gelu")
    assert launches[-1] == "split_sum_kernel"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d-splits", "depthwise"])
def test_the_result_is_rounded_once(name, dtype, device):
    """What the activation is applied to has not been rounded to 16 bits before."""
    ours, theirs, leaves, given = made(name, device, dtype)
    y = ours(*leaves, **given, activation="silu")
    exact = F.silu(theirs(*(leaf.double() for leaf in leaves), **given))
    # half a unit in the last place, and what float32 sums are off by
    unit = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    assert ((y.double() - exact).abs() <= 0.51 * unit + 1e-6).all()


@pytest.mark.parametrize("activation", [None, *REFERENCES])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_autograd_keeps_one_tensor_for_an_activation(name, activation, device):
    """The output, or where that does not tell the derivative what went in: as torch, and no more.

    What went in is told from the parameters again where a second gradient is asked for.
    """
    ours, _, leaves, given = made(name, device)
    saved = []

    def keep(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ours(*leaves, **given, activation=activation)
    own = {leaf.data_ptr() for leaf in leaves}
    others = [pointer for pointer in saved if pointer not in own]
    if activation is None:
        assert not others
    else:
        assert len(others) == 1
        assert (others[0] == y.data_ptr()) == needs_output(activation)


@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise"])
def test_nothing_is_kept_where_no_gradient_is_needed(name, device):
    ours, _, leaves, given = made(name, device)
    written, run = [], launch.Prepared.__call__

    def watched(self, *tensors, **floats):
        written.append(self.constants["KEEPS_PREACTIVATION"])
        run(self, *tensors, **floats)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch.Prepared, "__call__", watched)
        ours(*leaves, **given, activation="gelu")
    assert written == [False]


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "depthwise", "conv3d"])
def test_frozen_parameters_and_a_frozen_input(name, device):
    """What a second gradient needs is kept though its own gradient is not asked for."""
    for wanted in ((0,), (1,), (2,)):
        ours, theirs, leaves, given = made(name, device)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i in wanted)
        one = [leaves[i] for i in wanted]
        results = []
        for y in (
            ours(*leaves, **given, activation="silu"),
            F.silu(theirs(*leaves, **given)),
        ):
            (first,) = torch.autograd.grad(y.square().sum(), one, create_graph=True)
            results.append([first, *torch.autograd.grad(first.square().sum(), one)])
        assert_close(*results, rtol=1e-10, atol=1e-10)
