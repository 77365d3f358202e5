"""`python -m benchmarks gpu`: how machine code is followed, what a model makes of it, what PyTorch's ops move, and what
is printed. Compiled kernels are in compiled/test_gpu_figures.py."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import chips, sass, traffic
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, SHAPES, TRAINING, Case, Shape
from benchmarks.chips import ARCHS, CHIPS, LAUNCH_SECONDS, Chip, Work, occupancy
from benchmarks.contestants import CONTESTANTS
from benchmarks.offline import Binary
from benchmarks.traffic import Traffic

pytest.importorskip("triton")
from benchmarks import gpu, gpu_figures
from benchmarks.gpu_figures import Held, Kernel

# --- machine code -------------------------------------------------------------------------------------------


def program(sass_text: str, *kinds: str, num_warps: int = 1) -> Binary:
    """A binary for sm_90 of this code; parameters of these kinds start at c[0x0][0x210]."""
    binary = Binary("sm_90", "k", num_warps, 32, 0, 0, 0, {}, tuple(enumerate(kinds)))
    lines = [line.strip() for line in sass_text.strip().splitlines()]
    code = [line if line.endswith(":") else f"/*{n:04x}*/ {line} ;" for n, line in enumerate(lines)]
    vars(binary)["sass"] = "\n".join(["", ".text.k:", *code, ""])
    return binary


def launch(*args: Any, grid: tuple[int, ...] = (1,)) -> Any:
    return SimpleNamespace(kernel=None, grid=grid, args=args, options={})


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


WALK = """
    S2UR UR4, SR_CTAID.X
    LDC R6, c[0x0][0x220]
    S2R R0, SR_TID.X
    ISETP.LE.AND P0, PT, R6, UR4, PT
    @P0 EXIT
    .L_next:
    MOV R2, UR4
    LEA R2, R2, R0, 0x5
    IMAD.WIDE R4, R2, 0x4, RZ
    IADD3 R8, P1, R4, c[0x0][0x210], RZ
    IADD3.X R9, R5, c[0x0][0x214], RZ, P1, !PT
    IADD3 R10, P1, R4, c[0x0][0x218], RZ
    IADD3.X R11, R5, c[0x0][0x21c], RZ, P1, !PT
    LDG.E R3, desc[UR8][R8.64]
    MUFU.EX2 R3, R3
    ULDC UR5, c[0x0][0xc]
    STG.E desc[UR8][R10.64], R3
    UIADD3 UR4, UR4, UR5, URZ
    ISETP.GT.AND P0, PT, R6, UR4, PT
    @P0 BRA `(.L_next)
    EXIT
"""


@pytest.mark.parametrize(
    ("rows", "grid", "number", "trips"), [(10, 3, 0, 4), (10, 3, 2, 3), (2, 3, 2, 0), (6, 2, 1, 3)]
)
def test_a_loop_runs_as_often_as_the_launch_says(rows: int, grid: int, number: int, trips: int) -> None:
    """Program `number` walks over every grid-th row of 32 numbers."""
    x, out = meta(rows, 32), meta(rows, 32)
    trace = sass.follow(program(WALK, "*fp32", "*fp32", "i32"), launch(x, out, rows, grid=(grid,)), number)
    assert trace.issued["MUFU.EX2"] == trace.issued["BRA"] == trips
    assert trace.issued["EXIT"] == (2 if trips else 1)
    assert trace.issued.total() == 6 + 14 * trips - (0 if trips else 1)
    assert (trace.read[0], trace.written[1]) == (128 * trips, 128 * trips)
    assert trace.sectors == 2 * 4 * trips and trace.unknown == 0


def test_all_warps_count() -> None:
    binary = program(WALK, "*fp32", "*fp32", "i32", num_warps=2)
    trace = sass.follow(binary, launch(meta(2, 32), meta(2, 32), 1))
    assert trace.issued["STG.E"] == 2 and trace.written[1] == 256


def test_memory_that_arguments_share_counts_once() -> None:
    x = meta(4, 32)
    trace = sass.follow(program(WALK, "*fp32", "*fp32", "i32"), launch(x, x, 4))
    assert (trace.read, trace.written) == ({0: 512}, {0: 512})


def test_differences_and_sums_of_traces() -> None:
    binary, x = program(WALK, "*fp32", "*fp32", "i32"), meta(9, 32)
    two, five, three = (sass.follow(binary, launch(x, x, rows)) for rows in (2, 5, 3))
    assert (five - two).issued == {name: 3 * count for name, count in (three - two).issued.items()}
    assert (five - two).written == {0: 3 * 128} and (five - five).issued == {}
    both = two + three
    assert both.issued["MUFU.EX2"] == 5 and both.issued["EXIT"] == 4 and both.written == {0: 5 * 128}


def checked(body: str, *kinds: str, args: Sequence[Any] = ()) -> bool:
    """Whether P0 holds in every lane after `body`."""
    code = f"{body}\n@!P0 BRA `(.L_not)\nMUFU.RCP R0, R0\nEXIT\n.L_not:\nMUFU.SIN R0, R0\nEXIT"
    trace = sass.follow(program(code, *kinds), launch(*args))
    assert not trace.branches
    return trace.issued["MUFU.SIN"] == 0


word = st.integers(0, 2**32 - 1)
wide = st.integers(0, 2**64 - 1)
AT = "c[0x0][0x210]", "c[0x0][0x214]", "c[0x0][0x218]", "c[0x0][0x21c]"


