"""A launch on a GPU, remembered: what reaches Triton's launcher is what `kernel[grid]` passes."""

import weakref

import pytest
import torch

from tritorch import backend, bound, descriptors, hardware, launch, ops
from tritorch.testing import dry

pytestmark = pytest.mark.compile


class Launches(list):
    """Calls of Triton's launcher; `bound`: what was compiled and is remembered."""

    def __init__(self):
        super().__init__()
        self.bound = []


@pytest.fixture
def launches(monkeypatch):
    """Launches on CPU tensors take the way of a GPU's; what the launcher is called with."""
    seen = Launches()
    original, bind = dry._Launcher.__call__, bound.bind

    def keep(*arguments):
        seen.bound.append(bind(*arguments))
        return seen.bound[-1]

    def spy(self, grid_x, grid_y, grid_z, stream, function, metadata, *rest):
        # launch metadata and hooks come first
        seen.append((self.source.fn.__name__, (grid_x, grid_y, grid_z), function, *rest[3:]))
        original(self, grid_x, grid_y, grid_z)

    monkeypatch.setattr(dry._Launcher, "__call__", spy)
    monkeypatch.setattr(bound, "bind", keep)
    monkeypatch.setattr(launch, "_gpu", lambda tensor: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    with backend.use("triton"), backend.strict(), dry.compiling_for("sm_90"):
        yield seen


CALLS = {
    "relu": lambda: ops.relu(torch.ones(4, 6)),
    "matmul": lambda: ops.matmul(torch.ones(32, 16), torch.ones(16, 48)),
    "conv2d": lambda: ops.conv2d(torch.ones(2, 8, 6, 6), torch.ones(4, 8, 3, 3), torch.ones(4)),
    "max_pool2d": lambda: ops.max_pool2d(torch.ones(2, 3, 8, 8), 2),
    "batch_norm": lambda: ops.batch_norm(
        torch.ones(4, 3, 5, 5), torch.zeros(3), torch.ones(3), training=True, momentum=0.3
    ),
}


def shown(arguments):
    """Tensors by what a launch looks at; constants by Triton's own wrapper or not."""
    return [
        (a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else getattr(a, "value", a)
        for a in arguments
    ]


@pytest.mark.parametrize("op", CALLS)
def test_a_remembered_launch_passes_what_the_first_did(op, launches):
    CALLS[op]()
    first = launches.copy()
    launches.clear()
    known = len(launches.bound)
    CALLS[op]()
    assert len(launches.bound) == known
    assert [shown(arguments) for arguments in launches] == [shown(a) for a in first]
    assert first


def kernel_of(call, launches):
    """The compiled kernel that a call is the first to launch."""
    known = len(launches.bound)
    call()
    (found,) = launches.bound[known:]
    return found.head, found.run


def test_what_triton_specialises_for_is_told_apart(launches):
    x = torch.ones(64)
    results = [
        kernel_of(lambda: ops.relu(x), launches),
        kernel_of(lambda: ops.relu(torch.ones(65)[1:]), launches),
        kernel_of(lambda: ops.relu(x.double()), launches),
        kernel_of(lambda: ops.relu(torch.ones(63)), launches),
        kernel_of(lambda: ops.relu(torch.ones(1)), launches),
    ]
    assert len({id(run) for _, run in results}) == len(results)


def test_another_configuration_is_another_launch(launches):
    a = torch.ones(64, 64)
    kernels = launch.kernels("matmul")
    seen = set()
    for config in kernels.MATMUL_CONFIGS[4]:
        with launch.override("matmul_config", config):
            seen.add(id(kernel_of(lambda: ops.matmul(a, a), launches)[1]))
    assert len(seen) == len(kernels.MATMUL_CONFIGS[4])


def test_a_plan_is_of_one_kernel():
    made = []

    @launch.planned_by_kernel
    def plan(kernel, size):
        made.append((kernel, size))
        return len(made)

    # whose hash no plan asks for
    class Unhashable(list):
        pass

    one, other = Unhashable(), Unhashable()
    assert [plan(one, 1), plan(other, 1), plan(one, 1), plan(one, 2)] == [1, 2, 1, 3]
    with launch.override("matmul_config", None):
        assert plan(one, 1) == 4
    assert plan(one, 1) == 1


def test_floats_share_one_launch(launches):
    x = torch.ones(4, 3, 5, 5)
    statistics = torch.zeros(3), torch.ones(3)
    ops.batch_norm(x, *statistics, training=True, momentum=0.1)
    known = len(launches.bound)
    ops.batch_norm(x, *statistics, training=True, momentum=0.7, eps=1e-3)
    assert len(launches.bound) == known
    assert 0.7 in [a for name, *rest in launches for a in rest if isinstance(a, float)]


def test_a_profiler_sees_launches_of_triton(launches, monkeypatch):
    triton = pytest.importorskip("triton")
    x = torch.ones(8)
    ops.relu(x)
    seen = []
    kernel = launch.kernels("activation").activation_forward_kernel
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *a, **k: seen.append(1)])
    ops.relu(x)
    assert not seen
    triton.knobs.runtime.launch_enter_hook.add(print)
    try:
        ops.relu(x)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(print)
    assert seen == [1]


