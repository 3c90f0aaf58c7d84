"""What is no repeat of a call with a gradient, and what of a node is its call's alone."""

import gc
import threading
import warnings
import weakref
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from tests.repeating import ENOUGH, backward, gradient, leaf, often, trained
from tests.repeating import again as again
from tests.repeating import images as images
from tests.repeating import kernels_only as kernels_only
from tests.repeating import repeated as repeated
from tritorch import backend, binding, checks, launch, ops
from tritorch.repeats import composed, nodes, seen

pytestmark = pytest.mark.interpret


class Several(torch.autograd.Function):
    """Copies: one of no gradient, and one whose gradient nobody asks for."""

    @staticmethod
    def forward(ctx, x):
        y, constant, other = x.clone(), x.clone(), x.clone()
        ctx.mark_non_differentiable(constant)
        ctx.set_materialize_grads(False)
        return y, constant, other

    @staticmethod
    def backward(ctx, *grads):
        GRADS.append([one is None for one in grads])
        return grads[0]


GRADS = []


def test_outputs_without_gradients_stay_so(images, again):
    x = leaf(images)
    GRADS.clear()
    for _ in range(ENOUGH):
        y, constant, other = binding.apply(Several, x)
        assert (y.requires_grad, constant.requires_grad, other.requires_grad) == (True, False, True)
        # the backward pass is not repeated
        torch.autograd.grad(y.sum(), x, create_graph=True)
    assert "node" in again
    assert GRADS == [[False, True, True]] * ENOUGH


class Part(torch.autograd.Function):
    """Saves its output, which is a part of what it made."""

    @staticmethod
    def forward(ctx, x):
        y = x.new_empty(2 * x.numel())[: x.numel()]
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_part_that_is_saved_is_the_output(images):
    x = leaf(images.flatten())
    for _ in range(ENOUGH):
        y = binding.apply(Part, x)
        (saved,) = y.grad_fn.saved_tensors
        assert saved.grad_fn is y.grad_fn


class Keeps(torch.autograd.Function):
    """Twice a tensor, times itself; it is an attribute of the context."""

    @staticmethod
    def forward(ctx, x, nested):
        ctx.kept = ((x,),) if nested else x
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        kept = ctx.kept if isinstance(ctx.kept, torch.Tensor) else ctx.kept[0][0]
        return grad * kept, None


@pytest.mark.parametrize("nested", [False, True])
def test_a_tensor_that_is_no_saved_one_is_the_calls_own(nested, images, again):
    gc.disable()
    try:
        for turn in range(ENOUGH):
            x = leaf(images + turn)
            (found,) = torch.autograd.grad(binding.apply(Keeps, x, nested).sum(), x)
            assert torch.equal(found, x)
            alive = weakref.ref(x)
            del x, found
            assert alive() is None
    finally:
        gc.enable()
    assert not again


@pytest.mark.parametrize("op", ["avg_pool2d", "silu"])
def test_a_second_way_through_a_graph_is_refused_as_it_was(op, images, again):
    """Of what saves nothing torch refuses none."""
    x = leaf(images)
    for _ in range(ENOUGH):
        total = (ops.avg_pool2d(x, 2) if op == "avg_pool2d" else ops.silu(x)).unbind()[0]
        grad = torch.ones_like(total)
        total.backward(grad)
        if op == "avg_pool2d":
            total.backward(grad)
        else:
            with pytest.raises(RuntimeError, match="a second time"):
                total.backward(grad)
    assert "call" in again


def test_a_view_that_may_be_written_says_nothing_of_others(images, again):
    weight = leaf(images)
    trained(lambda: ops.relu((weight * 2).view(images.shape), inplace=True))
    assert "call" not in again
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="a view of a leaf"):
        ops.relu(weight.view(images.shape), inplace=True)
    stacked = torch.stack((weight, weight)) * 2
    with pytest.raises(RuntimeError, match="autograd cannot follow"):
        ops.relu(stacked.unbind()[0], inplace=True)
    assert torch.equal(weight, before)


def test_what_is_written_beside_a_node_is_written_each_time(images):
    statistics = torch.zeros(3, device=images.device)

    def op(x, statistics):
        launch.count_write(statistics)
        return ops.silu(x)

    x = leaf(images)
    trained(lambda: op(x, statistics))
    _, composition = composed.watch(op, (x, statistics), {})
    assert composition is None
    _, composition = composed.watch(lambda x, _: ops.silu(x), (x, statistics), {})
    assert composition is not None


@pytest.mark.parametrize(
    "op",
    [
        lambda x, other: (other.add_(1), ops.silu(x))[1],
        lambda x, other: ops.silu(x) * 2,
        lambda x, other: (ops.silu(x), 2)[1],
        lambda x, other: ops.linear(x, ELSEWHERE.to(x.device)),
        lambda x, other: ops.silu(x.view(4, 4)),
        lambda x, other: x,
    ],
    ids=["writes", "computes", "number", "elsewhere", "view", "nothing"],
)
def test_what_does_more_than_make_nodes_is_no_repeat(op, device):
    x, other = leaf(torch.randn(4, 4, device=device)), torch.zeros(3, device=device)
    trained(lambda: op(x, other))
    _, composition = composed.watch(op, (x, other), {})
    assert composition is None


