"""What a check has to say: findings by property, as text, as JSON, as an exit status."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tritorch.testing.findings import Finding

# the section of what the detectors see: its cases are all the others'
MEMORY = "memory"


@dataclass
class Section:
    """One property of the battery: how many cases it had, and what they showed."""

    name: str
    cases: int = 0
    # of those, what the function or its reference does not take
    declined: int = 0
    # of those, where the checks themselves failed
    broken: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    # whether its cases showed something, be it listed elsewhere
    failed: bool = False
    # whether the check ended before all its cases had been run, or any
    unfinished: bool = False
    # why it was not tried, where it was not
    skipped: str = ""


@dataclass
class Report:
    """The outcome of one check.

    `target` and `reference`: what was compared.  `notes`: what the check assumed or found out that
    its caller may want to correct (guessed inputs, the rule of accuracy).  `ids`: by the key of a
    finding the id of its case, which runs it alone.  `mistakes`: where the checks themselves
    failed, with a traceback: nothing is known of those cases.  `reproductions`: scripts that were
    written, each of which shows one finding alone; `unscripted`: why there are no others.
    """

    target: str
    reference: str
    level: str
    seed: int
    device: str
    notes: list[str] = field(default_factory=list)
    sections: dict[str, Section] = field(default_factory=dict)
    seconds: float = 0.0
    ids: dict[tuple[str, str, str, str, int], str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    reproductions: list[str] = field(default_factory=list)
    unscripted: list[str] = field(default_factory=list)

    def section(self, name: str) -> Section:
        """The section of that name, made when it is first asked for."""
        return self.sections.setdefault(name, Section(name))

    def add(self, name: str, findings: Iterable[Finding]) -> list[Finding]:
        """Adds to a section what is no second sight of a defect that is known; returns that."""
        section, new = self.section(name), []
        known = {finding.key for finding in self.findings}
        for finding in findings:
            section.failed = True
            # a wrong number has no line: one for every property that shows it is enough
            if finding.key not in known:
                known.add(finding.key)
                new.append(replace(finding, message=grammatical(finding.message)))
        section.findings += new
        return new

    def cut_short(self, planned: Mapping[str, float]) -> None:
        """Marks what has not been run of the planned cases, by section: the check ended before."""
        for name, cases in planned.items():
            section = self.section(name)
            if name == MEMORY:
                section.cases = sum(self.section(n).cases for n in planned if n != MEMORY)
            section.unfinished = section.cases < cases

    @property
    def findings(self) -> list[Finding]:
        """Every defect once: first what has a line, then in the order of finding."""
        found = [finding for section in self.sections.values() for finding in section.findings]
        return sorted(found, key=lambda finding: finding.line == 0)

    @property
    def ok(self) -> bool:
        """Whether something was checked, by checks that did not fail, and nothing was found."""
        return self.cases > 0 and not self.findings and not self.mistakes

    @property
    def cases(self) -> int:
        """How many cases were run, of all properties."""
        return sum(s.cases for s in self.sections.values() if s.name != MEMORY)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text."""
        against = f" against {self.reference}" if self.reference else ""
        lines = [f"{self.target}{against}, level {self.level}, seed {self.seed}, {self.device}"]
        lines += [f"  {note}" for note in self.notes]
        width = max((len(name) for name in self.sections), default=0)
        for section in self.sections.values():
            if section.skipped:
                outcome = f"not checked: {section.skipped}"
            elif section.unfinished and not section.cases:
                outcome = "not run: the check ended before"
            elif section.findings:
                found = len(section.findings)
                outcome = f"FAIL  {counted(section.cases, 'case')}, {counted(found, 'finding')}"
            elif section.failed:
                outcome = f"FAIL  {counted(section.cases, 'case')}, no new finding"
            elif section.broken and section.broken == section.cases:
                outcome = f"not checked: {counted(section.cases, 'case')}"
            elif section.cases and section.declined == section.cases:
                outcome = f"not checked: {counted(section.cases, 'case')}, declined"
            else:
                outcome = f"pass  {counted(section.cases, 'case')}"
                if section.declined:
                    outcome += f", {section.declined} of them declined"
            if section.unfinished and section.cases:
                outcome += ", the check ended before the others"
            if section.broken:
                outcome += f", the check itself failed in {section.broken} of them"
            lines.append(f"  {section.name:{width}}  {outcome}")
        for number, finding in enumerate(self.findings, 1):
            lines += ["", *describe(finding, number, self.ids.get(finding.key, ""))]
        for mistake in self.mistakes:
            where, _, trace = mistake.partition("\n")
            lines += ["", f"the check itself failed, which is no finding: {where}"]
            lines += [f"  {line}" for line in trace.splitlines()]
        lines.append("")
        found = len(self.findings)
        what = counted(found, "finding") if found else "nothing found"
        lines.append(f"{what} in {counted(self.cases, 'case')}, {self.seconds:.1f} s")
        lines += [f"reproduce: python {path}" for path in self.reproductions]
        lines += [f"no script for {why}" for why in self.unscripted]
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "target": self.target,
            "reference": self.reference,
            "level": self.level,
            "seed": self.seed,
            "device": self.device,
            "notes": self.notes,
            "seconds": self.seconds,
            "cases": self.cases,
            "sections": [
                {
                    "name": section.name,
                    "cases": section.cases,
                    "declined": section.declined,
                    "broken": section.broken,
                    "seconds": section.seconds,
                    "failed": section.failed,
                    "unfinished": section.unfinished,
                    "skipped": section.skipped,
                    "findings": [
                        finding.to_json() | {"id": self.ids.get(finding.key, "")}
                        for finding in section.findings
                    ],
                }
                for section in self.sections.values()
            ],
            "mistakes": self.mistakes,
            "reproductions": self.reproductions,
            "unscripted": self.unscripted,
        }


