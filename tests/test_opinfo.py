"""Every op on the sample calls and the bad calls with which torch tests its own.

On the reference path all of them; through the kernels a few samples, spread over the list, and
every bad call.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import databases, exclusions
from tests.databases import Finding, Result
from tests.exclusions import Exclusion
from tritorch import ops
from tritorch.nn import functional
from tritorch.registry import OpSpec, specs
from tritorch.testing import cases

# samples of an op and a dtype: on the reference path, and through the kernels
MANY, FEW = 100, 8
# that a sample through the kernels may have, outputs included
ELEMENTS = 1000


def source(spec: OpSpec) -> str:
    """torch's name of the op."""
    return spec.source.partition(",")[0].removeprefix("torch.")


def entries(spec: OpSpec) -> list[Any]:
    """The op's entries in torch's database, which names some after a function of another module."""
    name = source(spec)
    if name.rpartition(".")[2] != spec.name:
        return []
    return [
        info
        for info in databases.load()[0]
        if name in (info.name, *(alias.name for alias in info.aliases))
    ]


def functions(spec: OpSpec) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Our function with torch's signature, and torch's."""
    return vars(functional).get(spec.name) or getattr(ops, spec.name), attrgetter(source(spec))(
        torch
    )


def by_op() -> pytest.MarkDecorator:
    chosen = [s for s in specs() if s.name not in exclusions.WITHOUT_ENTRY]
    return pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in chosen])


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    with databases.isolated():
        yield


class Call(NamedTuple):
    """One call of an op; `written`: its first argument is."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: bool = False

    @classmethod
    def of(cls, sample: Any) -> Call:
        return cls((sample.input, *sample.args), sample.kwargs)


def run(function: Callable[..., Any], call: Call, gradients: bool) -> Result:
    return databases.run(function, call[:2], gradients=gradients, written=call.written)


def compared(spec: OpSpec, ours: Call, theirs: Call, **options: bool) -> list[Finding]:
    """How our function's call differs from torch's function's."""
    gradients = options["gradients"]
    function, torchs = functions(spec)
    return databases.differences(
        lambda: run(function, ours, gradients),
        lambda: run(torchs, theirs, gradients),
        lambda: run(torchs, databases.widened(theirs), gradients),
        lambda: databases.printed(spec.name, ours.args, ours.kwargs),
        kernels=options["kernels"],
    )


def calls(spec: OpSpec, info: Any, device: str, dtype: torch.dtype) -> Iterator[list[Call]]:
    """Each sample of the entry: as it is, in channels_last, and in place, where that can be."""
    in_place = "inplace" in inspect.signature(functions(spec)[0]).parameters
    gradients = dtype in info.supported_backward_dtypes(device)
    torch.manual_seed(0)
    for sample in info.sample_inputs(device, dtype, gradients, set_seed=False):
        call = Call.of(sample)
        variants = [call]
        if isinstance(sample.input, Tensor) and sample.input.dim() in (4, 5):
            channels_last = cases.relayout(sample.input.detach(), "channels_last")
            channels_last.requires_grad_(sample.input.requires_grad)
            variants.append(call._replace(args=(channels_last, *sample.args)))
        if in_place and "inplace" not in sample.kwargs:
            variants.append(Call(call.args, {**call.kwargs, "inplace": True}, written=True))
        yield variants


def size(spec: OpSpec, call: Call) -> int:
    """Elements of arguments and outputs."""
    outputs = run(functions(spec)[1], call, gradients=False).outputs
    tensors = databases.tensors_of((call.args, call.kwargs, dict(outputs))).values()
    return sum(tensor.numel() for tensor in tensors)


def judge(spec: OpSpec, test: str, findings: list[Finding], device: str = "cpu") -> None:
    databases.judge(exclusions.of(spec.name, test, device), findings)


@pytest.mark.reference
@by_op()
def test_reference_path(spec: OpSpec) -> None:
    """All samples in float32, and many in every other dtype that torch's function takes."""
    findings, count = [], 0
    for info in entries(spec):
        for dtype in sorted(info.supported_dtypes("cpu"), key=str):
            gradients = dtype in info.supported_backward_dtypes("cpu")
            chosen = list(calls(spec, info, "cpu", dtype))
            if dtype != torch.float32:
                chosen = databases.spread(chosen, MANY)
            for call in chain.from_iterable(chosen):
                findings += compared(spec, call, call, gradients=gradients, kernels=False)
                count += 1
    assert count
    judge(spec, "reference_path", findings)


