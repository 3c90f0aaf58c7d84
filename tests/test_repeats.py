"""Calls that are repeated: they give and leave what a call does that goes its way."""

import itertools
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.repeating import LEVELS, often
from tests.repeating import images as images
from tests.repeating import kernels_only as kernels_only
from tests.repeating import repeated as repeated
from tritorch import backend, launch, ops
from tritorch.registry import Maker, specs
from tritorch.repeats import decorator, seen, watched
from tritorch.testing import calls, detectors

pytestmark = pytest.mark.interpret

ROOT = Path(__file__).resolve().parent.parent

# lists of tensors have no key
NEVER = {"sgd_step", "adam_step"}
# on the CPU each call looks at classes and probabilities before a kernel does
LOOKS_FIRST = {"nll_loss", "binary_cross_entropy"}
# of an op
MOST_SAMPLES = 4


def made(sample, device):
    """The sample's arguments, in tensors of their own."""
    return {
        name: calls.map_tensors(value, lambda one: one.clone().to(device))
        for name, value in sample.arguments.items()
    }


def called(spec, given, forget=False):
    """What a call gives and leaves in the tensors that it writes.  `forget`: it goes its way."""
    with torch.no_grad():
        if forget:
            with launch.recorded():
                result = calls.call(spec.op, given)
        else:
            result = calls.call(spec.op, given)
    written = [one for name in spec.mutates for one in calls.tensors_of(given[name])]
    return [*calls.outputs_of(result), *written]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(one, other) or bool((one.isnan() & other.isnan() | (one == other)).all())


SPECS = [pytest.param(spec, id=spec.name) for spec in specs()]


def test_every_op_is_repeated():
    decorated = decorator.repeated(len).__code__
    others = {spec.name for spec in specs() if spec.op.__code__ is not decorated}
    # its seeds are drawn
    assert others == NEVER | {"dropout"}


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_repeated_has_its_own_tensors(spec, repeated, device):
    """Samples of every op, with other numbers in the last call."""
    names = set()
    of_seeds = [spec.samples(Maker(device=device, seed=seed)) for seed in (1, 2)]
    for sample, other in itertools.islice(zip(*of_seeds, strict=True), MOST_SAMPLES):
        for _ in range(2 * LEVELS):
            called(spec, made(sample, device))
        repeated.clear()
        given = made(other, device)
        versions = [t._version for value in given.values() for t in calls.tensors_of(value)]
        found = called(spec, given)
        if repeated:
            names.add(sample.name)
        moved = [t._version for value in given.values() for t in calls.tensors_of(value)]
        alone = made(other, device)
        assert_same(found, called(spec, alone, forget=True))
        steps = [after - before for after, before in zip(moved, versions, strict=True)]
        expected = [t._version for value in alone.values() for t in calls.tensors_of(value)]
        assert steps == expected
    assert bool(names) == (spec.name not in NEVER | (LOOKS_FIRST if device == "cpu" else set()))


@pytest.mark.parametrize("spec", [p for p in SPECS if p.values[0].gradients])
def test_gradients_are_those_of_the_first_call(spec, device):
    """The forward and the backward pass of what keeps tensors for autograd."""
    sample = next(sample for sample in spec.samples(Maker(device=device)) if sample.layouts)

    def gradients():
        given = made(sample, device)
        leaves = [
            given[name].requires_grad_()
            for name in spec.gradients
            if given.get(name) is not None and given[name].is_floating_point()
        ]
        torch.manual_seed(0)
        outputs = calls.outputs_of(calls.call(spec.op, given))
        torch.manual_seed(1)
        grads = [torch.randn_like(output) for output in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads, allow_unused=True)]

    first, *_, last = [gradients() for _ in range(2 * LEVELS + 1)]
    assert [one is None for one in last] == [one is None for one in first]
    present = [one is not None for one in first]
    assert_same(
        [one.detach() for one in itertools.compress(last, present)],
        [one.detach() for one in itertools.compress(first, present)],
    )


