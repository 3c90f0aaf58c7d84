"""What is read off machine code, on text that has each of its traps."""

import pytest

from tritorch.bench import machine_code

pytestmark = pytest.mark.reference


def sass(*lines):
    """The text of cuobjdump, one instruction each 16 bytes."""
    numbered = (f"        /*{16 * n:04x}*/   {line} ;  /* 0x0 */" for n, line in enumerate(lines))
    return "\n".join(("\t\tFunction : f", *numbered))


LOOP = sass(
    "MOV R1, c[0x0][0x28]",
    "LDG.E.LTC128B.64 R2, [R4]",
    # the wait is far away, and its way back is no loop
    "@!P0 BRA 0x110",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8].tnspB, R24",
    "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",
    "@UP3 UTMALDG.3D [UR8], [UR16]",
    "IADD3 R3, R3, 0x1, RZ",
    # what happens once in a while
    "@P1 BRA 0xe0",
    "F2FP.BF16.F32.PACK_AB R5, R6, R7",
    "STSM.16.M88.4 [R8], R4",
    "FENCE.VIEW.ASYNC.S",
    "UTMASTG.3D [UR8], [UR10]",
    "UTMACMDFLUSH",
    "ISETP.GE.AND P2, PT, R3, R9, PT",
    "@!P2 BRA 0x20",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R155+URZ], R152",
    "@!P0 BRA 0x110",
    "BRA 0x30",
    "BRA 0x140",
)


def test_instructions_are_read_with_their_targets():
    code = machine_code.read(LOOP)
    assert len(code) == 21
    assert code[2].conditional
    assert code[2].target == 17
    assert code[15].target == 2
    assert not code[19].conditional
    assert code[16].ends


def test_kinds_and_shapes():
    code = machine_code.read(LOOP)
    kinds = machine_code.kinds(code)
    assert kinds["tensor core"] == 2
    assert kinds["TMA load"] == kinds["TMA store"] == kinds["shared store"] == 1
    assert kinds["global load"] == 1
    assert sum(kinds.values()) == len(code)
    assert machine_code.shapes(code) == {"HGMMA 64x256x16 bf16": 2}
    assert machine_code.sizes_of("HGMMA 64x256x16 bf16") == (64, 256, 16)


def test_a_hint_to_the_cache_is_no_width():
    assert machine_code.widths(machine_code.read(LOOP)) == {"global load": {"8": 1}}


def test_the_hot_loop_is_the_one_with_products_by_its_shortest_way():
    code = machine_code.read(LOOP)
    (loop,) = machine_code.loops(code)
    assert machine_code.hot_loop(code) == loop
    # with the wait, which is a part of the loop, and the store
    assert set(loop.body) == {*range(2, 16), 17, 18, 19}
    assert loop.path == (2, 3, 4, 5, 6, 7, 8, 14, 15)


@pytest.mark.parametrize(
    ("line", "kind", "width"),
    [
        ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", "async copy", 16),
        ("LDG.E.U16.CONSTANT R1, [R2.64]", "global load", 2),
        ("LDG.E.U8 R1, [R2.64]", "global load", 1),
        ("STG.E [R2.64], R1", "global store", 4),
        ("LDSM.16.MT88.2 R1, [R2]", "matrix load", 8),
        ("LDS.64 R1, [R2]", "shared load", 8),
        ("STL.64 [R1], R2", "local memory", 8),
        ("ATOMG.E.ADD.F32 PT, R1, [R2.64], R3", "atomic", 4),
        ("FFMA R1, R2, R3, R4", "float", 0),
        ("DMMA.884 R1, R2, R3, R4", "tensor core", 0),
        ("MUFU.EX2 R1, R2", "special function", 0),
        ("BAR.SYNC 0x0", "barrier", 0),
        ("IMAD.MOV.U32 R1, RZ, RZ, R2", "integer", 0),
    ],
)
def test_an_instruction(line, kind, width):
    (one,) = machine_code.read(sass(line))
    assert (one.kind, one.width) == (kind, width)


@pytest.mark.parametrize(
    ("opcode", "shape"),
    [
        ("HMMA.16816.F32.BF16", "HMMA 16x8x16 bf16"),
        ("HMMA.1688.F32.TF32", "HMMA 16x8x8 tf32"),
        ("DMMA.884", "DMMA 8x8x4 f64"),
        ("HGMMA.64x128x16.F32", "HGMMA 64x128x16 f16"),
    ],
)
def test_shapes_of_products(opcode, shape):
    assert machine_code.shapes(machine_code.read(sass(f"{opcode} R1, R2"))) == {shape: 1}


AMD = """
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tds_write_b128 v5, v[0:3]
\ts_barrier
\tds_read2st64_b64 v[0:3], v98 offset1:16
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
\ts_cbranch_scc1 .LBB0_1
\tglobal_store_short v[0:1], v2, off
\ts_endpgm
"""


def test_amd():
    code = machine_code.read(AMD)
    loop = machine_code.hot_loop(code)
    assert loop is not None
    assert loop.path == tuple(range(1, 7))
    assert machine_code.shapes(code) == {"32x32x8 bf16": 1}
    assert machine_code.widths(code) == {"global load": {"16": 1}, "global store": {"2": 1}}
    assert [one.width for one in code if one.kind == "shared load"] == [16]


def test_code_without_a_loop_has_none():
    assert machine_code.hot_loop(machine_code.read(sass("MOV R1, R2", "EXIT"))) is None
    assert machine_code.hot_loop([]) is None