@pytest.mark.interpret
@by_op()
def test_kernels(spec: OpSpec, device: str) -> None:
    findings, chosen = [], []
    for info in entries(spec):
        if torch.float32 in info.supported_dtypes(device):
            every = databases.spread([*calls(spec, info, device, torch.float32)], MANY)
            sizes = [size(spec, variants[0]) for variants in every]
            limit = max(ELEMENTS, min(sizes))
            small = [one for one, elements in zip(every, sizes, strict=True) if elements <= limit]
            chosen += databases.spread(small, FEW)
    assert chosen
    for number, variants in enumerate(chosen):
        call = variants[number % len(variants)]
        findings += compared(spec, call, call, gradients=True, kernels=True)
    judge(spec, "kernels", findings, device)


@pytest.mark.reference
@pytest.mark.interpret
@by_op()
def test_bad_calls(spec: OpSpec, device: str) -> None:
    """Ours raises what torch does on the CPU: on a GPU a bad call may end the process."""
    findings = []
    for info in entries(spec):
        if info.error_inputs_func is not None:
            for pair in zip(info.error_inputs(device), info.error_inputs("cpu"), strict=True):
                ours, theirs = (Call.of(bad.sample_input) for bad in pair)
                findings += compared(spec, ours, theirs, gradients=False, kernels=False)
    judge(spec, "bad_calls", findings, device)


@pytest.mark.reference
def test_only_ops_without_an_entry_are_said_to_have_none() -> None:
    without = {spec.name for spec in specs() if not entries(spec)}
    assert without == exclusions.WITHOUT_ENTRY.keys() & {spec.name for spec in specs()}


@pytest.mark.reference
def test_exclusions_name_what_there_is() -> None:
    layers = {layer for spec in specs() for layer in spec.layers}
    tested = ({spec.name for spec in specs()} | layers) - exclusions.WITHOUT_ENTRY.keys()
    for exclusion in exclusions.EXCLUSIONS:
        assert exclusion.subject in tested
        assert exclusion.test in ("reference_path", "kernels", "bad_calls")
        assert exclusion.kind in databases.KINDS
        assert exclusion.reason
    named = [(*exclusion[:4], exclusion.device) for exclusion in exclusions.EXCLUSIONS]
    assert len(named) == len(set(named))


@pytest.mark.reference
def test_an_exclusion_must_be_needed_and_everything_else_agree() -> None:
    finding = Finding("values", "relu(float32[3])", "output 0: off")
    fitting = Exclusion("relu", "kernels", "values", r"float32\[3\]", "a reason")
    databases.judge([fitting], [finding])
    databases.judge([fitting._replace(sometimes=True)], [])
    for listed, found in (([fitting], []), ([], [finding])):
        with pytest.raises(pytest.fail.Exception, match="relu"):
            databases.judge(listed, found)
    with pytest.raises(pytest.fail.Exception, match="not needed any more"):
        databases.judge([fitting, fitting._replace(kind="strides")], [finding])


def raising(x: Tensor) -> Tensor:
    raise IndexError


def warning(x: Tensor) -> Tensor:
    warnings.warn("of nothing", UserWarning, stacklevel=1)
    return x.relu()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("raises", raising),
        ("warns", warning),
        ("outputs", lambda x: (x.relu(), x)),
        ("outputs", lambda x: x.relu().double()),
        ("outputs", lambda x: x.detach().relu()),
        ("values", lambda x: x.relu() * (1 + 2**-15)),
        ("strides", lambda x: x.relu().t().contiguous().t()),
        ("memory", lambda x: x.relu_()),
        ("arguments", lambda x: x.relu() + x.data.zero_()),
        ("gradients", lambda x: x.relu() + (x - x.detach()) * 2**-10),
        ("path", lambda x: x.relu()),
    ],
)
def test_every_kind_of_difference_is_seen(kind: str, wrong: Callable[..., Any]) -> None:
    # a leaf cannot be written in place
    written = kind == "memory"
    call = Call((torch.linspace(-1, 2, 12).view(3, 4).requires_grad_(),), {}, written)
    runs = [partial(run, function, call, True) for function in (wrong, torch.relu)]
    found = databases.differences(*runs, runs[1], str, kernels=kind == "path")
    assert kind in {finding.kind for finding in found}
    assert not databases.differences(runs[1], runs[1], runs[1], str, kernels=False)


@pytest.mark.reference
def test_loading_leaves_the_process_as_it_was() -> None:
    databases.load()
    assert not torch.backends.flags_frozen()
    assert torch.get_default_dtype() == torch.float32
    assert torch._C.ScriptMethod.__call__.__module__ != "torch.testing._internal.common_utils"
