"""Reads machine code, SASS or AMD's: which instructions, how wide, in which loop.

What a processor does most of the time is the hot loop: the innermost one that multiplies matrices
or, where none does, that moves most bytes.  An instruction counts as often as the text has it; how
often a loop turns is not in it (`traffic.py` knows).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# what an instruction does, by the first pattern that its name begins with
_KINDS = (
    ("tensor core", r"(?!FMMA\b)[A-Z]+MMA\b|v_s?mfma|v_wmma|v_smfmac"),
    ("TMA load", r"UTMALDG|UBLKCP"),
    ("TMA store", r"UTMASTG|UTMAREDG"),
    ("async copy", r"LDGSTS|(global|buffer)_load_lds|buffer_load_\w+_lds"),
    ("global load", r"LDG\b|(global|buffer|flat)_load"),
    ("global store", r"STG\b|(global|buffer|flat)_store"),
    ("atomic", r"ATOM|RED\b|(global|buffer|flat)_atomic"),
    ("local memory", r"LDL|STL|scratch_"),
    ("matrix load", r"LDSM|ds_read_b64_tr"),
    ("shared load", r"LDS\b|LDTM|ds_read|ds_load|ds_bpermute|ds_permute"),
    ("shared store", r"STS|STTM|ds_write|ds_store"),
    ("barrier", r"BAR|SYNCS|WARPGROUP|DEPBAR|LDGDEPBAR|WARPSYNC|MEMBAR|FENCE|s_barrier|s_waitcnt"),
    ("special function", r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_"),
    ("conversion", r"[FI]2[FI]|F2FP|I2FP|v_cvt"),
    ("shuffle", r"SHFL|PRMT|MOVM|v_perm|v_\w*dpp|v_readlane|v_readfirstlane"),
    ("float64", r"D(ADD|MUL|FMA|SETP|MNMX)|v_\w+_f64"),
    (
        "float",
        r"F(ADD|MUL|FMA|MNMX|SEL|SETP|CHK|SWZADD)|H(ADD|MUL|FMA|MNMX|SETP)2|v_\w+_(p?k?b?f(16|32)|bf16)",
    ),
    ("control", r"BRA|BRX|BSSY|BSYNC|BREAK|EXIT|CALL|RET|JMP|YIELD|NOP|s_c?branch|s_endpgm|s_nop"),
)
_KIND = re.compile("|".join(f"(?P<k{i}>{pattern})" for i, (_, pattern) in enumerate(_KINDS)))
# all else: addresses, comparisons, moves
INTEGER = "integer"
KINDS = (*(name for name, _ in _KINDS), INTEGER)
TENSOR_CORE = "tensor core"
_GLOBAL = ("global load", "global store", "async copy", "atomic")
_SHARED = ("shared load", "shared store", "matrix load")

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_AMD = re.compile(r"^(?:(\.L\w+):|\t([a-z]\w*_\w+)(?:[ \t]+([^;\n]*))?)", re.MULTILINE)
_ENDS = re.compile(r"EXIT|RET|BRX|JMX|s_endpgm|s_setpc")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `opcode` with its modifiers, `target` the number of the one it may go to."""

    opcode: str
    operands: str
    conditional: bool
    target: int | None = None

    @property
    def kind(self) -> str:
        return _kind(self.opcode)

    @property
    def width(self) -> int:
        """Bytes that a thread moves to or from memory; 0 where it does not, or a whole tile."""
        return _width(self.opcode) if self.kind in (*_GLOBAL, *_SHARED, "local memory") else 0

    @property
    def branches(self) -> bool:
        return self.target is not None

    @property
    def ends(self) -> bool:
        """Whether nothing after it runs."""
        return not self.conditional and _ENDS.match(self.opcode) is not None


@functools.cache
def _kind(opcode: str) -> str:
    found = _KIND.match(opcode)
    return INTEGER if found is None else _KINDS[int(str(found.lastgroup)[1:])][0]