def holds(body: str, result: int, *arguments: int, register: str = "R8") -> bool:
    """Whether `register` and, for a wide result, the one after it hold `result` after the body."""
    number = int(register[1:])
    code = f"{body}\nISETP.EQ.U32.AND P0, PT, {register}, {result & 0xFFFFFFFF:#x}, PT"
    if result >> 32 or "R9" in body:
        code += f"\nISETP.EQ.U32.AND P0, PT, R{number + 1}, {result >> 32 & 0xFFFFFFFF:#x}, P0"
    return checked(code, *["i64"] * len(arguments), args=arguments)


@given(wide, wide)
def test_wide_sums(a: int, b: int) -> None:
    add = f"""IADD3 R2, P3, PT, {AT[0]}, RZ, RZ
              MOV R4, {AT[2]}
              IADD3 R8, P1, R2, R4, RZ
              MOV R3, {AT[1]}
              IADD3.X R9, R3, {AT[3]}, RZ, P1, !PT"""
    assert holds(add, (a + b) % 2**64, a, b)
    subtract = f"""MOV R2, {AT[2]}
                   IADD3 R8, P1, -R2, {AT[0]}, RZ
                   MOV R3, {AT[3]}
                   IADD3.X R9, ~R3, {AT[1]}, RZ, P1, !PT"""
    assert holds(subtract, (a - b) % 2**64, a, b)


@given(wide, wide, st.integers(1, 31))
def test_wide_addresses(a: int, b: int, shift: int) -> None:
    """a + (b << shift), as arrays are indexed."""
    code = f"""MOV R2, {AT[2]}
               MOV R3, {AT[3]}
               MOV R4, {AT[0]}
               LEA R8, P1, R2, R4, {shift:#x}
               MOV R5, {AT[1]}
               LEA.HI.X R9, R2, R5, R3, {shift:#x}, P1"""
    assert holds(code, (a + (b << shift)) % 2**64, a, b)
    narrow = code.replace("LEA.HI.X R9, R2, R5, R3", "LEA.HI.X.SX32 R9, R2, R5")
    low = b % 2**32
    assert holds(narrow, (a + ((low - 2**32 if low >> 31 else low) << shift)) % 2**64, a, b)


@given(wide, wide)
def test_wide_comparisons(a: int, b: int) -> None:
    for name, expected in {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}.items():
        code = f"""MOV R2, {AT[0]}
                   MOV R3, {AT[1]}
                   ISETP.{name}.U32.AND P1, PT, R2, {AT[2]}, PT
                   ISETP.{name}.U32.AND.EX P0, PT, R3, {AT[3]}, PT, P1"""
        assert checked(code, "i64", "i64", args=(a, b)) == expected, name


@given(word, word, st.integers(1, 31))
def test_integer_arithmetic(a: int, b: int, shift: int) -> None:
    def signed(value: int) -> int:
        return value - 2**32 if value >> 31 else value

    put = f"MOV R2, {AT[0]}\nMOV R3, {AT[2]}\n"
    assert holds(put + "IMAD.WIDE.U32 R8, R2, R3, RZ\nMOV R9, R9", a * b, a, b)
    assert holds(put + "IMAD.WIDE R8, R2, R3, RZ\nMOV R9, R9", signed(a) * signed(b) % 2**64, a, b)
    carried = put + "IADD3 R6, P1, R2, R3, RZ\nMOV R5, RZ\nMOV R4, RZ\nIMAD.WIDE.U32.X R8, R2, R3, R4, P1\nMOV R9, R9"
    assert holds(carried, (a * b + (a + b >> 32)) % 2**64, a, b)
    assert holds(put + "IMAD R8, R2, R3, R2", (a * b + a) % 2**32, a, b)
    assert holds(put + "IMAD.HI.U32 R8, R2, R3, RZ", a * b >> 32, a, b)
    assert holds(put + f"LEA R8, R2, R3, {shift:#x}", ((a << shift) + b) % 2**32, a, b)
    assert holds(put + f"LEA.HI R8, R2, R3, RZ, {shift:#x}", ((a << shift >> 32) + b) % 2**32, a, b)
    assert holds(put + f"SHF.L.U32 R8, R2, {shift:#x}, RZ", (a << shift) % 2**32, a, b)
    assert holds(put + f"SHF.R.U32.HI R8, RZ, {shift:#x}, R2", a >> shift, a, b)
    assert holds(put + f"SHF.R.S32.HI R8, RZ, {shift:#x}, R2", (signed(a) >> shift) % 2**32, a, b)
    assert holds(put + f"SHF.L.U64.HI R8, R2, {shift:#x}, R3", ((b << 32 | a) << shift >> 32) % 2**32, a, b)
    assert holds(put + f"SHF.R.U64 R8, R2, {shift:#x}, R3", ((b << 32 | a) >> shift) % 2**32, a, b)
    assert holds(put + "LOP3.LUT R8, R2, R3, RZ, 0x3c, !PT", a ^ b, a, b)
    assert holds(put + "LOP3.LUT R8, R2, R3, R2, 0xe8, !PT", (a & b) | (a & a) | (b & a), a, b)
    assert holds(put + "PRMT R8, R2, 0x5410, R3", (b & 0xFFFF) << 16 | (a & 0xFFFF), a, b)
    assert holds(put + "PRMT R8, R2, 0x7632, R3", (b >> 16) << 16 | (a >> 16), a, b)
    width = shift
    assert holds(put + f"SGXT.U32 R8, R2, {width:#x}", a % 2**width, a, b)
    sign = a % 2**width - (2**width if a >> (width - 1) & 1 else 0)
    assert holds(put + f"SGXT R8, R2, {width:#x}", sign % 2**32, a, b)
    assert holds(put + "VIMNMX R8, R2, R3, PT", min(signed(a), signed(b)) % 2**32, a, b)
    assert holds(put + "VIMNMX.U32 R8, R2, R3, !PT", max(a, b), a, b)
    assert holds(put + "ISETP.LT.AND P2, PT, R2, R3, PT\nSEL R8, R2, R3, P2", min(signed(a), signed(b)) % 2**32, a, b)


