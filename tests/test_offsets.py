"""Tensors whose elements lie more than 2^31 elements apart, in memory that is never touched.

An offset computed in 32 bits wraps around, to zeros below the tensor.
"""

import contextlib
import fcntl
import gc
import mmap
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tritorch.ops  # noqa: F401  declares the specs
from tritorch import backend, ops
from tritorch.ops import stem
from tritorch.ops.geometry import Geometry
from tritorch.registry import Maker, specs
from tritorch.testing import cases

pytestmark = pytest.mark.interpret

REACH = 2**31
# of Linux; Python knows it from 3.13 on
MAP_NORESERVE = 0x4000
# bytes that one test takes: of indices that end 2^32 elements after their memory begins
LARGEST = 8 * 2 * REACH


def memory(elements, dtype, device):
    """Zeros, of which a page takes memory when it is written to."""
    size = elements * dtype.itemsize
    if device == "cuda":
        return torch.zeros(elements, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype)


@pytest.fixture(autouse=True)
def share(device):
    """On a GPU, whose memory is really taken, as many of these tests at a time as have room."""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    slots = max(1, total // LARGEST)
    files = [Path(tempfile.gettempdir(), f"tritorch-offsets-{slot}.lock") for slot in range(slots)]
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(file.open("w")) for file in files]
        while not any(is_taken(file) for file in opened):
            time.sleep(0.01)
        yield
        # what this process keeps of the memory is no other's
        gc.collect()
        torch.cuda.empty_cache()


def is_taken(file):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def far_apart(tensor, dim):
    """The same values; the last one along `dim` is the first that passes 32 bits."""
    dense = [n for d, n in enumerate(tensor.shape) if d != dim]
    strides = list(torch.empty(dense, device="meta").stride())
    # no stride passes 32 bits itself: Triton would pass it as an integer of 64
    strides.insert(dim, -(-REACH // (tensor.shape[dim] - 1)))
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True))
    view = memory(REACH + extent, tensor.dtype, tensor.device.type).as_strided(
        tensor.shape, strides, REACH
    )
    return view.copy_(tensor)


def wide_dims(tensor: object) -> Iterator[int]:
    """Dimensions that `far_apart` can stretch."""
    if isinstance(tensor, Tensor):
        yield from (dim for dim, size in enumerate(tensor.shape) if size > 2)


# a loop of the kernel is at its last turn where it passes 32 bits
STEPPING = {"block-and-one-rows", "block-and-one-columns", "one-output"}


def chosen():
    """Every sample that is repeated with every layout, those of several groups and of loops."""
    for spec in specs():
        for sample in spec.samples(Maker(torch.float32, "meta")):
            has_groups = sample.arguments.get("groups", 1) != 1
            if sample.layouts or has_groups or sample.name in STEPPING:
                yield spec, sample


# a random mask lies in the order of memory, which only a stretch of the first dimension leaves
IN_MEMORY_ORDER = {"dropout"}


def arguments():
    return [
        pytest.param(spec, sample.name, name, dim, id=f"{spec.name}-{sample.name}-{name}-{dim}")
        for spec, sample in chosen()
        for name, value in sample.arguments.items()
        for dim in wide_dims(value)
        if dim == 0 or spec.name not in IN_MEMORY_ORDER
    ]


def gradients():
    return [
        pytest.param(spec, sample.name, dim, id=f"{spec.name}-{sample.name}-{dim}")
        for spec, sample in chosen()
        if spec.gradients
        for dim in wide_dims(first_output(spec, sample.arguments))
    ]


def first_output(spec, given):
    result = spec.reference(**given)
    return result[0] if isinstance(result, tuple) else result


def computed(spec, given, stretch=lambda grad: grad):
    """Outputs, gradients and what is written, of one call whose arguments are not copied."""
    tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
    leaves = [
        tensors[name].detach().requires_grad_()
        for name in spec.gradients
        if name in tensors and tensors[name].is_floating_point()
    ]
    names = [n for n in spec.gradients if n in tensors and tensors[n].is_floating_point()]
    with backend.strict():
        result = spec.op(**given | dict(zip(names, leaves, strict=True)))
    outputs = result if isinstance(result, tuple) else (result,)
    found = [output.detach() for output in outputs]
    found += [tensors[name] for name in spec.mutates if name in tensors]
    if leaves:
        grad = cases.random_gradient(f"{spec.name}/gradient")(outputs[0].detach())
        found += torch.autograd.grad(outputs[0], leaves, stretch(grad))
    return found


def sample_arguments(spec, name, device):
    make = Maker(torch.float32, device, f"{spec.name}/{name}")
    return dict(cases.sample_of(spec, name, make).arguments)


def check(found, expected):
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        # another layout may sum in another order; a wrong offset is no matter of rounding
        torch.testing.assert_close(value.contiguous(), other.contiguous(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "name", "argument", "dim"), arguments())
def test_argument_that_passes_32_bits(spec, name, argument, dim, device):
    expected = computed(spec, sample_arguments(spec, name, device))
    given = sample_arguments(spec, name, device)
    given[argument] = far_apart(given[argument], dim)
    check(computed(spec, given), expected)


@pytest.mark.parametrize(("spec", "name", "dim"), gradients())
def test_gradient_that_passes_32_bits(spec, name, dim, device):
    given = sample_arguments(spec, name, device)
    expected = computed(spec, given)
    given = sample_arguments(spec, name, device)
    check(computed(spec, given, stretch=lambda grad: far_apart(grad, dim)), expected)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_pixels_packed_from_an_image_that_passes_32_bits(dim, device):
    """Where descriptors run the convolution, which takes two bytes a number."""
    x = Maker(torch.float16, device, "stem")(2, 3, 4, 5)
    packed = stem._packed((2, 3), (7, 7), Geometry((2, 2), (3, 3), (1, 1), 1))
    with backend.use("triton"):
        found, expected = (stem._pack_images(one, packed) for one in (far_apart(x, dim), x))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("op", ["conv2d", "conv_transpose2d"])
def test_filters_whose_stride_itself_passes_32_bits(op, device):
    """The launch is given the stride in units, which fits, of eight channels."""
    make = Maker(torch.float16, device, op)
    order = {"memory_format": torch.channels_last}
    x, weight = make(1, 8, 4, 4).contiguous(**order), make(8, 8, 1, 1).contiguous(**order)
    far = memory(7 * REACH + 8, torch.float16, torch.device(device).type)
    far = far.as_strided(weight.shape, (REACH, 1, 1, 1)).copy_(weight)
    with backend.use("triton"), backend.strict():
        check([getattr(ops, op)(x, far)], [getattr(ops, op)(x, weight)])
