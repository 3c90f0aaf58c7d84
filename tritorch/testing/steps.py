"""The steps of a check in words: their ids, one of them alone, and the same one made again.

Words are what JSON holds: a step's section, its case and its property with what that gets.  They
cross to other processes, stand in scripts, and give a step its id.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any, TypeAlias

import torch

from tritorch.registry import Subject
from tritorch.testing import battery, examine, shrinking
from tritorch.testing.errors import InternalError, RequestError
from tritorch.testing.findings import Finding
from tritorch.testing.inputs import Inputs, Sizes
from tritorch.testing.schedule import Step
from tritorch.testing.trials import Case

Words: TypeAlias = dict[str, Any]

# stand for what every property gets
_SUBJECT, _CASE = "the subject", "the case"
_GIVEN = [_SUBJECT, _CASE]
_PACKAGE = "tritorch.testing."


def id_of(words: Words) -> str:
    """Twelve letters that name a step on a command line, 60 bits of what it is."""
    digest = hashlib.blake2b(json.dumps(words, sort_keys=True).encode()).digest()
    return base64.b32encode(digest)[:12].decode().lower()


def words_of(step: Step) -> Words:
    """A step in words; its property is missing where it is the first call of all."""
    found: Words = {"section": step.section, "case": _in_words(step.case)}
    if not isinstance(step.run, partial):
        return found
    function = step.run.func
    found["property"] = f"{function.__module__.removeprefix(_PACKAGE)}.{function.__name__}"
    given = [_argument(value, step.case) for value in step.run.args]
    if given != _GIVEN:
        found["given"] = given
    if step.run.keywords:
        # tuples are lists there
        found["options"] = json.loads(json.dumps(step.run.keywords))
    return found


def _argument(value: Any, case: Case) -> Any:
    if isinstance(value, Subject):
        return _SUBJECT
    if isinstance(value, Case):
        return _CASE if value == case else _in_words(value)
    return [_argument(one, case) for one in value] if isinstance(value, list) else value


_DEFAULTS = {one.name: one.default for one in fields(Case)}


def _in_words(case: Case) -> Words:
    found: Words = {}
    for name, default in _DEFAULTS.items():
        value = getattr(case, name)
        if value == default or name == "given":
            continue
        if name == "dtype":
            value = str(value).removeprefix("torch.")
        elif name == "special":
            # NaN is none of JSON's
            value = [value[0], repr(value[1])]
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _case(words: Words) -> Case:
    found: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in words.items()}
    found["dtype"] = getattr(torch, words["dtype"])
    if "special" in words:
        name, number = words["special"]
        found["special"] = name, float(number)
    return Case(**found)


def _cases(words: Any) -> Iterator[Words]:
    """Every case that occurs in the words of a step."""
    if isinstance(words, dict):
        if "sample" in words:
            yield words
        for value in words.values():
            yield from _cases(value)
    elif isinstance(words, list):
        for value in words:
            yield from _cases(value)


class Examination(examine.Examination):
    """`examine.Examination` of all steps, of one by its id, or of one that is made from words.

    It goes on where the checks themselves raise, and keeps what.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        inputs: Inputs | None = None,
        alone: str = "",
        again: Words | None = None,
        **options: Any,
    ) -> None:
        super().__init__(subject, inputs=inputs, **options)
        self._alone, self._again = alone, again
        self._first: Step | None = None
        self._mistakes: list[InternalError] = []

    def watched(self, step: Step) -> list[Finding]:
        try:
            return super().watched(step)
        except InternalError as error:
            self._mistakes.append(error)
            return []

    def mistakes(self) -> list[InternalError]:
        """What the checks themselves raised since it was last asked."""
        found, self._mistakes = self._mistakes, []
        return found

    def shown_configurations(self, index: int) -> dict[str, str]:
        """By the name of each autotuned kernel, the configuration of that number."""
        return {
            kernel: str(configs[min(index, len(configs) - 1)])
            for kernel, configs in self.configurations.items()
        }

    def _probe(self, on_step: Callable[[Step], None] = lambda step: None) -> None:
        if self._again is not None:
            return

        def heard(step: Step) -> None:
            self._first = step
            on_step(step)

        super()._probe(heard)

    def _steps(self) -> Iterator[Step]:
        if self._again is not None:
            yield self._made(self._again)
            return
        if self._alone and self._first is not None and id_of(words_of(self._first)) == self._alone:
            yield self._made(words_of(self._first))
        known = set()
        for step in super()._steps():
            name = id_of(words_of(step))
            if name not in known and name == (self._alone or name):
                known.add(name)
                yield step

    def _made(self, words: Words) -> Step:
        """The step that the words are of."""
        try:
            if self.inputs is not None:
                names = dict.fromkeys(one["sample"] for one in _cases(words))
                chosen = [_sizes(self.inputs, name) for name in names]
                self.subject = replace(self.subject, samples=self.inputs.samples(chosen))
            if "gradients" in words:
                self.subject = replace(self.subject, gradients=tuple(words["gradients"]))
            if "configurations" in words:
                self.configurations = {k: [shown] for k, shown in words["configurations"].items()}
            case = _case(words["case"])
            if "property" not in words:
                run = partial(battery.values, self.subject, case, order=self.watch)
                return Step(words["section"], case, run)
            given = [self._value(one, case) for one in words.get("given", _GIVEN)]
            run = partial(self._function(words["property"]), *given, **words.get("options", {}))
            return Step(words["section"], case, run)
        except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"check: no case can be made of {words}: {error!r}") from error

    def _function(self, name: str) -> Callable[..., list[Finding]]:
        module, _, attribute = name.rpartition(".")
        owner = importlib.import_module(f"{_PACKAGE}{module}")
        found: Callable[..., list[Finding]] = getattr(owner, attribute, None) or getattr(
            self, attribute
        )
        return found

    def _value(self, value: Any, case: Case) -> Any:
        if value == _SUBJECT:
            return self.subject
        if value == _CASE:
            return case
        if isinstance(value, dict):
            return _case(value)
        return [self._value(one, case) for one in value] if isinstance(value, list) else value


def _sizes(text: Inputs, name: str) -> Sizes:
    """The sizes that a sample's name tells."""
    if not text.letters:
        return {}
    return {letter: int(size) for letter, size in (part.split("=") for part in name.split())}


def shrunk(
    examination: Examination,
    step: Step,
    finding: Finding,
    on_step: Callable[[Step], None],
) -> tuple[Finding, Step]:
    """The smallest input that still shows a finding: what it shows there, and its step."""
    tried: dict[str, Step] = {}

    def trying(smaller: Step) -> None:
        tried[smaller.case.sample] = smaller
        on_step(smaller)

    found = shrinking.shrink(examination, step, finding, trying)
    if found is None or examination.inputs is None:
        return finding, step
    sizes, smaller = found
    return smaller, tried[examination.inputs.name(sizes)]