def counted(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}{'s' * (number != 1)}"


# what a message says of one thing as if it were of many, and how people say it
_OF_ONE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (
            r"(?<![\w.,-])1 lanes that are (masked off without `other`) change (.*?) they hold ",
            r"1 lane that is \1 changes \2 it holds ",
        ),
        (r"(?<![\w.,-])1 (of (?:the )?\d+ elements) differ\b", r"1 \1 differs"),
        (
            r"(?<![\w.,-])1 (of (?:the )?\d+ elements of `\w+` \(shape [^)]*\)\)?) are never",
            r"1 \1 is never",
        ),
        (r"(?<![\w.,-])1 elements are\b", "1 element is"),
        (r"(?<![\w.,-])1 elements that belong\b", "1 element that belongs"),
        (r"(?<![\w.,-])1 (byte|element|lane|program|register)s\b", r"1 \1"),
    )
)


def grammatical(message: str) -> str:
    """A message whose counts of one are said as people say them."""
    for pattern, replacement in _OF_ONE:
        message = pattern.sub(replacement, message)
    return message


def describe(finding: Finding, number: int, case: str = "") -> list[str]:
    """One finding as text: kind and place, the statement, what it does, where it shows.

    case: the id of the case that found it, which need not be the smallest one that shows it.
    """
    place = f"{finding.file}:{finding.line}" if finding.line else finding.file
    kernel = f"kernel {finding.kernel}" if finding.kernel else ""
    head = ", ".join(part for part in (place, kernel) if part)
    lines = [f"{number}. {finding.kind}" + (f"  {head}" if head else "")]
    if finding.source:
        lines.append(f"     {finding.source.strip()}")
    lines.append(f"   {finding.message}")
    where = []
    if finding.program is not None:
        where.append(f"program {finding.program}")
    if finding.lanes:
        shown = ", ".join(str(lane if len(lane) != 1 else lane[0]) for lane in finding.lanes)
        more = ", ..." if finding.count > len(finding.lanes) else ""
        lanes = "lanes" if more or len(finding.lanes) > 1 else "lane"
        where.append(
            f"{lanes} {shown}{more}" if finding.program is not None else f"at {shown}{more}"
        )
    if finding.case:
        where.append(f"shown by {finding.case}")
    if case:
        where.append(f"found by case {case}")
    if where:
        lines.append("   " + "; ".join(where))
    return lines
