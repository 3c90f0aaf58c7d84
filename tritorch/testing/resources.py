"""What a compiled kernel takes on its device, read off its machine code."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes on the device.

    `registers`: 32-bit registers per thread.  `stack`: bytes of local memory per thread, which is
    where spilled registers live.  `arrays`: bytes of it for what is indexed at run time, as
    registers cannot be: float32's `tl.cos` does.  `shared`: bytes of shared memory per block.
    `spilled`: registers that the compiler says it spilled, which CUDA's does not say: None.  The
    rest is read off the machine code, which is disassembled when first asked for.
    """

    registers: int
    stack: int
    arrays: int
    shared: int
    num_warps: int
    spilled: int | None = field(repr=False, compare=False)
    _code: bytes | str = field(repr=False, compare=False)

    @property
    def code(self) -> str:
        """The machine code as text: SASS, or AMD's assembly."""
        return self._code if isinstance(self._code, str) else _disassembly(self._code)

    @property
    def opcodes(self) -> Counter[str]:
        """How often each instruction occurs, by its name with modifiers (`LDG.E.128`)."""
        return _opcodes(self._code)

    def count(self, *names: str) -> int:
        """Instructions whose opcode without modifiers is one of `names`."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".")[0] in names)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of local memory per thread in which spilled registers live."""
        return max(0, self.stack - self.arrays)

    @property
    def spills(self) -> int:
        """CUDA: instructions that access local memory (LDL, STL), those of arrays too if registers
        are spilled beside them; AMD: registers spilled.
        """
        if self.spilled is not None:
            return self.spilled
        return self.count("LDL", "STL") if self.spilled_bytes else 0

    @property
    def tensor_core_instructions(self) -> int:
        """HMMA, HGMMA, UTCHMMA, QGMMA, DMMA and the like; mfma on AMD."""
        return sum(n for opcode, n in self.opcodes.items() if _TENSOR_CORE.match(opcode))

    @property
    def serialized(self) -> bool:
        """Hopper: every product is waited for before the next one is issued.

        The compiler does so, and says it where Triton does not show it, if other instructions write
        the sums between the first product and the last: those of a loop that may not run at all.
        """
        products = "" if isinstance(self._code, str) else _products(self._code)
        return products.count("p") > 1 and products == "pw" * products.count("p")

    @property
    def wide_loads(self) -> int:
        """Global loads of 128 bits or more per thread, asynchronous copies included."""
        return sum(n for opcode, n in self.opcodes.items() if _WIDE_LOAD.match(opcode))

    @property
    def wide_stores(self) -> int:
        """Global stores of 128 bits or more per thread."""
        return sum(n for opcode, n in self.opcodes.items() if _WIDE_STORE.match(opcode))


_TENSOR_CORE = re.compile(r"[A-Z]+MMA(\.|$)|v_(s?mfma|wmma|smfmac)")
_WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\..*(128|256)|(global|buffer)_load_(dwordx4|b128)")
_WIDE_STORE = re.compile(r"STG\..*(128|256)|(global|buffer)_store_(dwordx4|b128)")
# PTX declares what the source keeps in local memory, and has every register: none is spilled yet
_LOCAL_ARRAY = re.compile(r"^\s*\.local\s[^\[;]*\[(\d+)\];", re.MULTILINE)


def of_compiled(compiled: Any) -> Resources:
    """The resources of Triton's CompiledKernel."""
    metadata = compiled.metadata
    if metadata.target.backend == "cuda":
        cubin = compiled.asm["cubin"]
        registers, stack = usage(cubin)
        arrays = sum(int(size) for size in _LOCAL_ARRAY.findall(compiled.asm["ptx"]))
        return Resources(
            registers=registers,
            stack=stack,
            # as the stack is rounded
            arrays=-(-arrays // 8) * 8,
            shared=metadata.shared,
            num_warps=metadata.num_warps,
            spilled=None,
            _code=cubin,
        )
    text = compiled.asm["amdgcn"]

    def directive(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"dry.resources: {metadata.name} has no .{name} in its assembly")
        return int(found[1])

    stack = directive("private_segment_fixed_size")
    spilled = directive("vgpr_spill_count") + directive("sgpr_spill_count")
    return Resources(
        registers=directive("vgpr_count"),
        stack=stack,
        arrays=0 if spilled else stack,
        shared=metadata.shared,
        num_warps=metadata.num_warps,
        spilled=spilled,
        _code=text,
    )


@functools.cache
def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread."""
    text = _cuobjdump(cubin, "-res-usage")
    # a kernel and the functions it does not inline each have a line
    used = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    if not used:
        raise RuntimeError(f"dry: cuobjdump printed no resource usage: {text}")
    return max(int(r) for r, _ in used), max(int(s) for _, s in used)


@functools.cache
def _opcodes(code: bytes | str) -> Counter[str]:
    if isinstance(code, str):
        return Counter(re.findall(r"^\t([a-z]\w*_\w+)", code, re.MULTILINE))
    text = _disassembly(code)
    return Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text))


@functools.cache
def _products(cubin: bytes) -> str:
    """The machine code's products of warp groups, p, and its waits until none is left, w."""
    found = re.findall(r"(HGMMA)|WARPGROUP\.DEPBAR\.LE gsb0, 0x0", _disassembly(cubin))
    return "".join("p" if product else "w" for product in found)


@functools.cache
def _disassembly(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
