"""The smallest input that still shows a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from tritorch.testing import battery, inputs
from tritorch.testing.examine import MEMORY_KINDS, Examination
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs
from tritorch.testing.schedule import Step


def shrink(
    examination: Examination,
    step: Step,
    finding: Finding,
    on_step: Callable[[Step], None] = lambda step: None,
    *,
    most: int = 24,
) -> tuple[inputs.Sizes, Finding] | None:
    """Smaller sizes with which the same property still has the same kind of finding.

    None where the sizes are not a text's, or none smaller shows it.  `on_step` hears of every try.
    """
    text = examination.inputs
    if text is None or step.section in ("empty tensors", "torch.library"):
        return None
    if step.section == "repeated calls":
        if finding.kind not in MEMORY_KINDS:
            return None
        # one call shows what a sequence did
        run = partial(battery.values, examination.subject, step.case, order=examination.watch)
        step = replace(step, run=run)
    sizes = _sizes(text, step.case.sample)
    if sizes is None:
        return None
    best: tuple[inputs.Sizes, Finding] | None = None
    tried = 0
    for letter in text.letters:
        for size in _smaller(sizes[letter]):
            smaller = sizes | {letter: text.allowed(letter, size)}
            if smaller == sizes or tried >= most:
                continue
            tried += 1
            again = _again(examination, step, text, smaller, finding, on_step)
            if again is not None:
                best, sizes = (smaller, again), smaller
                break
    return best


def _again(
    examination: Examination,
    step: Step,
    text: Inputs,
    sizes: inputs.Sizes,
    finding: Finding,
    on_step: Callable[[Step], None],
) -> Finding | None:
    original, name = examination.subject, text.name(sizes)
    one = replace(step.case, sample=name)
    function = step.run
    assert isinstance(function, partial)
    subject = replace(original, samples=text.samples([sizes]))
    arguments = [
        subject if value is original else one if value == step.case else value
        for value in function.args
    ]
    run = partial(function.func, *arguments, **function.keywords)
    examination.subject = subject
    smaller = Step(step.section, one, run)
    on_step(smaller)
    try:
        found = examination.watched(smaller)
    finally:
        examination.subject = original
    return next((f for f in found if _likeness(f) == _likeness(finding)), None)


def _likeness(finding: Finding) -> tuple[str, int, str]:
    """Kind, place and the reason that its message guesses: what a smaller input must keep."""
    reason = finding.message.rpartition("; ")[2] if finding.message.endswith("?") else ""
    return finding.kind, finding.line, reason.rpartition(": ")[2]


def _smaller(size: int) -> Iterator[int]:
    for candidate in (1, 2, 3, size // 4, size // 2, size - 1):
        if 0 < candidate < size:
            yield candidate


def _sizes(text: Inputs, name: str) -> dict[str, int] | None:
    """The sizes that a sample's name tells."""
    try:
        found = {k: int(v) for k, v in (part.split("=") for part in name.split())}
    except ValueError:
        return None
    return found if set(found) == set(text.letters) else None