@functools.cache
def _width(opcode: str) -> int:
    if opcode[0].islower():
        # two reads in one instruction are ds_read2
        twice = 2 if re.match(r"ds_(read|write|load|store)2|ds_\w+_2addr", opcode) else 1
        if (found := re.search(r"_dwordx(\d)", opcode)) is not None:
            return 4 * int(found[1])
        if (found := re.search(r"_[bui](\d+)", opcode)) is not None:
            return twice * int(found[1]) // 8
        named = {
            "dword": 4,
            "ushort": 2,
            "sshort": 2,
            "short": 2,
            "ubyte": 1,
            "sbyte": 1,
            "byte": 1,
        }
        return next((size for name, size in named.items() if f"_{name}" in opcode), 4)
    if opcode.startswith(("LDSM", "STSM")):
        # an 8 by 8 matrix of 16 bits is a word of each thread
        return 4 * int(opcode[-1]) if opcode[-1].isdigit() else 4
    for modifier in reversed(opcode.split(".")[1:]):
        if (found := re.fullmatch(r"[US]?(8|16|32|64|128|256)", modifier)) is not None:
            return int(found[1]) // 8
    return 4


def read(text: str) -> list[Instruction]:
    """The instructions of a kernel in the order of the text, of SASS or AMD's assembly."""
    return _read_sass(text) if "/*0000*/" in text else _read_amd(text)


def _read_sass(text: str) -> list[Instruction]:
    read: list[Instruction] = []
    # functions that are not inlined have addresses of their own
    for function in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:] or [text]:
        found = _SASS.findall(function)
        numbers = {int(address, 16): len(read) + i for i, (address, *_) in enumerate(found)}
        for _, predicate, opcode, operands in found:
            target = None
            if opcode.startswith("BRA") and (at := re.search(r"0x([0-9a-f]+)\s*$", operands)):
                target = numbers.get(int(at[1], 16))
            conditional = bool(predicate) or bool(target is not None and "P" in operands)
            read.append(Instruction(opcode, operands.strip(), conditional, target))
    return read


def _read_amd(text: str) -> list[Instruction]:
    found = [match.groups() for match in _AMD.finditer(text)]
    numbers: dict[str, int] = {}
    count = 0
    for label, opcode, _ in found:
        if label:
            numbers[label] = count
        count += bool(opcode)
    return [
        Instruction(
            opcode,
            (operands or "").strip(),
            opcode.startswith("s_cbranch"),
            numbers.get((operands or "").strip()) if "branch" in opcode else None,
        )
        for _, opcode, operands in found
        if opcode
    ]