def test_flags_travel_through_registers() -> None:
    body = """ISETP.EQ.AND P0, PT, RZ, RZ, PT
              ISETP.NE.AND P1, PT, RZ, RZ, PT
              ISETP.EQ.AND P3, PT, RZ, RZ, PT
              P2R R8, PR, RZ, 0x7f"""
    assert holds(body, 0b1001)
    assert holds(body + "\nMOV R5, 0x6\nR2P PR, R5, 0x7\nP2R R8, PR, RZ, 0x7f", 0b1110)
    assert checked("PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0")
    assert not checked("PLOP3.LUT P0, PT, PT, PT, PT, 0x40, 0x0")


def test_what_is_not_understood_is_unknown() -> None:
    for odd in ("IADD3.SAT R2, R0, R0, RZ", "PRMT.F4E R2, R0, R0, R0", "POPC R2, R0", "MOV R2, |R0|"):
        code = f"S2R R0, SR_TID.X\n{odd}\nLDS R4, [R2]\nEXIT"
        assert sass.follow(program(code), launch()).unknown == 1, odd


def test_constants_through_the_half_precision_unit() -> None:
    assert holds("HFMA2.MMA R8, -RZ, RZ, 1.875, 0", 0x3F800000)
    assert holds("HFMA2.MMA R8, -RZ, RZ, 0, 5.9604644775390625e-08", 1)


def test_spilled_values_come_back() -> None:
    assert holds("MOV R4, 0x2a\nLDC R1, c[0x0][0x28]\nSTL [R1+0x8], R4\nMOV R4, RZ\nLDL R8, [R1+0x8]", 42)


DIVERGES = """
    S2R R0, SR_TID.X
    ISETP.LT.AND P0, PT, R0, 0x5, PT
    @P0 BRA `(.L_few)
    MUFU.EX2 R1, R1
    BRA `(.L_all)
    .L_few:
    MUFU.RCP R1, R1
    .L_all:
    MUFU.SIN R1, R1
    EXIT
"""


def test_lanes_that_part_meet_again() -> None:
    issued = sass.follow(program(DIVERGES), launch()).issued
    assert {name: issued[name] for name in ("MUFU.EX2", "MUFU.RCP", "MUFU.SIN", "EXIT")} == dict.fromkeys(
        ("MUFU.EX2", "MUFU.RCP", "MUFU.SIN", "EXIT"), 1
    )


def test_guards_decide_what_is_accessed() -> None:
    code = """
        S2R R0, SR_TID.X
        ISETP.LT.AND P0, PT, R0, 0x5, PT
        LDC.64 R2, c[0x0][0x210]
        IMAD.WIDE R4, R0, 0x10, R2
        @P0 STG.E.128 desc[UR4][R4.64], R8
        @!PT STG.E.128 desc[UR4][R4.64+0x1000], R8
        EXIT
    """
    trace = sass.follow(program(code, "*fp32"), launch(meta(1000)))
    assert trace.written == {0: 80} and trace.sectors == 3 and trace.issued["STG.E.128"] == 2


def test_guarded_results_are_of_some_lanes() -> None:
    body = """S2R R0, SR_TID.X
              ISETP.LT.AND P1, PT, R0, 0x5, PT
              MOV R8, RZ
              @P1 IADD3 R8, R0, 0x1, RZ
              SEL R2, RZ, 0x1, !P1
              IMAD R2, R2, R0, R2
              ISETP.EQ.AND P0, PT, R2, R8, PT"""
    assert checked(body)
    assert not checked(body.replace("!P1", "P1"))
    assert not checked(body.replace("@P1", "@!P1"))


PARTLY = """
    S2R R0, SR_TID.X
    LDC.64 R2, c[0x0][0x210]
    LDG.E.64 R4, desc[UR4][R2.64]
    ISETP.NE.AND P1, PT, R4, RZ, PT
    ISETP.LT.AND P0, PT, R0, 0x5, PT
    @!P0 BRA `(.L_others)
    LEA R4, P1, R0, R2, 0x2
    LEA.HI.X R5, R0, R3, RZ, 0x2, P1
    STG.E desc[UR4][R4.64], R0
    .L_others:
    STG.E desc[UR4][R4.64], R0
    EXIT
"""


def test_what_some_lanes_wrote_is_known_to_them() -> None:
    """Registers and carries that held data before; where all lanes read them, they are unknown as ever."""
    trace = sass.follow(program(PARTLY, "*fp32"), launch(meta(100)))
    assert trace.written == {0: 5 * 4} and trace.unknown == 1
    few = PARTLY.replace("@!P0 BRA `(.L_others)", "@!P0 EXIT")
    assert sass.follow(program(few, "*fp32"), launch(meta(100))).unknown == 0


def test_what_some_lanes_loaded_is_known_to_the_others() -> None:
    code = """
        S2R R0, SR_TID.X
        LDC.64 R2, c[0x0][0x210]
        ISETP.LT.AND P0, PT, R0, 0x5, PT
        IMAD R4, R0, 0x4, RZ
        @P0 LDG.E R4, desc[UR4][R2.64]
        @!P0 STS [R4], R0
        @P0 STS [R4], R0
        EXIT
    """
    trace = sass.follow(program(code, "*fp32"), launch(meta(100)))
    assert trace.unknown == 1 and trace.wavefronts == 2


