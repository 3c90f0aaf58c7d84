"""The parts of a check, each for one mode of Triton, and the request that they all understand."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tritorch import backend, launch
from tritorch.registry import FLOATING, Maker, OpSpec, Sample, Subject
from tritorch.testing import (
    configurations,
    describe,
    errors,
    examine,
    gpu_limits,
    hints,
    hosting,
    steps,
)
from tritorch.testing import inputs as texts
from tritorch.testing.calls import map_tensors
from tritorch.testing.errors import RequestError
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs

# says one event of a child process: its name and its fields
Say = Callable[..., None]

# GPUs whose limits a kernel is held to unless its user names others
TARGETS = ("sm_80", "sm_90")
# the section of a report that the compiling part fills
LIMITS = "GPU limits"
# that of what a user's code raises where no call is under check
SETUP = "samples"


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
    level: examine.Level = "quick"
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
    fn = hosting.load(request.target)
    if not callable(fn):
        raise RequestError(f"check: {request.target} is no function, but {type(fn).__name__}")
    module = sys.modules.get(getattr(fn, "__module__", ""))
    if request.reference:
        reference, named = hosting.load(request.reference), request.reference
    elif callable(getattr(module, "reference", None)):
        reference, named = module.reference, "reference of the same module"  # type: ignore[union-attr]
    else:
        raise RequestError(
            "check: there is nothing to compare with: name a function of plain PyTorch by "
            "--reference module:function, or call one beside yours `reference`"
        )
    options: dict[str, Any] = {
        name: getattr(request, name) for name in ("gradients", "mutates", "accuracy")
    }
    dtypes = tuple(dtype_of(name) for name in request.dtypes)
    options["dtypes"] = dtypes or getattr(module, "DTYPES", None)
    options["non_finite"] = request.non_finite
    if request.non_finite is None:
        options["non_finite"] = getattr(module, "NON_FINITE", None)
    samples = request.inputs or getattr(module, "INPUTS", "")
    return asked(fn, reference, samples, named, options, say)


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
        say("doing", property=guessing, case=shown, folder=_folder_of(reference))
        samples = texts.guess(fn, reference)
        notes.append(f"inputs guessed: {samples}")
    if isinstance(samples, str):
        text = texts.parse(samples, fn)
        first = texts.choices(text, (), "quick", 0)
        make = text.samples(first)
    elif callable(samples):
        make = _named(samples)
    else:
        make = _given(fn, list(samples))
    folder = _folder_of(reference)

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


def own_op(name: str) -> OpSpec | None:
    """The op of tritorch's own of that name, None where the name is another's."""
    if ":" in name:
        return None
    import tritorch.ops  # noqa: F401  declares the specs
    from tritorch.registry import specs

    known = {spec.name: spec for spec in specs()}
    if name not in known:
        raise RequestError(
            f"check: expects package.module:function, path/to/file.py:function or an op of "
            f"tritorch's ({', '.join(sorted(known))}), received {name!r}"
        )
    return known[name]


def dtype_of(name: str) -> torch.dtype:
    """float32, or fp32 as many write it."""
    short = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype):
        raise RequestError(f"check: unknown dtype {name!r}")
    if dtype not in FLOATING:
        known = ", ".join(str(known).removeprefix("torch.") for known in FLOATING)
        raise RequestError(f"check: the dtypes under test are of {known}, received {name}")
    return dtype


def run(part: str, fields: dict[str, Any], say: Say) -> None:
    """Runs one part of a request: "interpret" and "cuda" the battery, "compile" the limits."""
    request = Request.from_json(fields)
    # what torch itself allows, for kernels and host code that ask it
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = request.contract
    part_of = compile_part if part == "compile" else battery_part
    # what comes before the cases may die or hang too
    say("doing", property="import", case=request.target, folder=_place(request.target))
    going_on(lambda: part_of(request, find(request, say), say), say)


def going_on(work: Callable[[], None], say: Say) -> None:
    """Does what also calls a user's code beside a call under check: a function of samples, say.

    What that raises is a finding.
    """
    try:
        work()
    except errors.RequestError:
        raise
    except (Exception, SystemExit) as error:
        errors.must_be_the_users(error)
        finding = hints.of_exception(error, "")
        say("outcome", section=SETUP, seconds=0.0, declined=False, broken=False)
        say("finding", section=SETUP, finding=finding.to_json(), id="", step=None)


def battery_part(request: Request, found: Asked, say: Say) -> None:
    """Runs the battery; events "begin", "doing", "outcome", "finding", "mistake" and "end"."""
    folder = _folder(found.subject)
    say("begin", part="battery", reference=found.reference, notes=found.notes)
    examination = steps.Examination(
        found.subject,
        inputs=found.inputs,
        level=request.level,
        seed=request.seed,
        device=request.device,
        unit_in=2**-11 if request.contract == "tf32" else 0.0,
        alone=request.case,
        again=request.step,
    )

    def name_of(step: examine.Step) -> str:
        # a case in words need not be one of those that the inputs, level and seed give
        return steps.id_of(steps.words_of(step)) if request.step is None else ""

    def doing(step: examine.Step, of: examine.Step | None = None) -> None:
        say(
            "doing",
            property=step.section,
            case=str(step.case),
            id=name_of(of or step),
            step=in_words(step),
            folder=folder,
        )

    def in_words(step: examine.Step) -> steps.Words:
        """What another process needs to know of a step, some of which only all of them tell."""
        words = steps.words_of(step)
        if examination.subject.gradients != found.subject.gradients:
            words["gradients"] = list(examination.subject.gradients)
        number = words.get("given", [None])[0]
        # one configuration alone, or after all have been tried
        if step.section == "configurations" and isinstance(number, int):
            words["configurations"] = examination.shown_configurations(number)
        return words

    def mistakes(step: examine.Step) -> bool:
        found = examination.mistakes()
        for mistake in found:
            if mistake.key not in known:
                known.add(mistake.key)
                say("mistake", property=step.section, case=str(step.case), message=str(mistake))
        return bool(found)

    known: set[Any] = set()
    count = 0
    for outcome in examination.run(doing):
        step = outcome.step
        count += 1
        say(
            "outcome",
            section=step.section,
            seconds=outcome.seconds,
            declined=outcome.declined,
            broken=mistakes(step),
        )
        for finding in outcome.findings:
            if finding.key in known:
                continue
            known.add(finding.key)
            smallest = step
            # a case in words is as small as it is to be
            if request.step is None:
                trying = partial(doing, of=step)
                finding, smallest = steps.shrunk(examination, step, finding, trying)
            section = examination.section_of(finding, step)
            say(
                "finding",
                section=section,
                finding=finding.to_json(),
                id=name_of(step),
                step=in_words(smallest),
            )
        mistakes(step)
    watched = count if request.device == "cpu" else 0
    say("end", notes=examination.notes, watched=watched)


def compile_part(request: Request, found: Asked, say: Say) -> None:
    """Compiles what the function launches, forward and backward, for each GPU."""
    subject = found.subject
    folder = _folder(subject)
    wanted: Callable[[Maker], Iterable[Sample]]
    if found.inputs is not None:
        # typical of use: what a GPU is for, not what an interpreter can bear
        sizes = {letter: found.inputs.allowed(letter, 256) for letter in found.inputs.letters}
        wanted = found.inputs.samples([_bounded(found.inputs, sizes)])
    elif isinstance(subject, OpSpec):
        wanted = subject.workloads
    else:
        wanted = subject.samples

    for dtype in subject.dtypes:
        for number, sample in enumerate(wanted(Maker(dtype, "meta"))):
            if number and (request.level == "quick" or not isinstance(subject, OpSpec)):
                break
            compiled = str(dtype).removeprefix("torch.")
            words = {"section": LIMITS, "case": {"sample": sample.name, "dtype": compiled}}
            arguments = next(itertools.islice(wanted(Maker(dtype)), number, None)).arguments
            call = partial(_both_passes, subject, arguments)
            _limits(call, words, request, folder, say)
            if number or not isinstance(subject, OpSpec) or request.level == "quick":
                continue
            for name, entry in configurations.entries(subject, dtype):
                with launch.override(name, entry):
                    configured = words | {"configuration": f"{name} {entry}"}
                    _limits(call, configured, request, folder, say)


def _limits(
    call: Callable[[], None], words: steps.Words, request: Request, folder: str, say: Say
) -> None:
    """Holds one call to the GPUs' limits, unless another case is asked for."""
    name = steps.id_of(words)
    wanted = request.case if request.step is None else steps.id_of(request.step)
    if wanted not in ("", name):
        return
    case = ", ".join([*words["case"].values(), *filter(None, [words.get("configuration")])])
    # each compilation may take as long as a case
    doing = partial(say, "doing", property=LIMITS, id=name, step=words, folder=folder)
    doing(case=case)
    contract: Any = request.contract
    findings = gpu_limits.limits(
        call,
        request.targets,
        contract,
        on_compile=lambda what: doing(case=f"{case}, {what}"),
    )
    say("outcome", section=LIMITS, seconds=0.0, declined=False, broken=False)
    for finding in findings:
        if gpu_limits.is_discarded(finding):
            # the kernel works: autotune leaves the configuration out by itself
            say("end", notes=[finding.message], watched=0)
            continue
        say("finding", section=LIMITS, finding=finding.to_json(), id=name, step=words)