def test_shapes_that_change_with_every_call_do_not_fill_the_memory():
    class Plan:
        pass

    plan = launch.planned(lambda size: Plan())
    plans = [weakref.ref(plan(size)) for size in range(5000)]
    assert 0 < sum(found() is not None for found in plans) < 5000


def test_what_a_profiler_compiled_does_not_outlive_it(launches):
    triton = pytest.importorskip("triton")
    triton.knobs.runtime.launch_enter_hook.add(print)
    try:
        ops.relu(torch.ones(24))
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(print)
    assert launches.bound == []


def describe(tensor, block):
    return descriptors.descriptor(tensor, tensor.shape, tensor.stride(), block)


@pytest.fixture
def copy_tile():
    return pytest.importorskip("tests.tiles").copy_tile_kernel


def test_a_launch_with_descriptors_is_remembered_by_dtype_and_tile(launches, copy_tile):
    run = launch.Prepared(copy_tile, (1,), (0,))

    def remembered(shape, block, dtype=torch.float16):
        x = torch.ones(shape, dtype=dtype)
        launches.clear()
        run(x, describe(x, block), describe(x, block))
        return {id(b.run) for b in launches.bound}, launches[0]

    first, (_, _, _, x, y, row) = remembered((64, 32), [16, 32])
    assert [x.block_shape, y.block_shape, row] == [(16, 32), (16, 32), 0]
    # sizes and strides are arguments: another tensor of the same kind is the same launch
    assert remembered((128, 64), [16, 32])[0] == first
    assert len(remembered((64, 32), [32, 32])[0]) == 2
    assert len(remembered((64, 32), [16, 32], torch.bfloat16)[0]) == 3


def test_what_a_descriptor_takes():
    half = torch.float16.itemsize
    assert descriptors.describable(256, (5, 3, 8), (24, 8, 1), half)
    assert not descriptors.describable(264, (5, 3, 8), (24, 8, 1), half)
    assert not descriptors.describable(256, (5, 3, 8), (20, 8, 1), half)
    assert not descriptors.describable(256, (5, 8), (8, 2), half)
    assert not descriptors.describable(256, (0, 8), (8, 1), half)
    assert not descriptors.describable(256, (2**32, 8), (8, 1), half)
    assert not descriptors.describable(256, (2, 8), (2**39, 1), half)
    assert not descriptors.describable(256, (1, 1, 1, 1, 1, 8), (8, 8, 8, 8, 8, 1), half)


def test_the_capability_is_that_of_the_target():
    x = torch.ones(1)
    assert hardware.capability(x) == 0
    for target, capability in (("sm_80", 80), ("sm_90", 90), ("sm_100", 100), ("gfx942", 0)):
        with dry.compiling_for(target):
            assert hardware.capability(x) == capability