def test_uniform_registers_take_what_an_active_lane_has() -> None:
    code = """
        S2R R0, SR_TID.X
        ISETP.LT.AND P0, PT, R0, 0x5, PT
        @P0 EXIT
        R2UR UR4, R0
        MOV R8, UR4
        ISETP.EQ.AND P0, PT, R8, 0x5, PT
    """
    assert checked(code)


GUARDED_SOFTMAX = """
    LDC.64 R2, c[0x0][0x210]
    LDG.E R0, desc[UR4][R2.64]
    FSETP.GT.AND P0, PT, R0, 90, PT
    @P0 BRA `(.L_exact)
    FADD R1, R0, R0
    FADD R1, R1, R0
    FADD R1, R1, R0
    FADD R1, R1, R0
    BRA `(.L_done)
    .L_exact:
    FMNMX R1, R0, R0, !PT
    .L_done:
    EXIT
"""


@pytest.mark.parametrize("swapped", [False, True])
def test_the_ordinary_way_has_no_maximum(swapped: bool) -> None:
    """Even where the other has fewer instructions, and whichever of both falls through."""
    text = GUARDED_SOFTMAX.replace("@P0 BRA", "@!P0 BRA") if swapped else GUARDED_SOFTMAX
    if swapped:
        text = text.replace("FADD R1", "FSUB R1").replace("FMNMX R1, R0, R0, !PT", "FADD R1, R0, R0")
        text = text.replace("FSUB R1, R0, R0\n", "FMNMX R1, R0, R0, !PT\n", 1)
    ways = sass.ordinary_arms(program(text, "*fp32"), launch(meta(8)))
    assert len(ways) == 2
    assert [sass.maxima(trace) > 0 for _, trace in ways] == [False, True]
    assert [list(arms.values()) for arms, _ in ways] == ([[True], [False]] if swapped else [[False], [True]])


def test_branches_are_decided_one_by_one() -> None:
    """Each sample's guard is a branch of its own: all of them are ordinary at once, or none is."""
    guard = """
        FSETP.GT.AND P0, PT, R0, 90, PT
        @P0 BRA `(.L_exact{0})
        FADD R1, R0, R0
        BRA `(.L_done{0})
        .L_exact{0}:
        FMNMX R1, R0, R0, !PT
        FADD R1, R1, R0
        .L_done{0}:"""
    text = "LDC.64 R2, c[0x0][0x210]\nLDG.E R0, desc[UR4][R2.64]" + "".join(map(guard.format, range(12))) + "\nEXIT"
    (arms, ordinary), (_, exact) = sass.ordinary_arms(program(text, "*fp32"), launch(meta(8)))
    assert len(arms) == 12 and not any(arms.values())
    assert (sass.maxima(ordinary), sass.maxima(exact)) == (0, 12)


def test_a_long_division_is_not_ordinary() -> None:
    code = """
        LDC.64 R2, c[0x0][0x210]
        LDG.E R0, desc[UR4][R2.64]
        FCHK P0, R0, R0
        @!P0 BRA `(.L_fast)
        MOV R6, 0x5
        CALL.REL.NOINC `($k$division)
        .L_fast:
        EXIT
        $k$division:
        MUFU.RCP R0, R0
        FFMA R0, R0, R0, R0
        RET.REL.NODEC R6 `(k)
    """
    (_, quick), (_, slow) = sass.ordinary_arms(program(code, "*fp32"), launch(meta(8)))
    assert quick.issued["CALL.REL.NOINC"] == 0 and slow.issued["MUFU.RCP"] == slow.issued["EXIT"] == 1


@pytest.mark.parametrize(
    "end",
    [
        "@P0 BRA `(.L_again)",
        "@!P0 BRA `(.L_out)\nBRA `(.L_again)",
        "@!P0 CALL.REL.NOINC `(.L_out)\nBRA `(.L_again)",
        "@!P0 EXIT\nBRA `(.L_again)",
    ],
)
def test_a_loop_that_data_ends_is_noticed(end: str) -> None:
    """By a jump back, or out of it past a jump back."""
    code = f"""
        LDC.64 R2, c[0x0][0x210]
        .L_again:
        LDG.E R0, desc[UR4][R2.64]
        ISETP.NE.AND P0, PT, R0, RZ, PT
        {end}
        .L_out:
        EXIT
    """
    ((arms, trace),) = sass.ordinary_arms(program(code, "*fp32"), launch(meta(8)))
    assert arms == {} and len(trace.loops) == 1 and trace.issued["LDG.E"] == 1


LEAVES = """
    LDC.64 R2, c[0x0][0x210]
    .L_again:
    LDG.E R0, desc[UR4][R2.64]
    ISETP.NE.AND P0, PT, R0, RZ, PT
    @P0 BRA `(.L_out)
    MUFU.EX2 R1, R1
    BRA `(.L_again)
    .L_out:
    EXIT
"""


def test_ways_that_never_end_are_left_out() -> None:
    """A loop that is left from its middle runs for ever where data never says so."""
    binary, call = program(LEAVES, "*fp32"), launch(meta(8))
    with pytest.raises(sass.Endless, match=r"k: how often the code at 0x\w+ runs hangs on data"):
        sass.follow(binary, call)
    ((arms, trace),) = sass.ordinary_arms(binary, call)
    assert list(arms.values()) == [True] and trace.loops == arms.keys() and trace.issued["LDG.E"] == 1


def test_addresses_from_data_are_counted_as_unknown() -> None:
    code = """
        LDC.64 R2, c[0x0][0x210]
        LDG.E.64 R4, desc[UR4][R2.64]
        LDG.E R0, desc[UR4][R4.64]
        LDS.64 R8, [R4]
        EXIT
    """
    trace = sass.follow(program(code, "*i64"), launch(meta(8)))
    assert trace.unknown == 2 and trace.read == {0: 8} and trace.wavefronts == 2 and trace.conflicts == 0