ELSEWHERE = torch.ones(4, 4)


def test_which_of_two_arguments_a_node_takes_is_not_guessed(images):
    x = leaf(images)
    assert composed.watch(lambda x, other: ops.silu(x), (x, x), {})[1] is None


def test_what_listens_hears_of_backward_passes(images, again):
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    x, names = leaf(images), []
    trained(lambda: backward(ops.silu(x), x))
    assert again
    total = ops.silu(x).sum()
    with Names():
        total.backward()
    assert "tritorch::activation_backward" in names


def test_one_tensor_twice_is_no_repeat(again, device):
    a, b = (leaf(torch.randn(8, 8, device=device)) for _ in range(2))
    trained(lambda: ops.linear(a, a))
    assert not again
    assert torch.allclose(backward(ops.linear(a, b), a), gradient(lambda x: F.linear(x, b), a))


def test_autocast_is_part_of_the_key(images, again, device):
    x, weight = leaf(images), leaf(torch.randn(5, 3, 1, 1, device=device))

    def dtype(name=None):
        with torch.autocast(device, name or torch.bfloat16, enabled=name is not None):
            return trained(lambda: ops.conv2d(x, weight)).dtype

    names = [None, torch.bfloat16, torch.float16]
    assert [dtype(name) for name in names] == [torch.float32, *names[1:]]
    again.clear()
    assert [dtype(name) for name in names] == [torch.float32, *names[1:]]
    assert again.count("call") == len(names) * ENOUGH


def test_what_autocast_makes_float32_has_its_precision(device):
    """Of arguments of 16 bits, of which nothing is rounded otherwise."""
    x = leaf(torch.randn(2, 3, 4, 4, device=device).half())
    weight = leaf(torch.randn(3, 3, 1, 1, device=device).half())
    precisions = []
    by_triton = launch.Prepared._by_triton

    def launched(self, *given):
        precisions.append(self.constants.get("INPUT_PRECISION"))
        return by_triton(self, *given)

    found, before = [], torch.get_autocast_dtype(device)
    torch.set_autocast_dtype(device, torch.float32)
    torch.set_autocast_enabled(device, True)
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            trained(lambda: ops.conv2d(x, weight))
            with mock.patch.object(launch.Prepared, "_by_triton", launched):
                ops.conv2d(x, weight)
            found.append(precisions.pop())
    finally:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before)
    assert found == ["tf32", "ieee"]


def test_every_call_with_a_gradient_warns(images):
    x, target = leaf(images), torch.randn(4, 1, device=images.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(lambda: ops.mse_loss(x, target))
        trained(lambda: backward(ops.softmax(x), x))
    assert len(caught) == 2 * ENOUGH
    assert {one.filename for one in caught} == {__file__}


def test_warnings_of_another_thread_say_nothing(images, again):
    def warns():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checks.warn("of another call")

    def op(x):
        thread = threading.Thread(target=warns)
        thread.start()
        thread.join()
        return ops.silu(x)

    x = leaf(images)
    trained(lambda: op(x))
    assert composed.watch(op, (x,), {})[1] is not None


def test_derivatives_that_are_carried_along_are_heard_of(images, repeated):
    often(lambda: ops.silu(images))
    repeated.clear()
    with backend.strict(False), forward_ad.dual_level(), torch.no_grad():
        along = ops.silu(forward_ad.make_dual(images, torch.ones_like(images)))
        tangent = forward_ad.unpack_dual(along).tangent
    assert torch.allclose(tangent, gradient(F.silu, images), atol=1e-5)
    assert not repeated


def test_a_repeat_is_of_the_current_device():
    class Repeat:
        device = 1

        def __call__(self, arguments):
            return "again"

    calls = seen.Calls(lambda: "anew", lambda function, arguments, named: (function(), Repeat()))
    with mock.patch.object(torch._C, "_cuda_getDevice", return_value=1, create=True):
        assert [calls(("key",), ()) for _ in range(4)] == ["anew", "anew", "again", "again"]
    with mock.patch.object(torch._C, "_cuda_getDevice", return_value=0, create=True):
        assert calls(("key",), ()) == "anew"


def test_nothing_is_watched_while_a_graph_is_captured(images, again):
    x = leaf(images)
    with mock.patch.object(launch, "is_captured", return_value=True):
        trained(lambda: backward(ops.tanh(x), x))
    assert not again
    trained(lambda: backward(ops.tanh(x), x), 2)
    assert again == ["call", "node"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiler_follows_the_backward_pass_itself(images, again):
    x = leaf(images)
    trained(lambda: ops.silu(ops.relu(x)))
    assert again
    y = ops.silu(ops.relu(x)).sum()
    with (
        torch._dynamo.config.patch(compiled_autograd=True),
        mock.patch.object(nodes.Node, "backward", side_effect=AssertionError),
    ):
        torch.compile(lambda: y.backward(), backend="eager")()
    assert torch.allclose(x.grad, gradient(lambda x: F.silu(x.relu()), images), atol=1e-5)
