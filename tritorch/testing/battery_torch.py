"""The properties of a function within torch: strides, writes, autocast, compiler, library, TF32.

As in `battery.py`, each is a function from a subject and a case to findings, and none is good.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import triton_ops_to_kernels
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import opcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tritorch.registry import Argument, Subject
from tritorch.testing import calls, cases, interpreter, products, redirect
from tritorch.testing.findings import Finding
from tritorch.testing.trials import Case, different, judged, outcome, raised, same_bits

# namespaces of torch's own ops
_TORCHS = frozenset(("aten", "prim", "prims", "profiler", "inductor", "debugprims", "triton"))


def layout_of_results(
    subject: Subject, case: Case, *, channels_last: bool = False
) -> list[Finding]:
    """Outputs and gradients have the strides that torch gives them.

    channels_last: every argument of four or five dimensions is.
    """
    arguments = case.arguments(subject)
    if channels_last:
        arguments = {
            n: cases.relayout(v, "channels_last") if isinstance(v, Tensor) else v
            for n, v in arguments.items()
        }
    actual, findings = outcome(subject, case, arguments)
    if actual is None:
        return findings
    grad = case.gradient(subject)
    torchs = [
        dict(cases.reference(subject, given, grad).named()) for given in _on_devices(arguments)
    ]
    for what, value in actual.named():
        findings += _other_strides(what, value, [named[what] for named in torchs], case)
    return findings


def format_of_outputs(subject: Subject, case: Case, argument: str) -> list[Finding]:
    """Outputs have torch's memory format where that argument alone is channels_last.

    Of gradients torch promises less: on a CPU convolution's follow the library that it calls.
    """
    case = replace(case, layout=(argument, "channels_last"))
    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, wanted=())
    if actual is None:
        return findings
    torchs = [
        cases.reference(subject, given, wanted=()).outputs for given in _on_devices(arguments)
    ]
    for number, value in enumerate(actual.outputs):
        findings += _other_strides(
            f"output {number}", value, [outputs[number] for outputs in torchs], case
        )
    return findings


def _on_devices(arguments: dict[str, Argument]) -> list[dict[str, Argument]]:
    """The arguments where they are, and on the CPU: torch's group norm, say, keeps channels_last on
    one of the two alone.
    """
    tensors = [t for value in arguments.values() for t in calls.tensors_of(value)]
    return [arguments, *([cases.on_cpu(arguments)] if any(t.is_cuda for t in tensors) else [])]


def _other_strides(what: str, value: Tensor, torchs: Sequence[Tensor], case: Case) -> list[Finding]:
    """A finding if `value` has the strides of none of torch's results."""
    received, *wanted = (
        tuple(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)
        for t in (value, *torchs)
    )
    if received in wanted:
        return []
    message = f"{what} has strides {received}, torch's {wanted[0]}"
    return [Finding("shape", message, argument=what, case=str(case))]


def counts_writes(subject: Subject, case: Case) -> list[Finding]:
    """Autograd sees what a call writes: the version of the tensor moves with its bits."""
    arguments = {
        name: calls.map_tensors(value, lambda tensor: tensor.detach().clone())
        for name, value in case.arguments(subject).items()
    }
    written = [
        (name, tensor) for name in subject.mutates for tensor in calls.tensors_of(arguments[name])
    ]
    before = [(tensor._version, tensor.clone()) for _, tensor in written]
    calls.call(subject.op, arguments)
    return [
        Finding(
            "mutation",
            f"{name} has changed and its version has not: autograd takes it for what it was",
            argument=name,
            case=str(case),
        )
        for (name, tensor), (version, bits) in zip(written, before, strict=True)
        if tensor._version == version and not cases.bitwise_equal(tensor, bits)
    ]


def autocast(subject: Subject, case: Case) -> list[Finding]:
    """Under autocast results have torch's dtypes, and the bits of a call with the arguments that
    autocast makes.
    """
    device = torch.device(case.device).type

    def under_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Argument) -> Any:
            with torch.autocast(device, dtype=torch.bfloat16):
                return calls.call(function, arguments)

        return call

    arguments = case.arguments(subject)
    actual, findings = outcome(subject, case, arguments, function=under_autocast(subject.op))
    if actual is None:
        return findings
    other = replace(subject, reference=under_autocast(subject.reference))
    torchs = dict(cases.reference(other, arguments, case.gradient(subject)).named())
    rounded = arguments
    if subject.autocast == "lower":
        lowered = subject.lowered or tuple(arguments)
        rounded = {
            n: v.bfloat16()
            if n in lowered and isinstance(v, Tensor) and v.is_floating_point()
            else v
            for n, v in arguments.items()
        }
    plain, findings = outcome(subject, case, rounded)
    if plain is None:
        return findings
    without = dict(plain.named())
    if not torchs.keys() == without.keys() == dict(actual.named()).keys():
        message = f"results are {list(dict(actual.named()))}, torch's {list(torchs)}"
        return [*findings, Finding("shape", message, case=str(case))]
    for what, value in actual.named():
        if value.dtype != torchs[what].dtype:
            message = f"{what} is {value.dtype}, torch's {torchs[what].dtype}"
            findings.append(Finding("shape", message, argument=what, case=str(case)))
        expected = without[what].to(value.dtype)
        if not torch.equal(value, expected):
            findings.append(different("values", what, value, expected, case))
    return findings