@pytest.mark.parametrize("watched_call", [2, 4])
def test_a_call_is_repeated_after_the_watched_one(watched_call, images, repeated):
    counts = []
    with mock.patch.object(seen, "_WATCHED", watched_call):
        for _ in range(watched_call + 2):
            often(lambda: ops.relu(images), 1)
            counts.append(len(repeated))
    assert counts == [0] * watched_call + [1, 2]


def test_what_is_repeated_is_new_memory(images, repeated):
    results = [often(lambda: ops.relu(images), 1) for _ in range(4)]
    assert len({result.data_ptr() for result in results}) == 4
    before = results[2].clone()
    images.neg_()
    assert torch.equal(often(lambda: ops.relu(images), 1), images.relu())
    assert torch.equal(results[2], before)
    assert len(repeated) == 3


def test_running_statistics_move_and_count_each_time(images, repeated, device):
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    theirs = mean.clone(), var.clone()
    for _ in range(5):
        often(lambda: ops.batch_norm(images, mean, var, training=True), 1)
        torch.nn.functional.batch_norm(images, *theirs, training=True)
    assert len(repeated) == 3
    assert mean._version == 5
    assert torch.allclose(mean, theirs[0])
    assert torch.allclose(var, theirs[1])


def test_statistics_of_inference_mode_are_refused_after_repeats(images, device):
    def statistics():
        return torch.zeros(3, device=device), torch.ones(3, device=device)

    ordinary = statistics()
    often(lambda: ops.batch_norm(images, *ordinary, training=True))
    with torch.inference_mode():
        made_there = statistics()
        often(lambda: ops.batch_norm(images, *made_there, training=True))
    with pytest.raises(RuntimeError, match="inference mode"):
        ops.batch_norm(images, *made_there, training=True)


def test_every_call_warns(images):
    target = torch.randn(4, 1, device=images.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        often(lambda: ops.mse_loss(images, target))
    assert len(caught) == 2 * LEVELS
    assert {one.filename for one in caught} == {__file__}


def test_an_error_is_raised_each_time(images):
    for _ in range(4):
        with pytest.raises(RuntimeError, match="kernel"):
            ops.max_pool2d(images, 9)
        assert not launch.thread.is_whole
        assert launch.thread.watcher is None


def test_what_listens_hears_of_every_call(images):
    often(lambda: ops.relu(images))

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names = []
    with Names():
        often(lambda: ops.relu(images), 2)
    assert names == ["tritorch::activation_forward"] * 2


def test_a_thread_watches_its_own_calls(images):
    """What others launch meanwhile is no part of what is repeated."""

    def beside_another(x):
        other = threading.Thread(target=lambda: found.append(ops.silu(images)))
        other.start()
        other.join()
        return ops.relu(x)

    found, calls = [], seen.Calls(beside_another)
    for _ in range(2):
        result = often(lambda: calls(("key",), (images,)), 1)
        assert torch.allclose(found.pop(), torch.nn.functional.silu(images))
        assert torch.equal(result, images.relu())
    (repeat,) = calls._known.values()
    # an allocation and a launch
    assert len(repeat.steps) == 2


def at_once(call, arguments, interval):
    """Calls of one argument each in threads that take turns after so many seconds."""
    threads = [threading.Thread(target=call, args=(one,)) for one in arguments]
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)


def test_threads_call_at_once(images):
    """Each has its own results, of the interpreter too, which has one state for all of them."""

    def calls(x):
        found.extend(torch.equal(ops.silu(ops.relu(x)), expected[id(x)]) for _ in range(3))

    inputs = [images + i for i in range(4)]
    expected = {id(x): ops.silu(ops.relu(x)) for x in inputs}
    found = []
    at_once(calls, inputs, interval=1e-5)
    assert found == [True] * 12