def test_what_cannot_be_followed_is_named() -> None:
    with pytest.raises(ValueError, match="its target is computed"):
        sass.follow(program("BRX R2 -0x10\nEXIT"), launch())
    with pytest.raises(ValueError, match="cannot pass argument 0, a nvTmaDesc"):
        sass.follow(program("EXIT", "nvTmaDesc"), launch(1))
    with pytest.raises(ValueError, match="expected one of sm_80 to sm_100, got 'sm_120'"):
        sass.follow(dataclasses.replace(program("EXIT"), arch="sm_120"), launch())


@pytest.mark.parametrize(
    ("access", "stride", "passes", "conflicts"),
    [
        ("LDS R4, [R2]", 4, 1, 0),
        ("LDS R4, [R2]", 0, 1, 0),  # one word for all
        ("LDS R4, [R2]", 8, 2, 1),
        ("LDS R4, [R2]", 128, 32, 31),
        ("STS [R2+0x80], R4", 132, 1, 0),  # a row of 33 words
        ("LDS.U16 R4, [R2]", 2, 1, 0),
        ("LDS.64 R4, [R2]", 8, 2, 0),
        ("LDS.128 R4, [R2]", 16, 4, 0),
        ("LDS.128 R4, [R2]", 32, 8, 4),
        ("LDSM.16.M88.4 R4, [R2]", 16, 4, 0),
        ("LDSM.16.M88.4 R4, [R2]", 128, 32, 28),
        ("LDSM.16.M88.4 R4, [R2]", 144, 4, 0),
        ("LDSM.16.M88 R4, [R2]", 128, 8, 7),
        ("STSM.16.MT88.2 [R2], R4", 16, 2, 0),
    ],
)
def test_bank_conflicts(access: str, stride: int, passes: int, conflicts: int) -> None:
    code = f"S2R R0, SR_TID.X\nIMAD R2, R0, {stride:#x}, RZ\n{access}\nEXIT"
    trace = sass.follow(program(code), launch())
    assert (trace.wavefronts, trace.conflicts) == (passes, conflicts)


# --- occupancy and model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "share"), [(128, 0.75), (320, 0.625)])
def test_occupancy_as_published(threads: int, share: float) -> None:
    """The example of the CUDA C++ Best Practices Guide, "Calculating Occupancy": 37 registers on a device with sm_80's
    registers and warps."""
    assert occupancy("sm_80", 37, 0, threads // 32).warps == share * 64


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "programs", "expected"),
    [
        ("sm_90", 32, 0, 8, None, (64, "registers, warps")),
        ("sm_90", 24, 0, 1, None, (32, "programs")),
        ("sm_86", 24, 0, 1, None, (16, "programs")),
        ("sm_90", 255, 0, 1, None, (8, "registers")),
        ("sm_80", 32, 48 << 10, 4, None, (12, "shared memory")),  # 49 KiB each, with the system's, of 164
        ("sm_90", 32, 227 << 10, 4, None, (4, "shared memory")),
        ("sm_90", 128, 0, 1, 2, (2, "grid")),
    ],
)
def test_what_limits_occupancy(
    arch: str, registers: int, shared: int, num_warps: int, programs: int | None, expected: tuple[int, str]
) -> None:
    assert occupancy(arch, registers, shared, num_warps, programs) == expected


def test_a_program_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="no program fits a multiprocessor of sm_86: shared memory"):
        occupancy("sm_86", 32, 100 << 10, 1)


