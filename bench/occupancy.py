"""How many blocks of a kernel a multiprocessor holds at once, and what keeps it from more.

Sources: the table "Technical Specifications per Compute Capability" of the CUDA programming guide;
for AMD the CDNA 3 instruction set reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from tritorch.testing import dry
from tritorch.testing.resources import Resources


@dataclass(frozen=True)
class Occupancy:
    """`blocks` on one multiprocessor, `warps` of them, of `most` that it could hold.

    `limit` names what there is no more of: registers, shared memory, warps or blocks.  Zero blocks
    do not launch.
    """

    blocks: int
    warps: int
    most: int
    limit: str


@dataclass(frozen=True)
class _Limits:
    """Of one multiprocessor: 32-bit registers, bytes of shared memory, warps, blocks.

    `per_block`: bytes of shared memory that every block takes besides its own.
    """

    registers: int
    shared: int
    warps: int
    blocks: int
    per_block: int


_LIMITS = {
    "sm_80": _Limits(65536, 164 * 1024, 64, 32, 1024),
    "sm_90": _Limits(65536, 228 * 1024, 64, 32, 1024),
    "sm_100": _Limits(65536, 228 * 1024, 64, 32, 1024),
    # four units of 512 registers for each of 64 lanes
    "gfx942": _Limits(4 * 512 * 64, 64 * 1024, 32, 32, 0),
}


def occupancy(used: Resources, target: str) -> Occupancy:
    """The occupancy of a kernel with these resources on a target of `dry.TARGETS`."""
    limits, gpu = _LIMITS[target], dry.TARGETS[target]
    # registers are given to a warp in pieces: 256, and on AMD eight for each lane
    piece = 256 if gpu.backend == "cuda" else 8 * gpu.warp_size
    per_warp = _up(max(used.registers, 1) * gpu.warp_size, piece)
    # warps live on one of four units each, which has a quarter of the registers
    warps = 4 * (limits.registers // 4 // per_warp)
    possible = {
        "registers": warps // used.num_warps,
        "shared memory": limits.shared // max(_up(used.shared, 128) + limits.per_block, 1),
        "warps": limits.warps // used.num_warps,
        "blocks": limits.blocks,
    }
    if not used.shared and not limits.per_block:
        del possible["shared memory"]
    if used.registers > gpu.registers:
        possible["registers"] = 0
    limit = min(possible, key=lambda name: possible[name])
    blocks = possible[limit]
    return Occupancy(blocks, blocks * used.num_warps, limits.warps, limit)


def _up(number: int, piece: int) -> int:
    return -(-number // piece) * piece
