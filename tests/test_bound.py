"""Launches past Triton's own launcher: its C function is called with what the class would pass."""

import types

import pytest
import torch

from tritorch import bound, descriptors

driver = pytest.importorskip("triton.backends.nvidia.driver")
pytestmark = pytest.mark.compile

HALF = {"swizzle": 3, "elem_size": 2, "elem_type": 8, "block_size": [16, 32], "fp4_padded": False}


class Entry:
    """The C function: what it is called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *arguments):
        self.calls.append(arguments)


@pytest.fixture
def maps(monkeypatch):
    """Every tensor map that is made, as what it is made from."""
    made = []

    def fill(*arguments):
        made.append(arguments)
        return ("map", *arguments)

    utils = types.SimpleNamespace(fill_tma_descriptor=fill)
    active = types.SimpleNamespace(utils=utils)
    runtime = types.SimpleNamespace(driver=types.SimpleNamespace(active=active))
    monkeypatch.setattr(driver, "triton", types.SimpleNamespace(runtime=runtime))
    return made


def launcher_of(signature, kinds=None, scratch=0):
    """Triton's launcher of a kernel with these parameters."""
    made = object.__new__(driver.CudaLauncher)
    entry = Entry()
    made.launch = driver.wrap_handle_tensordesc(entry, dict(enumerate(signature)), kinds)
    made.num_ctas, made.launch_cooperative_grid, made.launch_pdl = 1, False, True
    made.global_scratch_size, made.profile_scratch_size = scratch, 0
    made.global_scratch_align = made.profile_scratch_align = 1
    return made, entry


def bind(launcher, given, constants=()):
    compiled = types.SimpleNamespace(run=launcher, function="function", packed_metadata="metadata")
    names = [f"p{at}" for at in range(len(given))] + [name for name, _ in constants]
    parameters = [types.SimpleNamespace(name=name, default=None) for name in names]
    kernel = types.SimpleNamespace(params=parameters)
    return bound.bind(kernel, compiled, given, dict(constants))


def call(found, tensors, numbers=()):
    run, head, maps, constants = found
    arguments = tensors if maps is None else maps(tensors)
    run(7, 2, 1, "stream", *head, *arguments, *numbers, *constants)


def expected(launcher, entry, tensors, numbers, constants):
    """The same launch by the class."""
    launcher(
        7, 2, 1, "stream", "function", "metadata", None, None, None, *tensors, *numbers, *constants
    )
    return entry.calls.pop()


def describe(tensor, block=(16, 32)):
    return descriptors.descriptor(tensor, tensor.shape, tensor.stride(), block)


known = pytest.mark.skipif(
    not bound._is_known(driver.__name__, "CudaLauncher"),
    reason="this Triton's launcher is called as it is",
)


@known
def test_tensors_and_numbers_reach_the_c_function_as_the_class_passes_them():
    launcher, entry = launcher_of(("*fp16", "i32", "constexpr"))
    x = torch.ones(3)
    found = bind(launcher, (x, 5), (("BLOCK", 64),))
    call(found, (x,), (5,))
    assert found.run is entry
    assert entry.calls.pop() == expected(launcher, entry, (x,), (5,), (64,))


@known
def test_descriptors_reach_it_as_the_class_passes_them(maps):
    signature = "*fp16", "tensordesc<fp16[16, 32]>", "constexpr", "tensordesc<fp16[8, 32]>", "i32"
    kinds = [HALF, HALF | {"block_size": [8, 32]}]
    launcher, entry = launcher_of(signature, kinds)
    x, y = torch.ones(64, 32, dtype=torch.float16), torch.ones(24, 32, dtype=torch.float16)
    tensors = x, describe(x), None, describe(y, (8, 32))
    found = bind(launcher, (*tensors, 5), (("BLOCK", 64),))
    call(found, tensors, (5,))
    assert entry.calls.pop() == expected(launcher, entry, tensors, (5,), (64,))
    assert maps[0][0] == x.data_ptr()
    assert maps[1][4] == [8, 32]


@known
def test_a_map_is_made_once_for_an_address_a_shape_and_strides(maps):
    launcher, entry = launcher_of(("tensordesc<fp16[16, 32]>",), [HALF])
    x = torch.ones(64, 32, dtype=torch.float16)
    found = bind(launcher, (describe(x),))
    for _ in range(3):
        call(found, (describe(x),))
    assert len(maps) == 1
    assert entry.calls[0] == entry.calls[2]
    for other in (x[8:], x[:16], x.view(32, 64)):
        call(found, (describe(other),))
        assert entry.calls[-1] == expected(launcher, entry, (describe(other),), (), ())
    # each of these once here and once by the class
    assert len(maps) == 1 + 2 * 3


@known
def test_maps_do_not_pile_up(maps):
    launcher, _ = launcher_of(("tensordesc<fp16[16, 32]>",), [HALF])
    rows = torch.ones(1000, 8, dtype=torch.float16)
    found = bind(launcher, (describe(rows),))
    for row in rows:
        call(found, (describe(row.view(1, 8)),))
    assert max(map(len, found.maps._known.values())) <= bound._MOST_MAPS
    call(found, (describe(rows[999].view(1, 8)),))
    assert len(maps) == 1000


# scratch memory, and a descriptor that is no map for the kernel
NEEDS = {"scratch": (("*fp16",), None, 8), "no-map": (("tensordesc<fp16[16, 32]>",), [None], 0)}


@known
@pytest.mark.parametrize("need", NEEDS)
def test_what_the_class_does_for_a_kernel_is_left_to_it(need):
    launcher, _ = launcher_of(*NEEDS[need])
    found = bind(launcher, (torch.ones(3),))
    assert found.run is launcher
    assert found.maps is None
    assert found.head == ("function", "metadata", None, None, None)


def test_another_launcher_is_called_as_it_is():
    class CudaLauncher:
        def __call__(self, *arguments):
            self.arguments = arguments

    launcher = CudaLauncher()
    x = torch.ones(3)
    call(bind(launcher, (x, 5), (("BLOCK", 64),)), (x,), (5,))
    head = 7, 2, 1, "stream", "function", "metadata", None, None, None
    assert launcher.arguments == (*head, x, 5, 64)
