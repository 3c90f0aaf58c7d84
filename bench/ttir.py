"""Reads a line of Triton's own language: its names, types and sizes, and arithmetic as Python."""

from __future__ import annotations

import math
import re

_TYPE = re.compile(r"(?:(?P<dims>(?:\d+x)+))?(?P<kind>bf16|f8\w+|f\d+|i\d+|!tt\.ptr<[^>]*>)")

# of integers, by the operation; a program has `div` and `rem` as _div and _rem
PYTHON = {
    "addi": "{0} + {1}",
    "subi": "{0} - {1}",
    "muli": "{0} * {1}",
    "divsi": "_div({0}, {1})",
    "divui": "_div({0}, {1})",
    "remsi": "_rem({0}, {1})",
    "remui": "_rem({0}, {1})",
    "ceildivsi": "-_div(-{0}, {1})",
    "minsi": "min({0}, {1})",
    "minui": "min({0}, {1})",
    "maxsi": "max({0}, {1})",
    "maxui": "max({0}, {1})",
    "andi": "{0} & {1}",
    "ori": "{0} | {1}",
    "xori": "{0} ^ {1}",
    "shli": "{0} << {1}",
    "shrsi": "{0} >> {1}",
    "shrui": "{0} >> {1}",
    "select": "({1} if {0} else {2})",
    "extsi": "{0}",
    "extui": "int({0})",
    "trunci": "{0}",
    "index_cast": "{0}",
}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def div(a: int, b: int) -> int:
    """Towards zero, as the device divides."""
    return int(a / b) if abs(a) < 1 << 52 and b else (a // b if b else 0)


def rem(a: int, b: int) -> int:
    return a - b * div(a, b)


def results_of(line: str) -> list[str]:
    """The names of a region's results: %a:2 is %a#0 and %a#1."""
    left = line.partition(" = scf.")[0] if " = scf." in line else ""
    found = re.match(r"(%\w+)(?::(\d+))?$", left)
    if found is None:
        return []
    return [f"{found[1]}#{i}" for i in range(int(found[2]))] if found[2] else [found[1]]


def argument_of(line: str, name: str) -> str:
    """The parameter's own name, from its location."""
    found = re.search(re.escape(name) + r": [^%]*?loc\(\"([^\"]+)\"", line)
    return name[1:] if found is None else found[1]


def python_name(name: str) -> str:
    return "v_" + name[1:].replace("#", "_r")


def product(operation: str) -> tuple[int, str]:
    """Floating-point operations of a product of tiles, and its operands' type."""
    # each operand may bring its scales, behind it
    left, right = (_TYPE.search(t) for t in operation.rpartition(" : ")[2].split(" * ")[:2])
    assert left is not None
    assert right is not None
    kind = left["kind"]
    flops = 2 * math.prod(_dims(left)) * _dims(right)[-1]
    precision = re.search(r"inputPrecision = (\w+)", operation)
    if kind == "f32":
        kind = "tf32" if precision is not None and precision[1] != "ieee" else "f32"
    return flops, kind


def bytes_of(operation: str) -> int:
    """Bytes of the largest tile that is loaded or stored."""
    types = operation.rpartition(" : ")[2] if " : " in operation else operation
    sizes = [_size(found) for found in _TYPE.finditer(types.replace("tensor<", ""))]
    return max(sizes, default=0)


def _dims(found: re.Match[str]) -> list[int]:
    return [int(size) for size in (found["dims"] or "").split("x") if size]


def _size(found: re.Match[str]) -> int:
    kind = found["kind"]
    if kind.startswith("!tt.ptr<"):
        kind = kind[len("!tt.ptr<") : -1].partition(",")[0]
    bits = re.search(r"\d+", kind)
    width = 64 if kind.startswith("!") or bits is None else int(bits[0])
    return math.prod(_dims(found)) * max(1, width // 8)