def _both_passes(subject: Subject, arguments: dict[str, Any]) -> None:
    """Calls the function, and differentiates it where it can be."""
    leaves = {
        n: v.detach().requires_grad_()
        if n in subject.gradients and isinstance(v, torch.Tensor) and v.is_floating_point()
        else v
        for n, v in arguments.items()
    }
    with backend.use("triton"):
        result = subject.op(**leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = tuple(o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)
        if outputs:
            wanted = [t for t in leaves.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            grads = [torch.empty_like(output) for output in outputs]
            torch.autograd.grad(outputs, wanted, grads, allow_unused=True)


def _bounded(text: Inputs, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes whose largest tensor has a few million elements."""
    size = 256
    while text.elements(sizes) > 1 << 22 and size > 4:
        size //= 2
        sizes = {letter: text.allowed(letter, size) for letter in text.letters}
    return sizes


def _place(target: str) -> str:
    """The folder of a target that is not imported yet."""
    where = target.rpartition(":")[0]
    return str(Path(where).resolve().parent) if where.endswith(".py") else os.getcwd()


def _folder(subject: Subject) -> str:
    return _folder_of(subject.op)


def _folder_of(function: Any) -> str:
    """Where the user's own files are, to know their frames by."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    file = getattr(module, "__file__", None)
    return "" if file is None else str(file).rpartition("/")[0]


def as_finding(fields: dict[str, Any]) -> Finding:
    return Finding.from_json(fields)