def compiles(subject: Subject, case: Case) -> list[Finding]:
    """torch.compile makes one graph of the op, which computes the same bits."""
    torch.compiler.reset()
    compiled = torch.compile(subject.op, fullgraph=True, backend="aot_eager")
    arguments = case.arguments(subject)
    try:
        actual = cases.run(compiled, subject, arguments, grad_outputs=case.gradient(subject))
    except Exception as error:
        found = raised(error, case)
        return [replace(found, kind="compilation", message=f"torch.compile: {found.message}")]
    eager, findings = outcome(subject, case, arguments)
    if eager is None:
        return findings
    return same_bits("compilation", "under torch.compile", actual, eager, case)


def library(subject: Subject, case: Case, *, required: bool = False) -> list[Finding]:
    """Every op of torch.library that the call runs passes torch's own checks of it.

    required: there must be one.
    """
    arguments = case.arguments(subject)
    with _Recorded() as recorded:
        _, findings = outcome(subject, case, arguments)
    calls = {call[0]: call for call in recorded.calls}
    if required and not calls:
        findings.append(Finding("library", "no library op was called", case=str(case)))
    for function, args, kwargs in calls.values():
        try:
            with _traceable(function):
                opcheck(function, args, kwargs)
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), repr(error))
            # there is none
            text = text.removesuffix(" (scroll up for stack trace)")
            findings.append(Finding("library", f"{function}: {text}", case=str(case)))
    return findings


@contextlib.contextmanager
def _traceable(function: Any) -> Iterator[None]:
    """Lets torch trace an op of `torch.library.triton_op` whose kernels are interpreted.

    wrap_triton leaves these as they are: a launch must compute nothing where tensors have no
    values, and the op remain one node of a graph, which would lose what its launches write.
    """
    if function._name not in triton_ops_to_kernels or not interpreter.interpreting():
        yield
        return
    config = importlib.import_module("torch._functorch.config")
    kernels = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
    run = kernels.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        # a descriptor holds its tensor
        tensors = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        return None if fake else run(self, *args, **kwargs)

    with (
        redirect.replaced(config, "decompose_custom_triton_ops", False),
        redirect.replaced(kernels, "run", launch),
    ):
        yield


class _Recorded(TorchDispatchMode):
    """Collects the calls of ops that are not torch's own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace not in _TORCHS:
            # the ops know nothing of autograd: the Function around them does
            given = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
            self.calls.append((function, *given))
        return function(*args, **(kwargs or {}))


def tf32_is_used(subject: Subject, case: Case) -> list[Finding]:
    """Where torch's flags allow TF32, float32 products are right within its rounding, and not
    within float32's: it was asked for and happened.
    """
    arguments = case.arguments(subject)
    with products.allowing_tf32(), _rounding_to_tf32(case):
        actual, findings = outcome(subject, case, arguments)
        if actual is None:
            return findings
        findings += judged(subject, replace(case, unit_in=2**-11), arguments, actual)
        within = judged(subject, replace(case, unit_in=0.0), arguments, actual)
    if not any(finding.argument == "output 0" for finding in within):
        message = "the result is as close as float32's, though TF32 is allowed"
        findings.append(Finding("tf32", message, case=str(case)))
    return findings


def tf32_is_not_used(subject: Subject, case: Case) -> list[Finding]:
    """Products of float32 keep its rounding, on hardware whose tensor cores would take TF32."""
    arguments = case.arguments(subject)
    with _rounding_to_tf32(case):
        actual, findings = outcome(subject, case, arguments)
    if actual is None or not (wrong := judged(subject, case, arguments, actual)):
        return findings
    exact, _ = outcome(subject, case, arguments)
    known = {f.argument for f in judged(subject, case, arguments, exact)} if exact else set()
    said = 'a product of float32 operands without input_precision="ieee" is TF32\'s'
    return findings + [
        replace(finding, kind="tf32", message=f"{said}: {finding.message}")
        for finding in wrong
        if finding.argument not in known
    ]


def _rounding_to_tf32(case: Case) -> contextlib.AbstractContextManager[None]:
    """On the CPU the interpreter drops the bits that a tensor core would."""
    on_gpu = torch.device(case.device).type != "cpu"
    return contextlib.nullcontext() if on_gpu else interpreter.corrected(tf32=True)