def test_operations_of_matrix_instructions() -> None:
    assert chips.mma_operations("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    assert chips.mma_operations("HMMA.1688.F32.TF32") == 2 * 16 * 8 * 8
    assert chips.mma_operations("HMMA.1684.F32.TF32") == 2 * 16 * 8 * 4
    with pytest.raises(ValueError, match="unknown matrix instruction"):
        chips.mma_operations("HGMMA.64x8x16.F32")


def test_the_model() -> None:
    """A chip of one multiprocessor at 1 GHz: a warp-instruction is a quarter of a nanosecond to issue."""
    chip = Chip("toy", "sm_90", 1, 1e9, bandwidth=1e9, half=4096e9, tf32=2048e9, mma=0.5)
    issued = {
        "HMMA.16816.F32.BF16": 2,  # 2 x 4096 operations at half of 4096 per ns
        "HMMA.1688.F32.TF32": 1,  # 2048 at half of 2048
        "FFMA": 8,  # 128 lanes: a quarter each
        "IMAD.WIDE": 2,  # 64 lanes: a half each
        "FMNMX": 4,  # 64 lanes
        "MUFU.EX2": 3,  # 16 lanes: two each
        "SHFL.BFLY": 5,
        "BRA": 1,
    }
    busy = chips.seconds(Work(issued, bytes=7, wavefronts=10, sectors=8), chip)
    assert {name: round(time * 1e9, 9) for name, time in busy.items()} == {
        "memory": 7,
        "issue": 26 / 4,
        "tensor": 4 + 2,
        "fma": 2 + 1,
        "alu": 2,
        "mufu": 6,
        "shared": 10 + 2 + 5,
    }
    assert chips.limiting(busy) == "shared"
    older = chips.seconds(Work({"FFMA": 8}, 0, 0, 0), chip._replace(arch="sm_80"))
    assert older["fma"] == pytest.approx(4e-9)


def test_chips_agree_with_their_published_peaks() -> None:
    """fp32 from lanes and clock, where the clock is not taken from it: A100 19.5 TFLOPS, L40S 91.6."""
    for name, published in {"A100": 19.5e12, "L40S": 91.6e12}.items():
        chip = CHIPS[name]
        lanes = ARCHS[chip.arch].fp32_lanes
        assert 2 * lanes * chip.multiprocessors * chip.clock == pytest.approx(published, rel=0.01)
    assert CHIPS["H100"].half == pytest.approx(132 * 4096 * 1.83e9, rel=0.001)
    assert all(chip.arch in ARCHS and chip.source for chip in CHIPS.values())


def kernel(name: str = "forward", *, backward: bool = False, walks: bool = True, **changes: Any) -> Kernel:
    figures: dict[str, Any] = {
        "name": name,
        "backward": backward,
        "arch": "sm_90",
        "walks": walks,
        "grid": 2112,
        "num_warps": 1,
        "registers": 128,
        "stack": 0,
        "shared": 4096,
        "resident_warps": 16,
        "limit": "registers",
        "issued": {"FFMA": 100.0, "MUFU.EX2": 40.0, "BRA": 2.0},
        "ways": [142.0],
        "loops": 0,
        "per_program": 50.0,
        "read": 1248.0,
        "written": 1248.0,
        "asked": 2496.0,
        "workspace": 5376,
        "wavefronts": 10.0,
        "conflicts": 1.0,
        "sectors": 78.0,
        "unknown": 0.0,
        "load_bits": 128,
        "store_bits": 128,
    }
    return Kernel(**figures | changes)


CALL = [
    kernel("fold", walks=False),
    kernel(),
    kernel("backward", backward=True, issued={"FFMA": 1000.0}, read=3744.0),
    kernel("unfold", backward=True, walks=False),
]


def test_a_modelled_call() -> None:
    chip, shape = CHIPS["H100"], SHAPES["criteo"]
    forward = gpu.modelled(CALL, chip, shape, "bf16", FORWARD, [1, 1000])
    # 40 exp2 at 2 cycles of a multiprocessor.
    assert forward.limit == "memory" and forward.ns == pytest.approx(2496 / 3.35e3)
    assert forward.busy["mufu"] == pytest.approx(80 / 132 / 1.83)
    assert forward.of_floor == pytest.approx(1)
    assert forward.batches[1000] == pytest.approx(2 * LAUNCH_SECONDS * 1e6 + 2496 / 3.35e3)
    training = gpu.modelled(CALL, chip, shape, "bf16", TRAINING, [1])
    assert training.launches == 4 and training.ns == pytest.approx(forward.ns + 4992 / 3.35e3)
    assert training.floor_ns == pytest.approx((2496 + 3744 + 39 * 16 / 8) / 3.35e3)


def test_ours_moved() -> None:
    moved = gpu.ours_moved(CALL, SHAPES["criteo"], "bf16", TRAINING)
    assert (moved.launches, moved.bytes, moved.operations) == (4, 2496 + 4992, 1_118_208)
    assert moved.bytes_fixed == 2 * 5376 + 2 * 2496


# --- PyTorch's ops ------------------------------------------------------------------------------------------


def counted(run: Any) -> tuple[int, int, int, int]:
    with Traffic() as seen:
        run()
    return seen.launches, seen.read, seen.written, seen.operations


def test_bytes_of_ops() -> None:
    a, b = torch.randn(4, 8), torch.randn(8, 2)
    row = torch.randn(8)
    assert counted(lambda: a @ b) == (1, 4 * (32 + 16), 4 * 8, 2 * 4 * 8 * 2)
    assert counted(lambda: a + row) == (1, 4 * (32 + 8), 4 * 32, 0)
    assert counted(lambda: a * a) == (1, 4 * 32, 4 * 32, 0)
    assert counted(lambda: a.sum(0)) == (1, 4 * 32, 4 * 8, 0)
    assert counted(lambda: a.bfloat16()) == (1, 4 * 32, 2 * 32, 0)
    assert counted(lambda: torch.softmax(a, -1)) == (1, 4 * 32, 4 * 32, 0)
    assert counted(lambda: torch.addmm(row[:2], a, b)) == (1, 4 * (2 + 32 + 16), 4 * 8, 2 * 4 * 8 * 2)


def test_bytes_in_place() -> None:
    a, b = torch.randn(4, 8), torch.randn(8)
    assert counted(lambda: a.relu_()) == (1, 4 * 32, 4 * 32, 0)
    assert counted(lambda: a.add_(b)) == (1, 4 * (32 + 8), 4 * 32, 0)
    assert counted(lambda: a.copy_(b)) == (1, 4 * 8, 4 * 32, 0)
    assert counted(lambda: a.zero_()) == (1, 0, 4 * 32, 0)


def test_views_are_free() -> None:
    a = torch.randn(4, 8)
    assert counted(lambda: a.view(8, 4).t()[None].expand(3, 4, 8).detach()) == (0, 0, 0, 0)
    assert counted(lambda: torch.empty(5)) == (0, 0, 0, 0)
    assert counted(lambda: a.t().contiguous()) == (1, 4 * 32, 4 * 32, 0)
    # Of what is expanded, memory has one.
    assert counted(lambda: a[:1].expand(4, 8) + a) == (1, 4 * (8 + 32), 4 * 32, 0)


def test_bytes_of_the_fused_attention() -> None:
    q, k, v = (torch.randn(3, 2, 5, 4, requires_grad=True) for _ in range(3))
    size, lse = 4 * 3 * 2 * 5 * 4, 4 * 3 * 2 * 5
    products = 3 * 2 * 2 * 5 * 5 * 4
    attention = torch.nn.functional.scaled_dot_product_attention
    assert counted(lambda: attention(q, k, v)) == (1, 3 * size, size + lse, 2 * products)
    out = attention(q, k, v)
    launches, read, written, made = counted(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    # The ones that are handed in are an op of the test's own.
    assert (launches, read, written - size, made) == (3 + 1, 5 * size + lse, 3 * size, 5 * products)


def test_a_layer_by_hand() -> None:
    """SDPA's spelling: projections, attention, the residual, the output projection added to it, relu."""
    f, e, h, a = 5, 8, 2, 16
    case = Case(Shape("tiny", f, e, h), 1, FORWARD, 1)
    found = traffic.count(CONTESTANTS["sdpa"], case)
    tile, heads = 4 * f * e, 4 * f * a
    attention = 4 * heads + 4 * f * h
    assert found.launches == 7
    assert found.bytes == 3 * (tile + heads) + attention + 2 * tile + (tile + heads + tile) + 2 * tile
    assert found.bytes_fixed == 4 * (3 * (e * a + a) + e * e + e + a * e)
    assert found.operations == 3 * 2 * f * e * a + 2 * 2 * f * f * a + 2 * f * e * e + 2 * f * a * e


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_a_backward_moves_more_than_its_forward(name: str) -> None:
    forward, training = (
        traffic.count(CONTESTANTS[name], Case(SHAPES["criteo"], 1, mode, 1, "bf16")) for mode in (FORWARD, TRAINING)
    )
    assert training.launches > 2 * forward.launches and training.bytes > 2 * forward.bytes
    single = traffic.count(CONTESTANTS[name], Case(SHAPES["criteo"], 1, FORWARD, 1))
    # fp32 moves twice as much, but for the log-sum-exp, which is fp32 either way.
    assert single.bytes == pytest.approx(2 * forward.bytes, rel=0.01)


# --- the table ----------------------------------------------------------------------------------------------

HELD = Held("criteo", "bf16", "sm_90", True)
GOOD = {
    "registers": 128,
    "stack": 0,
    "shared": 0,
    "load_bits": 128,
    "store_bits": 128,
    "instructions": 1000.0,
    "accesses": 6.0,
    "bytes": 2496.0,
}


@pytest.mark.parametrize(
    ("change", "complaint", "elsewhere"),
    [
        ({}, "", ""),
        ({"instructions": 1030.0, "registers": 255, "shared": 9999}, "", ""),
        ({"instructions": 900.0, "bytes": 2400.0}, "", ""),
        ({"instructions": 1031.0}, "forward: 1,031.0 instructions, in the table 1,000.0: +3.1%", ""),
        ({"accesses": 20.0}, "forward: 20.0 accesses, in the table 6.0: +233.3%", ""),
        ({"bytes": 3744.0}, "forward: 3,744.0 bytes, in the table 2,496.0: +50.0%", ""),
        ({"stack": 8}, "forward: 8 bytes of stack: registers are spilled", "spilled"),
        ({"load_bits": 32}, "the widest load is of 32 bits per thread, in the table 128", "widest load"),
        ({"store_bits": 64}, "the widest store is of 64 bits per thread, in the table 128", "widest store"),
    ],
)
def test_what_the_table_holds_kernels_to(change: dict[str, Any], complaint: str, elsewhere: str) -> None:
    """elsewhere: what is said under another Triton than the table's, which may need more instructions."""
    import triton

    for version, expected in ((triton.__version__, complaint), ("0.0", elsewhere)):
        table = {"triton": version, "launches": {str(HELD): {"forward": GOOD}}}
        found = gpu_figures.complaints(HELD, table, {"forward": GOOD | change})
        assert len(found) == bool(expected)
        assert not found or (expected in found[0] and found[0].startswith("criteo 39x16x2, bf16, sm_90, training: "))


def test_launches_that_come_or_go_are_noticed() -> None:
    table = {"triton": "0.0", "launches": {str(HELD): {"forward": GOOD}}}
    (found,) = gpu_figures.complaints(HELD, table, {"forward": GOOD, "copy": GOOD})
    assert "launches forward, copy, in the table forward" in found
    (found,) = gpu_figures.complaints(HELD._replace(arch="sm_80"), table, {})
    assert "not in the table" in found


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled: every call makes the launches from above."""

    def kernels(shape: Shape, precision: str, arch: str, *args: Any, training: bool) -> list[Kernel]:
        spilled = {"stack": 16, "ways": [142.0, 181.0], "unknown": 2.5} if arch == "sm_80" else {}
        return [dataclasses.replace(k, arch=arch, **spilled) for k in CALL if training or not k.backward]

    monkeypatch.setattr(gpu_figures, "kernels", kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("compiled")
def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    arguments = [
        "gpu",
        "--fields",
        "5",
        "--emb-size",
        "8",
        "--batch",
        "32",
        "--json",
        str(file),
        "--out",
        str(tmp_path),
    ]
    assert main([*arguments, "--dtype", "bf16", "tf32", "--arch", "sm_90", "sm_80"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    for title in (
        "counted: custom 5x8x2, bf16: what a launch takes of a multiprocessor",
        "counted: custom 5x8x2, tf32: warp-instructions and bytes per sample",
        "modelled: custom 5x8x2, bf16: nanoseconds per sample at best",
        "modelled: custom 5x8x2, tf32: microseconds of a call",
        "counted: custom 5x8x2, bf16, forward+backward: traffic per sample",
        "sm_80 forward: data decides; counted is the way of ordinary inputs, the other takes 181",
        "sm_80 forward: 2.5 accesses at addresses from data",
        "not measured: torch sees no CUDA device",
    ):
        assert title in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["fold", "2,112", "1", "128", "16", "4,096", "16", "registers"] in [line[1:] for line in lines]
    assert ["forward", "142", "0", "100", "0", "40", "0", "0", "2", "1,248", "1,248", "15.60", "1", "of", "10"] in lines
    # H200 and H100 are one architecture.
    assert {line[0] for line in lines if line[1:2] == ["forward"]} >= {"A100", "H100", "H200"}
    assert not any(line[:1] == ["L40S"] for line in lines)

    found = json.loads(file.read_text())
    assert found["shape"]["fields"] == 5 and found["measured"] == []
    counted = [(row["precision"], row["arch"], row["mode"], row["name"]) for row in found["counted"]]
    calls = {TRAINING: [k.name for k in CALL], FORWARD: [k.name for k in CALL if not k.backward]}
    assert sorted(counted) == sorted(
        (precision, arch, mode, name)
        for precision in ("bf16", "tf32")
        for arch in ("sm_90", "sm_80")
        for mode in (TRAINING, FORWARD)
        for name in calls[mode]
    )
    assert len(found["modelled"]) == 2 * 3 * 2
    assert found["counted"][1]["pipes"]["mufu"] == 40 and found["counted"][1]["instructions"] == 142
    names = {row["name"] for row in found["traffic"]}
    assert names >= {"ours", "reference", "sdpa", "sdpa-fused"}
    assert "deepctr" in names or "not counted: deepctr: not installed" in shown
    assert (tmp_path / gpu.PICTURE).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("compiled")
def test_measured_beside_modelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(shape: Shape, precision: str, batches: Sequence[int], models: Any) -> list[gpu.Measured]:
        model = models["H100", precision, FORWARD].batches[32]
        return [gpu.Measured("NVIDIA H100", precision, FORWARD, 32, 2 * model, 9.0, model, 1755)]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "measure", measure)
    assert (
        main(["gpu", "--arch", "sm_90", "--dtype", "bf16", "--batch", "32", "--no-plot", "--out", str(tmp_path)]) == 0
    )
    shown = capsys.readouterr().out
    (line,) = [line.split() for line in shown.splitlines() if line.split()[-1:] == ["1755"]]
    assert line[:3] == ["bf16", "forward", "32"] and line[-2] == "+100%"
    assert "not measured" not in shown and not (tmp_path / gpu.PICTURE).exists()


@pytest.mark.parametrize("multiprocessors", [132, 114])
def test_measuring(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that passes for an H100: every case is timed with the cache flushed, and as it is.

    The H100 of a PCIe card is another chip.
    """
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=multiprocessors)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda device: 1755)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    monkeypatch.setattr(gpu.timing, "clock_for", lambda device: "cold")
    monkeypatch.setattr(gpu.timing, "CudaClock", lambda flush: "warm")
    monkeypatch.setattr(
        gpu.timing, "race", lambda steps, clock, seconds: {gpu.OURS: [{"cold": 2e-6, "warm": 1e-6}[clock]] * 5}
    )
    asked = []

    def set_up(contestant: Any, case: Case) -> Any:
        asked.append((contestant.name, case.mode, case.batch, case.dtype, case.device))
        return SimpleNamespace(step=None)

    monkeypatch.setattr(gpu.contestants, "set_up", set_up)
    model = gpu.modelled(CALL, CHIPS["H100"], SHAPES["criteo"], "tf32", FORWARD, [64])
    rows = gpu.measure(SHAPES["criteo"], "tf32", [64], {("H100", "tf32", FORWARD): model})
    assert asked == [("ours-triton", mode, 64, "fp32", "cuda:0") for mode in (FORWARD, TRAINING)]
    assert [(round(row.cold, 9), round(row.warm, 9), row.clock) for row in rows] == [(2, 1, 1755)] * 2
    assert rows[1].error is None
    assert rows[0].error == (pytest.approx(2 / model.batches[64] - 1) if multiprocessors == 132 else None)


