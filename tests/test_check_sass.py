"""tests/check_sass.py on little listings in nvdisasm's form: what it must accept and what it must report."""

from __future__ import annotations

import pytest
from check_sass import check_kernel, components, parse, successors

# A forward kernel of an LSTM with 16-bit weights; the pointers to W_hh of the two directions are at 0x290 and 0x2b8.
NAME = "persistent_forward_kernelI18PersistentGeometryILNS_8CellKindE3ELNS0_8MathKindE3ELi1ELb0ENS0_12GridExchangeEE"
PROBE = {"forward": [0x80, 0xA8], "backward": [0x0, 0x0], "3 3 1 0 0": 2}
BEFORE = """
    @UP0 UMOV UR6, 0xa8 ;
    @!UP0 UMOV UR6, 0x80 ;
    ULDC.64 UR6, c[0x0][UR6+0x210] ;
    IMAD.WIDE R2, R0, 0x2, UR6 ;
    LDG.E.128 R8, desc[UR8][R2.64] ;
    LDG.E.128 R12, desc[UR8][R2.64+0x10] ;
"""
LOOP = """
    UMOV UR4, 0x90 ;
    USEL UR4, UR4, 0xb8, !UP0 ;
    ULDC.64 UR4, c[0x0][UR4+0x210] ;
    @P1 LEA R4, P3, R0, UR4, 0x2 ;
    @P1 LEA.HI.X R5, R0, UR5, R1, 0x2, P3 ;
    @P1 LDG.E.U16 R6, desc[UR8][R4.64] ;
    HMMA.16816.F32 R20, R8, R24, R20 ;
    HMMA.16816.F32 R20, R12, R24, R20 ;
    BAR.SYNC 0x0 ;
"""


def listing(before: str = BEFORE, loop: str = LOOP, end: str = "@P0 BRA `(.L_x_1) ;") -> str:
    lines = [*before.strip().splitlines(), "label", *loop.strip().splitlines(), end, "EXIT ;"]
    out = [f"\t.section\t.text.{NAME}", f".text.{NAME}:"]
    for number, line in enumerate(lines):
        labels = {"label": ".L_x_1:", "skip": ".L_x_2:", "there": ".L_x_3:"}
        out.append(labels[line.strip()] if line.strip() in labels else f"        /*{16 * number:04x}*/   {line.strip()}")
    return "\n".join(out)


def check(text: str) -> list[str]:
    (kernel,) = parse(text)
    return check_kernel(kernel, 0x210, PROBE)[1]


def test_weights_that_stay() -> None:
    (kernel,) = parse(listing())
    figures, wrong = check_kernel(kernel, 0x210, PROBE)
    assert wrong == []
    assert "2 loads of W_hh before the time loop, 0 in it; 2 HMMA.16816.F32, 2 of 2 operands resident" in figures
    (loop,) = components(successors(kernel))
    assert [kernel.code[i].opcode for i in (min(loop), max(loop))] == ["UMOV", "BRA"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("BAR.SYNC 0x0", "LDG.E.128 R30, desc[UR8][R2.64+0x20]"), "W_hh is loaded in the time loop"),
        (("BAR.SYNC 0x0", "IADD3 R30, P4, R2, 0x100, RZ ;\n LDG.E R30, [R30.64]"), "W_hh is loaded in the time loop"),
        (("BAR.SYNC 0x0", "LDG.E.128.STRONG.GPU R30, desc[UR8][R2.64]"), None),
        # Of the two constants only 0x90 and 0xb8, the biases, are harmless.
        (("USEL UR4, UR4, 0xb8, !UP0", "USEL UR4, UR4, 0xa8, !UP0"), "W_hh is loaded in the time loop"),
        (("USEL UR4, UR4, 0xb8, !UP0", "R2UR UR4, R7"), "W_hh is loaded in the time loop"),
        # The address is written under P1, but P1 is another one when it is used.
        (("@P1 LDG", "ISETP.NE.AND P1, PT, R7, RZ, PT ;\n @P1 LDG"), None),
        (("BAR.SYNC 0x0", "LDS.128 R12, [R40]"), "1 operands of weights stay in registers, 2 are planned"),
        (("BAR.SYNC 0x0", "MOV R11, R40"), "1 operands of weights stay in registers, 2 are planned"),
        (("BAR.SYNC 0x0", "LDL.64 R40, [R41]"), "local memory in the time loop"),
        (("BAR.SYNC 0x0", "@P1 CCTL.IVALL"), "L1 is emptied in the time loop"),
        (("BAR.SYNC 0x0", "CCTL.E.PF2 [R40]"), None),
        (("HMMA.16816.F32", "FFMA"), "inside a loop"),
    ],
)
def test_what_is_reported(change: tuple[str, str], message: str | None) -> None:
    text = LOOP.replace(*change)
    assert text != LOOP
    wrong = check(listing(loop=text))
    assert (wrong == []) if message is None else (len(wrong) == 1 and message in wrong[0])


