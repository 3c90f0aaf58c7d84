"""What a check found: one `Finding` per defect, with the place in the kernel where it shows."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One defect: what rule is broken, where, and on which input.

    `kind`: the rule, in the words of `KINDS`.  `message`: one sentence with the numbers.  `kernel`
    and `argument`: the names that the kernel's source uses.  `file`, `line`, `source`: the
    statement.  `program`: its `tl.program_id` on the three axes.  `lanes`: up to four offending
    indices into the tile (or into the output, for a wrong value).  `count`: how many lanes, or
    elements.  `case`: the name of the input that shows it; empty outside a battery.
    """

    kind: str
    message: str
    kernel: str = ""
    argument: str = ""
    file: str = ""
    line: int = 0
    source: str = ""
    program: tuple[int, int, int] | None = None
    lanes: tuple[tuple[int, ...], ...] = ()
    count: int = 0
    case: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Finding: expects one of {', '.join(KINDS)}, received {self.kind!r}")

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """Equal for what one defect causes again: with other programs, lanes or inputs."""
        return self.kind, self.kernel, self.argument, self.file, self.line

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return dict(json.loads(json.dumps(asdict(self))))

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Finding:
        """The finding that `to_json` gave the fields of."""
        program = fields["program"]
        return Finding(
            **fields
            | {
                "program": None if program is None else tuple(program),
                "lanes": tuple(tuple(lane) for lane in fields["lanes"]),
            }
        )


# what can be found, and what it means
KINDS: dict[str, str] = {
    "values": "an output differs from the float64 truth by more than rounding",
    "gradients": "a gradient differs from the float64 truth by more than rounding",
    "exactness": "an integer-valued problem has no exact answer: an index or a mask is wrong",
    "special values": "NaN, infinity or a sign of zero comes out where torch has none",
    "shape": "an output has another shape, dtype or number than the reference's",
    "mutation": "the call wrote into an input",
    "history": "the same call gives another result after other calls",
    "repeatability": "the same call gives other bits when it is repeated",
    "configuration": "one autotune configuration gives a wrong result",
    "out-of-bounds read": "a lane loads from outside its tensor",
    "out-of-bounds write": "a lane stores outside its tensor",
    "out-of-bounds atomic": "a lane updates memory outside its tensor",
    "unwritten output": "an element of a fresh output is never stored to",
    "uninitialised read": "a lane loads an element that nothing has written",
    "masked lane": "a lane that was masked off, without `other`, changes the result",
    "int32 overflow": "an offset leaves the range of 32-bit integers",
    "race": "two programs touch one element, at least one writes, and nothing orders them",
    "program order": "the result depends on the order in which programs run",
    "tile": "a tile that GPUs do not take",
    "promise": "tl.multiple_of or its like promises what is not so, and a result relies on it",
    "resources": "a configuration needs more than the GPU has, or spills",
    "tf32": "float32 products are TF32's where the contract is float32",
    "compilation": "the kernel does not compile",
    "library": "torch.library's own checks fail",
    "cuda graph": "a captured graph replays to another result",
    "stream": "the work does not run on the current stream",
    "guard band": "memory beside a tensor was read or written",
    "error": "the call raises where the reference does not",
    "crash": "the process died",
    "hang": "the call did not end in time",
}
