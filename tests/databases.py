"""torch's own databases of sample calls, and what differs between a call of torch's and ours.

The databases are private to torch, which tests itself with them: nothing here or in the tests
counts on how many samples there are, or which.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from tests.exclusions import Exclusion
from tritorch import backend, launch
from tritorch.testing import tolerances

# what a finding can be about
KINDS = (
    "raises",  # another exception than torch's, or only one of the two
    "warns",  # other warnings
    "outputs",  # their number, shape, dtype or need of a gradient
    "values",  # of outputs
    "strides",  # of outputs and gradients
    "memory",  # an output that is the input, or only torch's is
    "arguments",  # what a call writes into them
    "gradients",
    "path",  # the reference path where kernels are asked for
)


class Finding(NamedTuple):
    kind: str
    call: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind} [{self.call}] {self.message}"


@functools.cache
def load() -> tuple[list[Any], list[Any]]:
    """torch's databases of ops and of layers; the process is left as it was.

    Importing them forbids to set flags such as `torch.backends.cudnn.allow_tf32`, which other tests
    do, times calls of TorchScript, and adds to the environment and to where modules are found.
    """
    pytest.importorskip("expecttest", reason="torch's databases import expecttest")
    environment, path = dict(os.environ), list(sys.path)
    calls = [
        (script, script.__call__) for script in (torch._C.ScriptFunction, torch._C.ScriptMethod)
    ]
    try:
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.common_modules import module_db
    finally:
        # the module's own variable: what stands for it under its name is another object
        torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
        for script, call in calls:
            script.__call__ = call
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = path
    return op_db, module_db


@contextlib.contextmanager
def isolated() -> Iterator[None]:
    """Random numbers of the block are its own.  torch gives every warning, not just its first.

    What the databases warn of while they make samples is not heard.
    """
    others, numpys, always = (
        random.getstate(),
        np.random.get_state(),
        torch.is_warn_always_enabled(),
    )
    torch.set_warn_always(True)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_warn_always(always)
        np.random.set_state(numpys)
        random.setstate(others)


class Result(NamedTuple):
    """What a call did: `error` alone where it raised."""

    outputs: Mapping[str, Any] = MappingProxyType({})
    # by what they are of
    gradients: Mapping[str, Tensor | None] = MappingProxyType({})
    arguments: Mapping[str, Tensor] = MappingProxyType({})
    shares_memory: bool = False
    warned: frozenset[str] = frozenset()
    error: BaseException | None = None


def exact_copy(tensor: Tensor) -> Tensor:
    """A leaf with the same elements in a memory of its own, at the same places of it."""
    storage = tensor.detach().untyped_storage().clone()
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
    return copy.requires_grad_(tensor.requires_grad)


def widened(values: Any) -> Any:
    """The values with every floating tensor in float64, every complex one in complex128."""

    def wide(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() and not tensor.is_complex():
            return tensor
        double = torch.complex128 if tensor.is_complex() else torch.float64
        return tensor.detach().to(double).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, wide, values)


def copied(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, exact_copy, values)


def tensors_of(values: Any) -> dict[str, Tensor]:
    """Every tensor, by where it is."""
    leaves, _ = pytree.tree_flatten_with_path(values)
    return {pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def run(
    call: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    state: dict[str, Tensor] | None = None,
    *,
    gradients: bool,
    written: bool = False,
) -> Result:
    """What the call does with a copy of the arguments: its outputs, and gradients of all leaves.

    `state`: tensors beside the arguments that the call uses or writes, a layer's.  `written`: the
    first argument is written, so what it gets is no leaf.
    """
    args, kwargs = given = copied(arguments)
    leaves = {**tensors_of(given), **(state or {})}
    if written:
        args = (args[0].clone(), *args[1:])
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    # torch.manual_seed tells every kind of device, and takes longer than most calls
    torch.default_generator.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output = call(*args, **kwargs)
            outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
            grads = _gradients(outputs, leaves) if gradients else {}
        except Exception as error:
            return Result(error=error)
    return Result(
        {f"output {number}": value for number, value in enumerate(outputs)},
        grads,
        {name: leaf.detach() for name, leaf in leaves.items()},
        first is not None
        and isinstance(outputs[0], Tensor)
        and first.numel() > 0
        and outputs[0].data_ptr() == first.data_ptr(),
        frozenset(warning.category.__name__ for warning in caught),
    )


def _gradients(outputs: tuple[Any, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    sources = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not sources or not wanted:
        return {}
    generator = torch.Generator().manual_seed(1)
    # the same numbers in every dtype
    grads = [
        torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in sources
    ]
    found = torch.autograd.grad(sources, list(wanted.values()), grads, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def differences(
    ours: Callable[[], Result],
    theirs: Callable[[], Result],
    truth: Callable[[], Result],
    call: Callable[[], str],
    *,
    kernels: bool,
) -> list[Finding]:
    """How the two differ, and, with `kernels`, why ours left them.

    `truth`: torch's in float64, asked where the two are not close.  `call` prints what was called.
    """
    expected = theirs()
    backend.reset()
    with launch.recorded() as launches:
        actual = ours()
    findings = [*_compared(actual, expected, functools.cache(truth))]
    if kernels and actual.error is None:
        reasons = [reason for op in backend.explain().values() for reason in op]
        if not launches and any(
            isinstance(o, Tensor) and o.numel() for o in actual.outputs.values()
        ):
            reasons = reasons or ["nothing was launched"]
        findings += [("path", reason) for reason in reasons]
    return [Finding(kind, call(), message) for kind, message in findings]


def _compared(
    actual: Result, expected: Result, truth: Callable[[], Result]
) -> Iterator[tuple[str, str]]:
    if type(actual.error) is not type(expected.error):
        yield "raises", f"{actual.error!r}, torch {expected.error!r}"
    if actual.error or expected.error:
        return
    if actual.warned != expected.warned:
        yield "warns", f"{sorted(actual.warned)}, torch {sorted(expected.warned)}"
    if actual.shares_memory != expected.shares_memory:
        yield "memory", f"output is the input: {actual.shares_memory}, torch's the opposite"
    for kind, values in (("outputs", "values"), ("gradients",) * 2, ("arguments",) * 2):
        pair = getattr(actual, kind), getattr(expected, kind)
        if pair[0].keys() != pair[1].keys():
            yield kind, f"{kind} {sorted(pair[0])}, torch's {sorted(pair[1])}"
            continue
        for name, one in pair[0].items():
            yield from _different(
                name,
                one,
                pair[1][name],
                (kind, values),
                lambda k=kind, n=name: getattr(truth(), k).get(n),
            )


def _different(
    name: str, one: Any, other: Any, kinds: tuple[str, str], truth: Callable[[], Any]
) -> Iterator[tuple[str, str]]:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        if one is not other:
            yield kinds[0], f"{name} is {one}, torch's {other}"
        return
    received, wanted = (
        f"{described(t)}{' with a gradient' if t.requires_grad else ''}" for t in (one, other)
    )
    if received != wanted:
        yield kinds[0], f"{name} is {received}, torch's {wanted}"
        return
    # an expanded gradient costs no memory; torch may or may not write it out
    if 0 not in one.stride() and _steps(one) != _steps(other):
        yield "strides", f"{name} has strides {one.stride()}, torch's {other.stride()}"
    # a bad call's is the CPU's
    other = other.to(one.device)
    if one.is_complex():
        # torch compares few complex numbers of half precision
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    if torch.equal(one, other):
        return
    try:
        assert_close(one, other, equal_nan=True, check_stride=False)
    except AssertionError as error:
        wide = truth()
        if isinstance(wide, Tensor) and wide.is_complex():
            wide = torch.view_as_real(wide)
        if not isinstance(wide, Tensor) or wide.dtype != torch.float64:
            yield kinds[1], f"{name}: {' '.join(str(error).split())}"
            return
        # torch's own rounding may be the larger
        verdict = tolerances.compare(one, wide, baseline=other)
        if not verdict.accepted:
            yield kinds[1], f"{name}: {verdict.failure}"


def _steps(tensor: Tensor) -> list[int]:
    """The strides that mean something."""
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1]


def described(value: Any) -> str:
    """A value as calls are printed: `float32[2, 3]`, or what Python prints."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(described, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(value)


