"""The catalogue: one-line defects of kernels and launches, and what they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "catalogue"

# classes that the interpreter cannot see, since it does not compile
COMPILED = frozenset({"shared memory", "spills"})


@dataclass(frozen=True)
class Mutant:
    """One defect: the line `before` of `file` is replaced by `after`.

    `before` and `after` are without their indentation.  `function` narrows the search to the
    functions of that name, "" to nothing; `occurrence` picks one of several equal lines, from 1,
    and is 0 where there is one.  `kind`: the class of the defect.  `ops`: the ops that show it.
    `survives`: why no test can see it; empty for all that a test must.  `unchecked`: why
    `tritorch check` does not, where a test does.
    """

    id: str
    family: str
    file: str
    function: str
    occurrence: int
    before: str
    after: str
    kind: str
    defect: str
    ops: tuple[str, ...]
    survives: str
    unchecked: str

    def line(self, source: str) -> int:
        """The line, from 1, that it replaces in `source`.

        Raises:
            ValueError: the catalogue is stale: no such line, or several.
        """
        lines = source.splitlines()
        found = [n for n in self._searched(source) if lines[n - 1].strip() == self.before]
        place = f"{self.file} {self.function}".strip()
        if self.occurrence == 0 and len(found) == 1:
            return found[0]
        if 0 < self.occurrence <= len(found) > 1:
            return found[self.occurrence - 1]
        raise ValueError(
            f"{self.id}: {place} has {len(found)} lines {self.before!r}, "
            + (f"of which #{self.occurrence} is asked for" if self.occurrence else "not one")
        )

    def applied(self, source: str) -> str:
        """`source` with the defect."""
        lines = source.splitlines(keepends=True)
        number = self.line(source) - 1
        lines[number] = lines[number].replace(self.before, self.after)
        return "".join(lines)

    def _searched(self, source: str) -> Iterator[int]:
        if not self.function:
            yield from range(1, len(source.splitlines()) + 1)
            return
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def read(folder: Path = FOLDER) -> list[Mutant]:
    """Every entry, in the order of families and of their files.

    An entry is

        [id] class: what is wrong
        in: function, function #occurrence, or #occurrence in the whole file
        ops: ...
        - the line
        + the line that replaces it
        survives: why no test can see it
        unchecked: why a check does not see it

    without `in` it is searched for in the whole file.  `family`, `file` and, before the first
    entry of a file, `ops` hold for what follows.
    """
    return [mutant for path in sorted(folder.glob("*.txt")) for mutant in _parsed(path.read_text())]


def _parsed(text: str) -> Iterator[Mutant]:
    common: dict[str, str] = {}
    for block in text.strip().split("\n\n"):
        entry: dict[str, str] = {}
        for line in block.splitlines():
            key, _, value = line.partition(" ")
            if key.startswith("["):
                entry["id"] = key.strip("[]")
                entry["kind"], _, entry["defect"] = value.partition(": ")
            elif key in ("-", "+"):
                entry["before" if key == "-" else "after"] = value.strip()
            elif key in ("family:", "file:", "ops:", "in:", "survives:", "unchecked:"):
                entry[key.removesuffix(":")] = value
            else:
                raise ValueError(f"catalogue: cannot read {line!r}")
        if "id" not in entry:
            common |= entry
            continue
        fields = common | entry
        function, _, occurrence = fields.get("in", "").partition("#")
        yield Mutant(
            id=fields["id"],
            family=fields["family"],
            file=fields["file"],
            function=function.strip(),
            occurrence=int(occurrence or 0),
            before=fields["before"],
            after=fields["after"],
            kind=fields["kind"],
            defect=fields["defect"],
            ops=tuple(fields["ops"].split()),
            survives=fields.get("survives", ""),
            unchecked=fields.get("unchecked", ""),
        )