@pytest.mark.parametrize(
    "does",
    [
        lambda x: x.clone(),
        lambda x: x.double(),
        lambda x: x.movedim(1, -1).contiguous(),
        lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.clone()[1],
    ],
    ids=["clone", "cast", "of-a-view", "and-back", "channels-last", "part"],
)
def test_copies_are_repeated(does, images):
    """Of the arguments at hand, which lie elsewhere in their memory."""
    memory = torch.randn(images.numel() + 4, device=images.device)
    other = memory[4:].view(images.shape)
    _, repeat = watched.watch(does, (images,), {})
    found, expected = repeat((other,)), does(other)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()


def test_writes_are_those_of_the_call_alone(device):
    """Not those of others into the same memory meanwhile, which versions would tell."""
    flat = torch.rand(4, 3, device=device) + 0.5
    x = torch.randn(5, 3, device=device)
    for _ in range(4):
        before = flat._version
        often(lambda: ops.batch_norm(x, *flat.unbind(), training=True), 1)
        # mean and variance, which are in one memory with weight and bias
        assert flat._version == before + 2
    rows = [row.clone() for row in flat]
    often(lambda: ops.batch_norm(x, *rows, training=True), 1)
    assert [row._version for row in rows] == [1, 1, 0, 0]


def test_detectors_see_every_call(images):
    with detectors.detecting():
        often(lambda: ops.relu(images))
        with mock.patch.object(watched.Repeat, "__call__", side_effect=AssertionError):
            often(lambda: ops.relu(images))
    # which is repeated where none of them looks
    repeats = mock.patch.object(watched.Repeat, "__call__", side_effect=AssertionError)
    with repeats, pytest.raises(AssertionError):
        often(lambda: ops.relu(images))


def test_nothing_of_torch_compile_is_imported():
    """It takes a second, and tells other code that torch.compile is in use."""
    program = """
import sys
import torch
from tritorch import backend, ops
from tritorch.repeats import watched
repeat, count = watched.Repeat.__call__, []
watched.Repeat.__call__ = lambda *given: count.append(1) or repeat(*given)
with torch.no_grad():
    for _ in range(6):
        ops.relu(torch.ones(3))
print(len(count), "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    variables = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "False", "False"]


def test_memory_is_torchs_where_the_compilers_function_is_gone(repeated, images, monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.guards, f"_empty_strided_{images.device.type}")
    monkeypatch.setattr(watched, "_allocator", watched._allocator.__wrapped__)
    result = often(lambda: ops.relu(images))
    assert repeated
    assert torch.equal(result, images.clamp(min=0))


def test_repeats_are_switched_off(repeated, images):
    with mock.patch.object(backend, "REPEATING", False):
        often(lambda: ops.relu(images))
    assert repeated == []
    # what is asked again may be repeated
    expected = often(lambda: ops.relu(images))
    assert repeated
    assert torch.equal(repeated[-1], expected)


@pytest.mark.parametrize("value", [None, "1", "yes", "0", "off", ""])
def test_the_environment_switches_repeats_off(value):
    environment = {n: v for n, v in os.environ.items() if n != "TRITORCH_REPEATS"}
    if value is not None:
        environment["TRITORCH_REPEATS"] = value
    program = "from tritorch import backend; print(backend.REPEATING)"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == str(value in (None, "1", "yes"))


def test_blocks_of_several_threads_end_in_any_order():
    """What a block has collected is taken from its own list."""
    first, second = launch.recorded(), launch.recorded()
    names, others = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    ops.relu(torch.ones(3))
    second.__exit__(None, None, None)
    assert names == []
    assert others == ["activation_forward_kernel"]


def test_blocks_of_several_threads_end_at_once():
    kept = []

    def open_and_close(times):
        for _ in range(times):
            with launch.recorded() as names:
                kept.append(any(other is names for other in tuple(launch._recorders)))

    at_once(open_and_close, [2000] * 4, interval=1e-6)
    # a thread that raised has fewer
    assert kept == [True] * 8000
    assert launch._recorders == []