def printed(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The call `name(...)`, which exclusions are held against."""
    shown = [*map(described, args), *(f"{key}={described(v)}" for key, v in kwargs.items())]
    return f"{name}({', '.join(shown)})"


def judge(exclusions: list[Exclusion], findings: list[Finding]) -> None:
    """Fails for a finding that no exclusion fits, and for an exclusion that fits no finding."""

    def fits(exclusion: Exclusion, finding: Finding) -> bool:
        return finding.kind == exclusion.kind and bool(re.search(exclusion.calls, str(finding)))

    wrong = [f for f in findings if not any(fits(exclusion, f) for exclusion in exclusions)]
    shown = [str(finding) for finding in wrong[:20]]
    if len(wrong) > len(shown):
        shown.append(f"and {len(wrong) - len(shown)} more")
    shown += [
        f"not needed any more: {exclusion}"
        for exclusion in exclusions
        if not exclusion.sometimes and not any(fits(exclusion, finding) for finding in findings)
    ]
    if shown:
        pytest.fail("\n".join(shown), pytrace=False)


def spread(values: list[Any], count: int) -> list[Any]:
    """`count` of them, at equal distances: neighbours differ little."""
    if len(values) <= count:
        return values
    return [values[(2 * i + 1) * len(values) // (2 * count)] for i in range(count)]