@dataclass(frozen=True)
class Loop:
    """A loop: the numbers of its instructions, and those that every turn runs.

    Where a turn can go several ways, it goes the shortest that multiplies most: what happens once
    in many turns, storing a tile, is left out.
    """

    body: tuple[int, ...]
    path: tuple[int, ...]


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops with more than a wait in them, in the order of the text."""
    if not code:
        return []
    starts = sorted(
        {0}
        | {i.target for i in code if i.target is not None and i.target < len(code)}
        | {n + 1 for n, i in enumerate(code[:-1]) if i.branches or i.ends}
    )
    ends = [*starts[1:], len(code)]
    block_of = {start: number for number, start in enumerate(starts)}
    after: list[list[int]] = []
    for end in ends:
        last = code[end - 1]
        following = [] if last.target is None else [block_of[last.target]]
        falls = not last.ends and not (last.branches and not last.conditional)
        if falls and end < len(code):
            following.append(block_of[end])
        after.append(following)
    found: dict[int, set[int]] = {}
    before = _reversed(after)
    dominators = _dominators(after, before)
    for block, following in enumerate(after):
        for header in following:
            if block in dominators and header in dominators[block]:
                body = _natural(before, header, block)
                found[header] = found.get(header, set()) | body
    innermost = [
        (header, body)
        for header, body in found.items()
        if not any(other < body and _matters(code, starts, ends, other) for other in found.values())
        and _matters(code, starts, ends, body)
    ]
    result = []
    for header, body in sorted(innermost):
        path = _path(code, starts, ends, after, header, body)
        inside = [n for block in sorted(body) for n in range(starts[block], ends[block])]
        result.append(Loop(tuple(inside), tuple(path)))
    return result


def _matters(
    code: Sequence[Instruction], starts: list[int], ends: list[int], body: set[int]
) -> bool:
    """Whether a loop does anything but wait for a barrier."""
    return sum(ends[block] - starts[block] for block in body) > 4 and any(
        code[n].kind not in ("barrier", "control")
        for block in body
        for n in range(starts[block], ends[block])
    )


def _reversed(after: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in after]
    for block, following in enumerate(after):
        for other in following:
            before[other].append(block)
    return before


def _dominators(after: list[list[int]], before: list[list[int]]) -> dict[int, set[int]]:
    """Of every block that can be reached, the blocks that all ways to it pass."""
    reached, stack = {0}, [0]
    while stack:
        for other in after[stack.pop()]:
            if other not in reached:
                reached.add(other)
                stack.append(other)
    dominators = {block: set(reached) for block in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            ways = [dominators[other] for other in before[block] if other in reached]
            new = set.intersection(*ways) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _natural(before: list[list[int]], header: int, block: int) -> set[int]:
    body, stack = {header, block}, [block]
    while stack:
        one = stack.pop()
        if one == header:
            continue
        for other in before[one]:
            if other not in body:
                body.add(other)
                stack.append(other)
    return body


def _path(
    code: Sequence[Instruction],
    starts: list[int],
    ends: list[int],
    after: list[list[int]],
    header: int,
    body: set[int],
) -> list[int]:
    """The instructions of the shortest turn among those with most products and copies."""

    def cost(block: int) -> tuple[int, int]:
        inside = [code[n].kind for n in range(starts[block], ends[block])]
        return -sum(kind == TENSOR_CORE for kind in inside), len(inside)

    best: dict[int, tuple[tuple[int, int], list[int]]] = {header: (cost(header), [header])}
    turns = []
    # forward ways only, in the order of the text
    for block in sorted(body, key=lambda b: (b != header, b)):
        if block not in best:
            continue
        (products, count), way = best[block]
        for other in after[block]:
            if other == header:
                turns.append(best[block])
            elif other in body and other > block:
                added = cost(other)
                candidate = (products + added[0], count + added[1]), [*way, other]
                if other not in best or candidate[0] < best[other][0]:
                    best[other] = candidate
    if not turns:
        return [n for block in sorted(body) for n in range(starts[block], ends[block])]
    return [n for block in min(turns)[1] for n in range(starts[block], ends[block])]


def hot_loop(code: Sequence[Instruction]) -> Loop | None:
    """The loop with most products or, where there is none, with most bytes; None without loops."""

    def weight(loop: Loop) -> tuple[int, int, int]:
        inside = [code[n] for n in loop.body]
        products = sum(one.kind == TENSOR_CORE for one in inside)
        return products, sum(moved(inside).values()), len(inside)

    return max(loops(code), key=weight, default=None)


def kinds(code: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each kind, in the order of `KINDS`, without those of none."""
    counts = Counter(one.kind for one in code)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def widths(code: Sequence[Instruction]) -> dict[str, dict[str, int]]:
    """Accesses to global memory by what they are and how many bytes a thread moves at once."""
    found: dict[str, Counter[int]] = {}
    for one in code:
        if one.kind in _GLOBAL:
            found.setdefault(one.kind, Counter())[one.width] += 1
    return {
        kind: {str(width): found[kind][width] for width in sorted(found[kind])}
        for kind in _GLOBAL
        if kind in found
    }


def moved(code: Sequence[Instruction]) -> Counter[str]:
    """Bytes that one thread moves to and from global memory, by kind, tiles of TMA not counted."""
    found: Counter[str] = Counter()
    for one in code:
        if one.kind in _GLOBAL:
            found[one.kind] += one.width
    return found


def shapes(code: Sequence[Instruction]) -> dict[str, int]:
    """The matrix instructions by what they multiply: "64x256x16 bf16"."""
    found = Counter(_shape(one.opcode) for one in code if one.kind == TENSOR_CORE)
    return dict(sorted(found.items()))


@functools.cache
def _shape(opcode: str) -> str:
    if (found := re.match(r"v_s?m?fma[a-z]*_\w+?_(\d+x\d+x\d+)_?(\w+)", opcode)) is not None:
        return f"{found[1]} {found[2]}"
    name, *modifiers = opcode.split(".")
    size = next((m for m in modifiers if re.fullmatch(r"\d+x\d+x\d+|\d{3,5}", m)), "")
    known = {
        "16816": "16x8x16",
        "1688": "16x8x8",
        "884": "8x8x4",
        "16832": "16x8x32",
        "1684": "16x8x4",
    }
    # half products leave their operands' type unsaid
    types = [m for m in modifiers if m in ("BF16", "TF32", "E4M3", "E5M2", "S8", "U8")]
    kind = (
        types[0].lower() if types else {"DMMA": "f64", "HMMA": "f16", "HGMMA": "f16"}.get(name, "")
    )
    return " ".join(filter(None, (name, known.get(size, size), kind)))


def sizes_of(shape: str) -> tuple[int, int, int] | None:
    """M, N and K of a shape's name, None where the instruction does not say them."""
    found = re.search(r"(\d+)x(\d+)x(\d+)", shape)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))
