"""One check at work: its parts, and what they say, as a report."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tritorch.testing import hosting, parts, reproduction, requests, supervise
from tritorch.testing.errors import RequestError
from tritorch.testing.findings import Finding
from tritorch.testing.parts import LIMITS
from tritorch.testing.report import MEMORY, Report
from tritorch.testing.requests import Request
from tritorch.testing.steps import Words


class Run:
    """Collects what the parts of one check say."""

    def __init__(
        self, request: Request, timeout: float, on_event: Callable[[supervise.Event], None]
    ) -> None:
        self.request, self.timeout, self.on_event = request, timeout, on_event
        self.start = time.perf_counter()
        self.report = Report(
            request.target, request.reference, request.level, request.seed, request.device
        )
        # what a reproduction of each finding needs: its case in words
        self.shown: list[tuple[Finding, Words | None]] = []
        # what the compiling part said: it counts when the other is done, whichever was faster
        self.later: list[supervise.Event] = []
        # how many cases each section of the battery is to have, once it says so
        self.planned: dict[str, float] = {"cases": math.inf}
        self.cut_short: dict[str, float] = {}
        self.ended: list[tuple[Finding, supervise.Event]] = []
        self.unwanted = threading.Event()
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def ended_together(self) -> Iterator[None]:
        """What fails or interrupts one part ends the process of the other."""
        try:
            yield
        except BaseException:
            self.unwanted.set()
            raise

    def here(
        self,
        fn: Any,
        reference: Any,
        samples: Any,
        options: dict[str, Any],
    ) -> None:
        """The battery in this process."""
        module = sys.modules.get(getattr(fn, "__module__", ""))
        if reference is None:
            reference = getattr(module, "reference", None)
        if isinstance(reference, str):
            reference = hosting.load(reference)
        if reference is None:
            raise RequestError("check: there is nothing to compare with: pass a reference")
        for option, constant in (("dtypes", "DTYPES"), ("non_finite", "NON_FINITE")):
            if options[option] is None:
                options[option] = getattr(module, constant, None)
        if samples is None or samples == "":
            samples = getattr(module, "INPUTS", "")
        named = self.request.reference or getattr(reference, "__name__", "reference")
        if not self.report.target:
            self.report.target = getattr(fn, "__name__", "function")

        def work() -> None:
            found = requests.asked(fn, reference, samples, named, options, self._say)
            parts.battery_part(self.request, found, self._say)

        parts.going_on(work, self._say)

    def apart(self, part: str) -> None:
        """A part in a process of its own."""
        compiles = part == "compile"
        doing: supervise.Event = {}

        def hear(event: supervise.Event) -> None:
            nonlocal doing
            doing = event if event["event"] == "doing" else doing
            self._hear(event, later=compiles)

        request = self.request.to_json()
        for finding in supervise.run(
            part, request, timeout=self.timeout, on_event=hear, unwanted=self.unwanted
        ):
            self.ended.append((finding, doing))
            # how many there are to compile is not known beforehand
            self.cut_short |= {LIMITS: math.inf} if compiles else self.planned

    def _say(self, event: str, **fields: Any) -> None:
        self._hear({"event": event, **fields}, later=False)

    def _hear(self, event: supervise.Event, *, later: bool) -> None:
        with self.lock:
            if later:
                self.later.append(event)
            else:
                self._note(event)
            self.on_event(event)

    def _note(self, event: supervise.Event) -> None:
        kind = event["event"]
        if kind == "begin":
            self.report.reference = event["reference"]
            self.report.notes += event["notes"]
        elif kind == "plan":
            self.planned = event["cases"]
        elif kind == "end":
            self.report.notes += [n for n in event["notes"] if n not in self.report.notes]
            if event["watched"]:
                self.report.section(MEMORY).cases = event["watched"]
        elif kind == "outcome":
            section = self.report.section(event["section"])
            section.cases += 1
            section.declined += event["declined"]
            section.broken += event["broken"]
            section.seconds += event["seconds"]
        elif kind == "mistake":
            where = f"{event['property']} of {event['case']}"
            self.report.mistakes.append(f"{where}:\n{event['message']}")
        elif kind == "again":
            self.report.section(event["section"]).failed = True
        elif kind == "finding":
            finding = parts.as_finding(event["finding"])
            for new in self.report.add(event["section"], [finding]):
                self.shown.append((new, event["step"]))
                self.report.ids[new.key] = event["id"]

    def finish(self, folder: str | Path | None, unnamed: Sequence[str]) -> Report:
        """The report, and the scripts; `unnamed` says what no other process can import."""
        for event in self.later:
            self._note(event)
        self.report.cut_short(self.cut_short)
        # in the order of their parts too
        for finding, doing in sorted(self.ended, key=lambda ended: ended[0].message):
            self.report.section(finding.kind).cases += 1
            for new in self.report.add(finding.kind, [finding]):
                self.shown.append((new, doing.get("step")))
                self.report.ids[new.key] = doing.get("id", "")
        if self.request.case and not self.report.cases:
            raise RequestError(
                f"check: no case has the id {self.request.case!r}: ids are those of a report of "
                "the same inputs, level and seed"
            )
        self.report.seconds = time.perf_counter() - self.start
        for last in (MEMORY, LIMITS):
            if last in self.report.sections:
                self.report.sections[last] = self.report.sections.pop(last)
        if folder is not None and self.shown:
            self._reproduce(Path(folder), unnamed)
        return self.report

    def _shows(self, step: Words, finding: Finding) -> bool:
        """Whether a case shows a finding when no other has been before it."""
        found: list[Finding] = []

        def hear(event: supervise.Event) -> None:
            if event["event"] == "finding":
                found.append(parts.as_finding(event["finding"]))

        part = "cuda" if self.request.device == "cuda" else "interpret"
        part = "compile" if step["section"] == LIMITS else part
        request = replace(self.request, case="", step=step).to_json()
        try:
            found += supervise.run(part, request, timeout=self.timeout, on_event=hear)
        except (RequestError, supervise.ChildError):
            # the report counts for more than a script
            return False
        wanted = reproduction.sign(finding)
        return any(reproduction.sign(one) == wanted for one in found)

    def _reproduce(self, folder: Path, unnamed: Sequence[str]) -> None:
        """A script for each finding, or why there is none."""
        if unnamed:
            what = " and the ".join(unnamed)
            self.report.unscripted.append(
                f"the {what}: no name to import {'them' if len(unnamed) > 1 else 'it'} by; "
                "give a module-level name, or samples as text"
            )
            return
        for finding, step in self.shown:
            if step is None:
                place = f" at {finding.file}:{finding.line}" if finding.line else ""
                self.report.unscripted.append(f"the {finding.kind}{place}: of no single case")
                continue
            if finding.kind != "hang" and not self._shows(step, finding):
                said = "its case alone, in a process of its own, does not show it"
                self.report.unscripted.append(f"the {finding.kind} in {finding.case}: {said}")
                continue
            path = reproduction.write(folder, self.request, finding, step, timeout=self.timeout)
            self.report.reproductions.append(str(path))