def test_a_stale_pointer_under_the_other_predicate() -> None:
    """R4 keeps a pointer to W_hh where P1 is false; a load under !P1 reads through it, one under P1 does not."""
    stale = "MOV R4, R2 ;\n MOV R5, R3 ;\n" + LOOP.strip()
    assert check(listing(loop=stale)) == []
    assert "W_hh is loaded" in check(listing(loop=stale.replace("@P1 LDG", "@!P1 LDG")))[0]
    assert "W_hh is loaded" in check(listing(loop=stale.replace("@P1 LDG", "LDG")))[0]
    changed = stale.replace("@P1 LDG", "ISETP.NE.AND P1, PT, R7, RZ, PT ;\n @P1 LDG")
    assert "W_hh is loaded" in check(listing(loop=changed))[0]


def test_a_branch_tells_its_predicate() -> None:
    """R4 is a pointer to W_hh where P1 is false; a load that is reached only where P1 is true does not read through it."""
    stale = LOOP.strip().replace("    @P1 LDG", "    {}\n LDG")
    stale = "MOV R4, R2 ;\n MOV R5, R3 ;\n" + stale.replace("HMMA", "skip\n HMMA", 1)

    def report(branch: str) -> list[str]:
        return check(listing(loop=stale.format(branch)))

    assert report("@!P1 BRA `(.L_x_2) ;") == []
    assert report("@P1 BRA `(.L_x_3) ;\n BRA `(.L_x_2) ;\nthere") == []
    for wrong in (
        "@P1 BRA `(.L_x_2) ;",  # the other case
        "@P2 BRA `(.L_x_2) ;",  # another predicate
        "@!P1 BRA P2, `(.L_x_2) ;",  # P1 may be false after it
        "ISETP.NE.AND P1, PT, R7, RZ, PT ;\n @!P1 BRA `(.L_x_2) ;",  # P1 is another one
        "@!P1 BRA `(.L_x_2) ;\n MOV R4, R2 ;",  # overwritten after it
    ):
        assert "W_hh is loaded" in "".join(report(wrong)), wrong


def test_copies_of_a_predicate() -> None:
    """UR4 and R4 keep pointers to W_hh where UP1 is false; they are read under copies of UP1, made by PLOP3."""
    copy = "PLOP3.LUT {}, PT, PT, PT, UP1, 0x80, 0x0"
    loop = [
        "UMOV UR4, UR6",
        "MOV R4, R2",
        "@UP1 ULDC.64 UR4, c[0x0][0x230]",
        copy.format("P1"),
        copy.format("P2"),
        "@P1 IMAD.U32 R4, RZ, RZ, UR4",
        "@P2 IMAD.U32 R5, RZ, RZ, UR4",
        copy.format("P3"),
        "@P3 LDG.E.U16 R4, desc[UR8][R4.64]",
        *LOOP.strip().split("\n")[-3:],
    ]

    def report(changed: dict[int, str]) -> list[str]:
        return check(listing(loop="\n".join(f"{changed.get(i, line).strip(' ;')} ;" for i, line in enumerate(loop))))

    assert report({}) == []
    for wrong in (
        {7: copy.format("P3").replace("UP1", "UP2")},  # a copy of another predicate
        {4: copy.format("P2") + " ;\nISETP.NE.AND P2, PT, R7, RZ, PT"},  # a copy that was overwritten
        {4: copy.format("P2") + " ;\nUISETP.NE.AND UP1, UPT, UR9, URZ, UPT"},  # the original was overwritten after one copy
        {7: copy.format("P3").replace("0x80", "0x8")},  # no copy: another function of the three
        {7: "@P0 " + copy.format("P3")},  # a copy at times
        {8: loop[8].replace("@P3", "@!P3")},  # the other case
    ):
        assert len(messages := report(wrong)) == 1, wrong
        assert "W_hh is loaded" in messages[0]


def test_code_that_is_not_understood() -> None:
    assert "the analysis does not understand" in check(listing(before=BEFORE.replace("+0x210", "+0x400")))[0]
    assert "no " in check(listing(end="NOP ;"))[0]
    with pytest.raises(ValueError, match="a jump that this cannot follow"):
        check(listing(end="BRX R2 -0x10 ;"))


def test_loops_by_other_means() -> None:
    """Back edges through BSYNC, whose BSSY says where it leads, and through a call to a label."""
    for end in ("@P0 CALL.REL.NOINC `(.L_x_1) ;", "BSSY B1, `(.L_x_1) ;\n BSYNC B1 ;"):
        text = listing(end="X").splitlines()
        at = next(i for i, line in enumerate(text) if line.endswith(" X"))
        text[at : at + 1] = [f"        /*0f{i}0*/   {line.strip()}" for i, line in enumerate(end.splitlines())]
        assert check("\n".join(text)) == []