def test_check_and_update(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.json"
    figures = {"forward": dict(GOOD)}
    monkeypatch.setattr(gpu_figures, "current", lambda held: figures)
    monkeypatch.setattr(gpu_figures, "HELD", (HELD,))
    run = functools.partial(main, ["gpu", "--table", str(table), "--check"])
    assert main(["gpu", "--table", str(table), "--update"]) == 0
    assert run() == 0
    figures["forward"]["instructions"] *= 2
    assert run() == 1
    assert "forward: 2,000.0 instructions" in capsys.readouterr().out
    table.write_text(table.read_text().replace('"triton": "', '"triton": "0.'))
    assert run() == 0
    assert "instructions not compared: the table is of Triton 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--fields", "0"], "argument --fields: expected a number of at least 1, got '0'"),
        (["--arch", "sm_70"], "argument --arch: invalid choice"),
        (["--dtype", "fp64"], "argument --dtype: invalid choice"),
        (["--check", "--update"], "not allowed with argument"),
        (["--check", "--table", "no-such-file"], "no-such-file: expected a table of figures"),
        (["--check", "--table", __file__], "expected a table of figures"),
        (["--fields", "1000", "--arch", "sm_90"], "custom 1000x16x2: 1000 fields, more than 512"),
        (["--emb-size", "128", "--arch", "sm_90"], "an embedding size of 128, more than 64"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["gpu", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("python -m benchmarks gpu: error: ") and complaint in last


@pytest.mark.usefixtures("compiled")
def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["gpu", "--arch", "sm_90", "--no-plot", "--json", str(tmp_path / "none" / "gpu.json")])
    assert "No such file or directory" in capsys.readouterr().err
