"""What is no repeat: a call that differs in what decides its way, or that does more than launch."""

from unittest import mock

import pytest
import torch

from tests.repeating import LEVELS, often
from tests.repeating import images as images
from tests.repeating import kernels_only as kernels_only
from tests.repeating import repeated as repeated
from tritorch import backend, launch, ops
from tritorch.repeats import decorator, seen, watched

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x[:1],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.double(),
        lambda x: torch.cat((x, x)).flatten()[1 : 1 + x.numel()].view(x.shape),
        lambda x: torch.nn.Parameter(x, requires_grad=False).transpose(2, 3),
    ],
    ids=["shape", "order", "dtype", "alignment", "strides"],
)
def test_another_tensor_is_no_repeat(other, images, repeated):
    often(lambda: ops.silu(images))
    repeated.clear()
    x = other(images)
    assert torch.allclose(often(lambda: ops.silu(x), 1), torch.nn.functional.silu(x))
    assert not repeated


def test_equal_numbers_of_other_kinds_are_no_repeat(images, repeated):
    """-0.0 is equal to 0.0, and True to 1: torch tells them apart."""
    often(lambda: ops.leaky_relu(images, 0.0))
    repeated.clear()
    found = often(lambda: ops.leaky_relu(images, -0.0), 1)
    negative = images < 0
    # -0.0 times what is negative
    assert not torch.signbit(found[negative]).any()
    assert torch.signbit(often(lambda: ops.leaky_relu(images, 0.0), 1)[negative]).all()
    often(lambda: ops.max_pool2d(images, 2, 1))
    with pytest.raises(TypeError, match="must be integers"):
        ops.max_pool2d(images, 2, True)
    often(lambda: ops.max_pool2d(images, 2, (1, 1)))
    with pytest.raises(TypeError, match="must be integers"):
        ops.max_pool2d(images, 2, (True, True))


@pytest.mark.parametrize("family", ["matmul", "conv"])
def test_flags_of_torch_are_part_of_the_key(family, device):
    """Of float32 alone, whose products they round."""
    flags = {"matmul": torch.backends.cuda.matmul, "conv": torch.backends.cudnn.conv}[family]
    single, half = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device).half()
    exact = [seen.key_of((tensor,)) for tensor in (single, half)]
    flags.fp32_precision = "tf32"
    rounded = [seen.key_of((tensor,)) for tensor in (single, half)]
    assert rounded[0] != exact[0]
    assert rounded[1] == exact[1]
    assert launch.input_precision(torch.float32, family) == "tf32"


def test_circumstances_are_asked_for_each_time(images, repeated):
    often(lambda: ops.max_pool2d(images, 2))
    repeated.clear()
    with launch.recorded() as names:
        often(lambda: ops.max_pool2d(images, 2))
    assert len(names) == 2 * LEVELS
    assert not repeated
    with backend.use("reference"):
        assert torch.equal(
            often(lambda: ops.max_pool2d(images, 2), 1), torch.nn.functional.max_pool2d(images, 2)
        )
    assert not repeated
    with launch.choices() as chosen:
        often(lambda: ops.max_pool2d(images, 2), 1)
    assert chosen
    assert not repeated
    often(lambda: ops.max_pool2d(images, 2), 1)
    assert len(repeated) == 1


def test_what_needs_a_gradient_is_no_repeat_of_what_needs_none(images):
    often(lambda: ops.relu(images))
    leaf = images.clone().requires_grad_()
    ops.relu(leaf).sum().backward()
    assert torch.equal(leaf.grad, (images > 0).float())


def test_autocast_is_part_of_the_key(images, device, repeated):
    """What it casts is never repeated, what it leaves is."""
    weight = torch.randn(5, 3, 1, 1, device=device)
    often(lambda: ops.conv2d(images, weight))
    often(lambda: ops.relu(images))
    repeated.clear()
    with torch.autocast(device, torch.bfloat16):
        assert often(lambda: ops.conv2d(images, weight)).dtype == torch.bfloat16
        often(lambda: ops.relu(images))
    assert [one.shape for one in repeated if one.shape == images.shape] == [images.shape] * 4
    assert all(one.dtype == torch.bfloat16 for one in repeated if one.shape != images.shape)
    assert often(lambda: ops.conv2d(images, weight), 1).dtype == torch.float32


def test_one_tensor_twice_is_never_repeated(repeated, device):
    """Which of two arguments a launch was given could not be told."""
    a, b = torch.randn(2, 8, 8, device=device)
    assert torch.allclose(often(lambda: ops.matmul(a, a)), a @ a, atol=1e-5)
    assert not repeated
    assert torch.allclose(often(lambda: ops.matmul(a, b)), a @ b, atol=1e-5)
    # the other way round that is no question
    assert torch.allclose(often(lambda: ops.matmul(b, b), 1), b @ b, atol=1e-5)


def test_keys_are_forgotten_when_there_are_too_many(images):
    calls = seen.Calls(lambda x: x)
    with mock.patch.object(seen, "_MOST_KEYS", 3):
        for key in range(10):
            for _ in range(3):
                assert calls((key,), (images,)) is images
            assert len(calls._seen) <= 3
            assert len(calls._known) <= 3


def test_what_is_returned_in_two_shapes_is_not_repeated(images):
    def twice(x):
        y = x.new_empty(x.shape)
        return y, y.view(-1)

    _, repeat = watched.watch(twice, (images,), {})
    assert repeat is None


@pytest.mark.parametrize(
    "does",
    [
        lambda x: x + 1,
        lambda x: x.clone().add_(1),
        lambda x: torch.zeros(3),
        lambda x: x.flatten(),
        lambda x: x.new_empty(3).fill_(1.0),
        lambda x: [x],
        lambda x: KEPT,
        lambda x: x.sum().item(),
    ],
    ids=["computes", "copies", "fills", "views", "writes", "list", "elsewhere", "number"],
)
def test_what_does_more_than_launch_is_not_repeated(does, images):
    _, repeat = watched.watch(does, (images,), {})
    assert repeat is None


KEPT = torch.ones(3)


def test_what_a_call_is_made_of_is_not_asked_for_before_it_is_watched(images):
    """One key is made of each of the first calls, not one of each of its parts."""
    with mock.patch.object(seen, "key_of", wraps=seen.key_of) as asked:
        often(lambda: ops.relu(images), 2)
        # made of two ops
        often(lambda: ops.adaptive_avg_pool1d(images[0], 1), 2)
        often(lambda: decorator.repeated(lambda x: (ops.relu(x), ops.silu(x))[1])(images), 1)
    assert asked.call_count == 5
    assert not launch.thread.is_whole


def special(device):
    """Tensors that no kernel can read as they are."""
    yield "negated", torch.randn(3, 2, dtype=torch.complex64, device=device).conj().imag
    yield "nowhere", torch._efficientzerotensor((3, 4), device=device)
    yield "empty", torch.empty(0, 3, device=device)
    yield "sparse", torch.eye(3, device=device).to_sparse()
    yield "nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], device=device)
    yield "meta", torch.ones(3, device="meta")
    yield "subclass", torch.ones(3, device=device).as_subclass(Tagged)


class Tagged(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_special_tensors_have_no_key(device):
    keys = {name: seen.key_of((tensor,)) for name, tensor in special(device)}
    assert len(keys) == 7
    assert set(keys.values()) == {None}
    assert seen.key_of(([torch.ones(3)],)) is None
    assert seen.key_of(((1, 2.0),)) is None
    inside = []
    torch.vmap(lambda x: (inside.append(seen.key_of((x,))), x)[1])(torch.ones(3, 4))
    assert inside == [None]
