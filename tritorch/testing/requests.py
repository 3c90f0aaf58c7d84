"""What to check: a request in words, and what it names, loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tritorch.registry import FLOATING, Maker, OpSpec, Sample, Subject
from tritorch.testing import describe, hosting, input_guess, input_sizes, schedule, steps
from tritorch.testing import inputs as texts
from tritorch.testing.calls import map_tensors
from tritorch.testing.errors import RequestError
from tritorch.testing.inputs import Inputs

# says one event of a child process: its name and its fields
Say = Callable[..., None]

# GPUs whose limits a kernel is held to unless its user names others
TARGETS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Request:
    """What to check, in words: as the command line has it, and as it crosses to another process.

    target, reference: as `hosting.load` takes them, or the name of an op of tritorch's own.
    inputs: the text of `inputs.parse`, or the name of a function from a `Maker` to samples.  Empty
    ones are found out: a reference and INPUTS beside the function, else the inputs are guessed.
    """

    target: str
    reference: str = ""
    inputs: str = ""
    level: schedule.Level = "quick"
    seed: int = 0
    case: str = ""
    # a case in words, see `steps`: it alone, of whatever other inputs, level and seed would do
    step: steps.Words | None = None
    device: str = "cpu"
    contract: str = "ieee"
    targets: tuple[str, ...] = TARGETS
    dtypes: tuple[str, ...] = ()
    gradients: tuple[str, ...] | None = None
    mutates: tuple[str, ...] | None = None
    non_finite: tuple[str, ...] | None = None
    accuracy: describe.Accuracy | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Request:
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
        }
        return Request(**lists)


@dataclass(frozen=True)
class Asked:
    """What a request asks for, found: the subject, the text of its inputs, what was assumed."""

    subject: Subject
    inputs: Inputs | None
    reference: str
    notes: list[str] = field(default_factory=list)


def find(request: Request, say: Say = lambda event, **fields: None) -> Asked:
    """Loads what a request names; events "doing" for each call of the reference.

    Raises RequestError: something is not there, or its inputs can neither be read nor guessed.
    """
    spec = own_op(request.target)
    if spec is not None:
        return Asked(spec, None, f"torch.{spec.name}")
    target = hosting.function(request.target, "check")
    if request.reference:
        reference, named = hosting.load(request.reference), request.reference
    elif callable(target.beside("reference")):
        reference, named = target.beside("reference"), "reference of the same module"
    else:
        raise RequestError(
            "check: there is nothing to compare with: name a function of plain PyTorch by "
            "--reference module:function, or call one beside yours `reference`"
        )
    options: dict[str, Any] = {
        name: getattr(request, name) for name in ("gradients", "mutates", "accuracy")
    }
    dtypes = tuple(dtype_of(name) for name in request.dtypes)
    options["dtypes"] = dtypes or target.beside("DTYPES")
    options["non_finite"] = request.non_finite
    if request.non_finite is None:
        options["non_finite"] = target.beside("NON_FINITE")
    samples = request.inputs or target.beside("INPUTS", "")
    return asked(target.value, reference, samples, named, options, say)


def asked(
    fn: Callable[..., Any],
    reference: Callable[..., Any],
    samples: Any,
    named: str,
    options: dict[str, Any],
    say: Say = lambda event, **fields: None,
) -> Asked:
    """The same of objects: `samples` is a text, a function from a `Maker`, a list of calls, or
    nothing.
    """
    notes: list[str] = []
    text: Inputs | None = None
    make: Callable[[Maker], Iterable[Sample]]
    if isinstance(samples, str) and "[" not in samples and ":" in samples:
        samples = hosting.load(samples)
    if samples is None or samples == "":
        shown = getattr(reference, "__name__", "")
        guessing = "guess of inputs, the first calls of the reference"
        say("doing", property=guessing, case=shown, folder=folder_of(reference))
        samples = input_guess.guess(fn, reference)
        notes.append(f"inputs guessed: {samples}")
    if isinstance(samples, str):
        text = texts.parse(samples, fn)
        first = input_sizes.choices(text, (), "quick", 0)
        make = text.samples(first)
    elif callable(samples):
        make = _named(samples)
    else:
        make = _given(fn, list(samples))
    folder = folder_of(reference)

    def told(maker: Maker) -> Iterable[Sample]:
        for sample in make(maker):
            case = f"{sample.name}, {str(maker.dtype).removeprefix('torch.')}"
            say("doing", property="first calls of the reference", case=case, folder=folder)
            yield sample

    subject = replace(describe.describe(fn, reference, told, **options), samples=make)
    judged = {
        "exact": "bitwise",
        "multilinear": "as sums of products",
        "composite": "by how far it moves with its inputs",
    }
    notes.append(f"rounding is judged {judged[subject.accuracy]}")
    return Asked(subject, text, named, notes)


def _named(samples: Callable[[Maker], Any]) -> Callable[[Maker], Iterable[Sample]]:
    """A function that yields samples, or dicts of arguments that get names here."""

    def make_samples(make: Maker) -> Iterable[Sample]:
        for number, one in enumerate(samples(make)):
            yield one if isinstance(one, Sample) else Sample(f"sample {number}", **one)

    return make_samples


def _given(fn: Callable[..., Any], calls: list[Any]) -> Callable[[Maker], Iterable[Sample]]:
    """Calls as a user has them, dicts or tuples of arguments: shapes and integers stay theirs."""
    named = [_call(fn, one) for one in calls]
    if not named:
        raise RequestError("check: there are no samples")

    def like(tensor: torch.Tensor, make: Maker) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.detach().clone().to(make.device)
        return make(*tensor.shape)

    def make_samples(make: Maker) -> Iterable[Sample]:
        for number, one in enumerate(named):
            arguments: dict[str, Any] = {
                name: map_tensors(value, lambda tensor: like(tensor, make))
                for name, value in one.items()
            }
            yield Sample(f"sample {number}", **arguments)

    return make_samples


def _call(fn: Callable[..., Any], one: Any) -> dict[str, Any]:
    """A call's arguments by name; a tensor is a call of its own."""
    if isinstance(one, dict):
        return one
    if isinstance(one, torch.Tensor):
        one = (one,)
    if not isinstance(one, tuple | list):
        raise RequestError(
            f"check: samples are calls, dicts or tuples of arguments, received {type(one).__name__}"
        )
    try:
        return describe.bind(fn, tuple(one))
    except TypeError as error:
        raise RequestError(f"check: a sample does not fit the function: {error}") from None


def own_op(name: str, command: str = "check") -> OpSpec | None:
    """tritorch's op of that name; None for a name with a colon, which is not an op's.

    `command` begins the message of the RequestError for an unknown op.
    """
    if ":" in name:
        return None
    import tritorch.ops  # noqa: F401  declares the specs
    from tritorch.registry import specs

    known = {spec.name: spec for spec in specs()}
    if name not in known:
        raise RequestError(
            f"{command}: expects package.module:function, path/to/file.py:function or an op of "
            f"tritorch's ({', '.join(sorted(known))}), received {name!r}"
        )
    return known[name]


def dtype_of(name: str, command: str = "check") -> torch.dtype:
    """The dtype of that name, "fp32" or "float32"; `command` begins a RequestError's message."""
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise RequestError(f"{command}: unknown dtype {name!r}")
    if dtype not in FLOATING:
        known = ", ".join(str(known).removeprefix("torch.") for known in FLOATING)
        raise RequestError(f"{command}: the dtypes under test are of {known}, received {name}")
    return dtype


def folder_of(function: Any) -> str:
    """Where the user's own files are, to know their frames by."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    file = getattr(module, "__file__", None)
    return "" if file is None else str(file).rpartition("/")[0]
