"""Makes of a kernel in Triton's own language a Python program that counts what it does.

The program makes the kernel's computations with whole numbers, and of the tiles it only counts how
often they are loaded, stored and multiplied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tritorch.bench.ttir import (
    COMPARED,
    PYTHON,
    argument_of,
    bytes_of,
    div,
    product,
    python_name,
    rem,
    results_of,
)

# turns of one loop that are followed, of which all others are like
_TURNS = 2048


@dataclass(frozen=True)
class Event:
    """Something that a kernel does with a tile.

    `what`: "load", "store", "atomic" or "dot".  `amount`: bytes, or floating-point operations.
    `loop`: the number of the loop around it, -1 for none.  `pointer`: the arguments in which the
    address lies, empty where that is not known.  `kind`: of a product, its operands' type.
    """

    what: str
    amount: int
    loop: int
    pointer: tuple[str, ...] = ()
    kind: str = ""


@dataclass
class Program:
    """Python that counts what the kernel does."""

    run: Callable[[list[float], tuple[int, ...], tuple[int, ...], dict[str, Any]], None]
    counters: int
    events: dict[int, Event]
    loops: list[int]
    parents: list[int]
    unknown: list[str]


@functools.lru_cache(maxsize=512)
def translated(ttir: str, parameters: tuple[str, ...]) -> Program:
    """The program of a kernel; `parameters` are the names of what it takes, in order."""
    return _Translator(parameters).translate(ttir)


class _Translator:
    def __init__(self, parameters: tuple[str, ...]) -> None:
        self.parameters = parameters
        self.lines: list[str] = []
        self.known: set[str] = set()
        self.pointers: dict[str, tuple[str, ...]] = {}
        self.events: dict[int, Event] = {}
        self.loops: list[int] = []
        self.parents: list[int] = []
        self.unknown: list[str] = []
        self.counters = 0
        # open regions: what they are, and what they give to whom
        self.open: list[dict[str, Any]] = []
        self.depth = 1

    def translate(self, ttir: str) -> Program:
        inside, skipped = False, 0
        for raw in ttir.splitlines():
            line = re.sub(r"\s+loc\(#?\w*\)$", "", raw.strip())
            if line.startswith("tt.func public"):
                inside = True
                self._function(line)
            elif not inside:
                continue
            elif skipped or line.endswith("({"):
                # what a reduction does with two numbers
                skipped += line.endswith("({") - line.startswith("})")
            elif line == "}" and not self.open:
                break
            else:
                self._line(line)
        return self._program()

    def _program(self) -> Program:
        head = "def run(n, pid, grid, given):"
        body = ["bb = 0", *self.lines, "return"]
        source = "\n".join([head, *("    " * (not b.startswith("    ")) + b for b in body)])
        names: dict[str, Any] = {"_div": div, "_rem": rem, "_TURNS": _TURNS}
        exec(compile(source, "<traffic>", "exec"), names)
        return Program(
            names["run"], self.counters, self.events, self.loops, self.parents, self.unknown
        )

    def _emit(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _counter(self) -> int:
        self.counters += 1
        return self.counters - 1

    def _function(self, line: str) -> None:
        declared = re.findall(r"(%[\w#]+): (!?[\w.]+(?:<[^ ]*>)?)", line.partition("(")[2])
        # a descriptor brings its sizes and strides, which have its name
        whole = len(declared) == len(self.parameters)
        for position, (name, kind) in enumerate(declared):
            argument = self.parameters[position] if whole else argument_of(line, name)
            if kind[0] == "!":
                self.pointers[name] = (argument,)
            elif kind[0] == "i":
                self._emit(f"{python_name(name)} = given.get({argument!r}, 1)")
                self.known.add(name)

    def _line(self, line: str) -> None:
        if line.startswith("} else"):
            self._else()
        elif line.startswith("} do {"):
            pass
        elif line.startswith("}"):
            self._close()
        elif line.startswith("^bb"):
            self._label(line)
        elif "scf.for" in line:
            self._for(line)
        elif "scf.if" in line:
            self._if(line)
        elif "scf.while" in line:
            self._while(line)
        elif line.startswith("scf.yield"):
            self._yield(line)
        elif line.startswith("cf."):
            self._branch(line)
        elif line.startswith("tt.return"):
            self._emit("return")
        elif line:
            self._statement(line)

    def _values(self, text: str) -> list[str]:
        return re.findall(r"%[\w#]+", text)

    def _statement(self, line: str) -> None:
        if "tt.call" in line:
            self.unknown.append("what a function does that is not inlined")
        left, found, right = line.partition(" = ")
        if not found:
            left, right = "", line
        results = [name.partition(":")[0] for name in re.findall(r"%[\w#:]+", left)]
        op, _, rest = right.partition(" ")
        operands = self._values(rest.rpartition(" : ")[0] or rest)
        if op in ("tt.load", "tt.store", "tt.atomic_rmw", "tt.atomic_cas") or op.startswith(
            ("tt.descriptor_", "tt.dot", "tt.experimental_descriptor")
        ):
            self._event(op, rest, operands)
        for name in results:
            if "!tt.ptr" in rest or "tensordesc" in rest:
                origins = [self.pointers.get(one, ()) for one in operands]
                loaded = op == "tt.load" or op == "tt.int_to_ptr"
                self.pointers[name] = () if loaded else tuple(dict.fromkeys(sum(origins, ())))
        if len(results) == 1 and (value := self._scalar(op, rest, operands)) is not None:
            self._emit(f"{python_name(results[0])} = {value}")
            self.known.add(results[0])

    def _scalar(self, op: str, rest: str, operands: list[str]) -> str | None:
        """The Python of an integer computation, None for any other and where it is not known."""
        if op == "tt.get_program_id":
            return f"pid[{'xyz'.index(rest[0])}]"
        if op == "tt.get_num_programs":
            return f"grid[{'xyz'.index(rest[0])}]"
        if op == "arith.constant":
            found = re.match(r"(-?\d+|true|false) ?(: (i\d+|index))?$", rest)
            return None if found is None else found[1].capitalize()
        if not re.search(r": (i\d+|index)( to (i\d+|index))?$", rest):
            return None
        if any(name not in self.known for name in operands):
            return None
        names = [python_name(name) for name in operands]
        kind = op.partition(".")[2]
        if kind == "cmpi":
            sign = rest.partition(",")[0].strip()
            return f"{names[0]} {COMPARED[sign[-2:]]} {names[1]}"
        return PYTHON[kind].format(*names) if kind in PYTHON and op[:5] == "arith" else None

    def _event(self, op: str, rest: str, operands: list[str]) -> None:
        if op.startswith("tt.dot"):
            flops, kind = product(rest)
            event = Event("dot", flops, self._loop(), kind=kind)
        else:
            what = (
                "atomic"
                if "atomic" in op or "reduce" in op
                else ("store" if "store" in op or "scatter" in op else "load")
            )
            pointer = self.pointers.get(operands[0], ()) if operands else ()
            event = Event(what, bytes_of(rest), self._loop(), pointer)
        number = self._counter()
        self.events[number] = event
        self._emit(f"n[{number}] += 1")

    def _loop(self) -> int:
        return next((r["loop"] for r in reversed(self.open) if r["loop"] is not None), -1)

    def _enter_loop(self) -> tuple[int, int]:
        parent, number = self._loop(), self._counter()
        self.loops.append(number)
        self.parents.append(parent)
        return number, len(self.loops) - 1

    def _for(self, line: str) -> None:
        found = re.search(
            r"scf\.for (?:unsigned )?(%[\w#]+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)", line
        )
        assert found is not None
        variable, *bounds = found.groups()
        carried = re.findall(
            r"(%[\w#]+) = (%[\w#]+)", line.partition("iter_args(")[2].partition(") ->")[0]
        )
        number, loop = self._enter_loop()
        computed = all(bound in self.known for bound in bounds)
        if not computed:
            self.unknown.append("how often a loop turns depends on loaded values")
        low, high, step = (python_name(bound) for bound in bounds)
        turns = f"max(0, -(({low} - {high}) // max({step}, 1)))" if computed else "1"
        self._emit(f"t{loop} = {turns}")
        names = [name for name, _ in carried]
        for name, first in carried:
            self.pointers[name] = self.pointers.get(first, ())
            if first in self.known:
                self.known.add(name)
                self._emit(f"{python_name(name)} = {python_name(first)}")
        self._emit(f"s{loop} = n[:]")
        self._emit(f"for i{loop} in range(min(t{loop}, _TURNS)):")
        self.depth += 1
        self._emit(f"n[{number}] += 1")
        if computed:
            self._emit(f"{python_name(variable)} = {low} + i{loop} * {step}")
            self.known.add(variable)
        results = results_of(line)
        self.open.append({"kind": "for", "results": results, "carried": names, "loop": loop})

    def _while(self, line: str) -> None:
        """Not followed: it turns once."""
        self.unknown.append("how often a loop turns depends on what it computes")
        number, loop = self._enter_loop()
        for name, first in re.findall(r"(%[\w#]+) = (%[\w#]+)", line):
            self.pointers[name] = self.pointers.get(first, ())
        self._emit(f"t{loop} = 1")
        self._emit(f"s{loop} = n[:]")
        self._emit(f"for i{loop} in range(1):")
        self.depth += 1
        self._emit(f"n[{number}] += 1")
        self.open.append({"kind": "while", "results": [], "carried": [], "loop": loop})

    def _if(self, line: str) -> None:
        results = results_of(line)
        found = re.search(r"scf\.if (%[\w#]+)", line)
        assert found is not None
        computed = found[1] in self.known
        if not computed:
            self.unknown.append("which way a branch goes depends on loaded values")
        self._emit(f"if {python_name(found[1]) if computed else 'True'}:")
        self.depth += 1
        self._emit("pass")
        self.open.append(
            {"kind": "if", "results": results, "carried": [], "loop": None, "ways": []}
        )

    def _else(self) -> None:
        self.depth -= 1
        self._emit("else:")
        self.depth += 1
        self._emit("pass")

    def _yield(self, line: str) -> None:
        region = self.open[-1]
        values = self._values(line.rpartition(" : ")[0] or line)
        targets = region["results"] if region["kind"] == "if" else region["carried"]
        if region["kind"] == "if":
            # known only where all ways know it
            region["ways"].append(values)
        pairs = []
        for target, value in zip(targets, values, strict=False):
            origins = self.pointers.get(target, ()) + self.pointers.get(value, ())
            self.pointers[target] = tuple(dict.fromkeys(origins))
            if value in self.known:
                pairs.append((target, value))
            elif region["kind"] == "for" and target in self.known:
                # what later turns have is not known, and they are taken as the first
                pairs.append((target, target))
        if pairs:
            left = ", ".join(python_name(target) for target, _ in pairs)
            self._emit(f"{left} = {', '.join(python_name(value) for _, value in pairs)}")

    def _close(self) -> None:
        if not self.open:
            return
        region = self.open.pop()
        self.depth -= 1
        results = region["results"]
        if region["kind"] == "if":
            ways = region["ways"]
            for i, result in enumerate(results):
                if ways and all(i < len(way) and way[i] in self.known for way in ways):
                    self.known.add(result)
            return
        loop = region["loop"]
        self._emit(f"if t{loop} > _TURNS:")
        self._emit(f"    n[:] = [a + (b - a) * t{loop} / _TURNS for a, b in zip(s{loop}, n)]")
        for result, name in zip(results, region["carried"], strict=False):
            self.pointers[result] = self.pointers.get(name, ())
            if name in self.known:
                self._emit(f"{python_name(result)} = {python_name(name)}")
                self.known.add(result)

    def _label(self, line: str) -> None:
        found = re.match(r"\^bb(\d+)", line)
        assert found is not None
        if self.open:
            return
        self.depth = 1
        self._emit(f"if bb == {found[1]}:")
        self.depth = 2
        self._emit("pass")

    def _branch(self, line: str) -> None:
        targets = re.findall(r"\^bb(\d+)", line)
        names = self._values(line)
        if len(targets) == 1:
            self._emit(f"bb = {targets[0]}")
        elif names and names[0] in self.known:
            self._emit(f"bb = {targets[0]} if {python_name(names[0])} else {targets[1]}")
        else:
            self.unknown.append("which way a branch goes depends on loaded values")
            self._emit(f"bb = {targets[1]}")
