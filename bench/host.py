"""What a call costs the host besides the driver: the real way to a launch, without a GPU.

    python -m tritorch.bench.host [--json FILE [--force]]

Tensors on the CPU stand for a GPU's: kernels are compiled for sm_90 and bound as on a GPU, and the
launcher that they are bound to does nothing.  What is missing is Triton's launcher in C and the
driver, some 6 microseconds a launch.  Beside it stands torch's own call on the same tiny tensors,
which on a CPU computes something too.  Each call is timed without gradients, and with them and the
backward pass.  Times are of this machine, and the least of many rounds; the Python functions that a
call enters do not depend on it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from tritorch import backend, bound, launch, ops
from tritorch.bench import timing
from tritorch.bench.environment import Json, write_result
from tritorch.testing import dry

Pair = tuple[Callable[[], object], Callable[[], object]]

_ROUNDS, _CALLS = 30, 20
# calls until one is repeated, its backward pass too
WARM_UP = 6


@contextlib.contextmanager
def stub_driver(target: str = "sm_90") -> Iterator[None]:
    """Inside the block tensors of the CPU take the way of a GPU's, up to the launcher."""
    bind = bound.bind

    def stub(kernel: Any, compiled: Any, given: Any, options: Any) -> bound.Bound:
        places = {at: None for at, one in enumerate(given) if hasattr(one, "block_shape")}
        maps = (
            bound.Maps(places, lambda descriptor, _: (None, *descriptor.shape)) if places else None
        )
        return bind(kernel, compiled, given, options)._replace(run=_nothing, maps=maps)

    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.use("triton"))
        stack.enter_context(backend.strict())
        stack.enter_context(dry.compiling_for(target))
        replaced: dict[tuple[Any, str], Any] = {
            (launch, "_gpu"): lambda tensor: 0,
            (bound, "bind"): stub,
            (torch._C, "_cuda_getDevice"): lambda: 0,
            (torch._C, "_cuda_getCurrentRawStream"): lambda device: 0,
        }
        for (owner, name), value in replaced.items():
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        yield


def _nothing(*arguments: Any) -> None:
    """The launcher."""


def calls() -> dict[str, Pair]:
    """By name our call and torch's, on tensors of a few elements."""
    return {name: (ours, torchs) for name, (ours, torchs, _) in _calls().items()}


def steps() -> dict[str, Pair]:
    """The same with gradients of all that has any."""

    def step(call: Callable[[], Any], leaves: tuple[Tensor, ...]) -> Callable[[], object]:
        grad = torch.ones_like(call())
        return lambda: torch.autograd.grad(call(), leaves, grad)

    def pair(
        ours: Callable[[], Any], torchs: Callable[[], Any], leaves: tuple[Tensor, ...]
    ) -> Pair:
        for leaf in leaves:
            leaf.requires_grad_()
        return step(ours, leaves), step(torchs, leaves)

    return {name: pair(*each) for name, each in _calls().items()}


def _calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[Tensor, ...]]]:
    last = torch.channels_last
    x = torch.randn(8, 64, 8, 8, dtype=torch.bfloat16).contiguous(memory_format=last)
    w = torch.randn(64, 64, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=last)
    # a call with twice the same tensor is none of a layer's
    a, b = (one.clone() for one in torch.randn(2, 64, 64, dtype=torch.bfloat16))
    scale, shift = torch.ones(64), torch.zeros(64)
    target = torch.zeros(64, dtype=torch.long)
    return {
        "relu": (lambda: ops.relu(x), lambda: F.relu(x), (x,)),
        "gelu": (lambda: ops.gelu(x), lambda: F.gelu(x), (x,)),
        "conv2d": (
            lambda: ops.conv2d(x, w, None, 1, 1),
            lambda: F.conv2d(x, w, None, 1, 1),
            (x, w),
        ),
        "batch_norm": (
            lambda: ops.batch_norm(x, None, None, scale, shift, True),
            lambda: F.batch_norm(x, None, None, scale, shift, True),
            (x, scale, shift),
        ),
        "conv2d_batch_norm": (
            lambda: ops.conv2d_batch_norm(x, w, None, None, scale, shift, padding=1, training=True),
            lambda: F.batch_norm(F.conv2d(x, w, None, 1, 1), None, None, scale, shift, True),
            (x, w, scale, shift),
        ),
        "layer_norm": (lambda: ops.layer_norm(a, (64,)), lambda: F.layer_norm(a, (64,)), (a,)),
        "matmul": (lambda: ops.matmul(a, b), lambda: torch.matmul(a, b), (a, b)),
        "linear": (lambda: ops.linear(a, b), lambda: F.linear(a, b), (a, b)),
        "max_pool2d": (lambda: ops.max_pool2d(x, 2), lambda: F.max_pool2d(x, 2), (x,)),
        "avg_pool2d": (lambda: ops.avg_pool2d(x, 2), lambda: F.avg_pool2d(x, 2), (x,)),
        "softmax": (lambda: ops.softmax(a, 1), lambda: F.softmax(a, 1), (a,)),
        "cross_entropy": (
            lambda: ops.cross_entropy(a, target),
            lambda: F.cross_entropy(a, target),
            (a,),
        ),
    }


def rows() -> list[Json]:
    """A row for each call: microseconds of ours and of torch's, and Python functions entered."""
    with stub_driver():
        with torch.no_grad():
            found = [_row(name, "host", *pair) for name, pair in calls().items()]
        return found + [_row(name, "host_both", *pair) for name, pair in steps().items()]


def _row(name: str, which: str, ours: Callable[[], object], torchs: Callable[[], object]) -> Json:
    for _ in range(WARM_UP):
        ours()
    least, baseline = (_microseconds(call) for call in (ours, torchs))
    with launch.recorded() as launches:
        ours()
    return {
        "op": name,
        "pass": which,
        "median_us": least,
        "baseline_us": baseline,
        "functions": functions_entered(ours),
        "launches": len(launches),
        "verified": True,
    }


def functions_entered(call: Callable[[], object]) -> int:
    """Python functions that one call enters, its own included."""
    count = 0

    def seen(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    previous = sys.getprofile()
    sys.setprofile(seen)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return count


def _microseconds(call: Callable[[], object]) -> float:
    """The least mean of several rounds."""
    found = []
    for _ in range(_ROUNDS):
        start = timing.now()
        for _ in range(_CALLS):
            call()
        found.append((timing.now() - start) / _CALLS * 1e6)
    return min(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--force", action="store_true", help="also where there is a file")
    options = parser.parse_args(arguments)
    found: list[Any] = rows()
    for row in found:
        print(
            f"{row['op']:<14} {row['pass']:<10} {row['median_us']:6.1f} us, torch on the CPU "
            f"{row['baseline_us']:6.1f}, {row['functions']} functions, {row['launches']} launches"
        )
    for which in ("host", "host_both"):
        times = [row["median_us"] for row in found if row["pass"] == which]
        print(f"mean of {len(times)} calls, {which}: {statistics.fmean(times):.1f} us")
    if options.json is not None:
        write_result(options.json, "host", found, overwrite=options.force)
    return 0


if __name__ == "__main__":
    sys.exit(main())
