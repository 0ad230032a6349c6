"""Whether tests/helpers/sass.py sees a register that is named while in flight; test_sm90_build.py
goes by it.
"""

import pytest
import sass

LOOP = """
.L_x_1:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0020*/                   IMAD.MOV.U32 R2, RZ, RZ, R3 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R56, R88, gdesc[UR4].tnspB, R56, gsb0 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/                   MOV R4, R5 ;
.L_x_2:
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0080*/                   FADD R24, R24, R25 ;
        /*0090*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00a0*/                   FMUL R88, R24, R56 ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def test_registers_that_are_free_may_be_named():
    assert sass.in_flight_names(LOOP.splitlines()) == []


@pytest.mark.parametrize(
    "right, wrong, named",
    [
        ("MOV R4, R5", "MOV R4, R55", "R55"),  # a score, on one of two paths
        ("IMAD.MOV.U32 R2, RZ, RZ, R3", "FADD R30, R2, R3", "R30"),  # written between the products
        ("FADD R24, R24, R25", "FADD R24, R24, R87", "R87"),  # the newer group
        ("MOV R4, R5", "STS.128 [R2], R20", None),
        ("MOV R4, R5", "STS.128 [R2], R22", "R24"),  # in a wide operand
        ("FADD R24, R24, R25", "MOV R91, R24", "R91"),  # a fragment that is still read
        ("gsb0, 0x1", "gsb0, 0x2", "R24"),  # a wait for too few
    ],
)
def test_a_planted_line_is_seen(right, wrong, named):
    assert LOOP.count(right) == 1
    told = sass.in_flight_names(LOOP.replace(right, wrong).splitlines())
    assert any(f" names {named}, which is in flight" in x for x in told) if named else told == []
