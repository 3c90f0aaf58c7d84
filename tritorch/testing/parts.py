"""The parts of a check, each for one mode of Triton."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tritorch import backend, launch
from tritorch.registry import Maker, OpSpec, Sample, Subject
from tritorch.testing import configurations, errors, gpu_limits, hints, schedule, steps
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs
from tritorch.testing.report import MEMORY
from tritorch.testing.requests import Asked, Request, Say, find, folder_of

# the section of a report that the compiling part fills
LIMITS = "GPU limits"
# that of what a user's code raises where no call is under check
SETUP = "samples"


def run(part: str, fields: dict[str, Any], say: Say) -> None:
    """Runs one part of a request: "interpret" and "cuda" the battery, "compile" the limits."""
    request = Request.from_json(fields)
    # tensors are small: on a busy machine threads that wait for each other take milliseconds a call
    torch.set_num_threads(1)
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
    """Runs the battery; events "begin", "plan", "doing", "outcome", "finding", "again" for one that
    is known, "mistake" and "end".
    """
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

    def name_of(step: schedule.Step) -> str:
        # a case in words need not be one of those that the inputs, level and seed give
        return steps.id_of(steps.words_of(step)) if request.step is None else ""

    def doing(step: schedule.Step, of: schedule.Step | None = None) -> None:
        say(
            "doing",
            property=step.section,
            case=str(step.case),
            id=name_of(of or step),
            step=in_words(step),
            folder=folder,
        )

    def plan(cases: dict[str, int]) -> None:
        watched = {MEMORY: sum(cases.values())} if request.device == "cpu" else {}
        say("plan", cases=cases | watched)

    def in_words(step: schedule.Step) -> steps.Words:
        """What another process needs to know of a step, some of which only all of them tell."""
        words = steps.words_of(step)
        if examination.subject.gradients != found.subject.gradients:
            words["gradients"] = list(examination.subject.gradients)
        number = words.get("given", [None])[0]
        # one configuration alone, or after all have been tried
        if step.section == "configurations" and isinstance(number, int):
            words["configurations"] = examination.shown_configurations(number)
        return words

    def mistakes(step: schedule.Step) -> bool:
        found = examination.mistakes()
        for mistake in found:
            if mistake.key not in known:
                known.add(mistake.key)
                say("mistake", property=step.section, case=str(step.case), message=str(mistake))
        return bool(found)

    known: set[Any] = set()
    count = 0
    for outcome in examination.run(doing, plan):
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
                say("again", section=examination.section_of(finding, step))
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
    return folder_of(subject.op)


def as_finding(fields: dict[str, Any]) -> Finding:
    return Finding.from_json(fields)
