"""Tile tables: what they pick, and that every shipped tile compiles for every architecture and fits its shared memory, without a GPU.

Here for every kernel and tile the launch that asks for most; all of them: `make test-tiles`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import offline
import sass
from triton import knobs

from kernels import tiles
from kernels.tiles import ARCHITECTURES, SHARED_MEMORY, Key, Tile, TileTable
from recipes.commands import checks, problems
from recipes.commands.problems import Shape

pytestmark = pytest.mark.skipif(bool(knobs.runtime.interpret), reason="Triton was loaded as an interpreter")
CPU = torch.device("cpu")
Find = Callable[[str], tuple[set[tuple[str, str, Key]], list[offline.Compilation]]]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "kernels")


# --- tables ---


def test_a_row_is_picked_and_a_safe_tile_where_there_is_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kernels")
    monkeypatch.setattr(tiles, "architecture", lambda _: "sm_90")
    safe, tuned = Tile(4, 1, {"BV": 32}), Tile(8, 3, {"BV": 64})
    table = TileTable("toy_op", {"forward": safe}, {"forward": {Key("sm_90", 2, 128): tuned}})
    assert table.pick("forward", CPU, 2, 128) is tuned
    assert not caplog.records
    assert [table.pick("forward", CPU, 4, 128) for _ in range(3)] == [safe] * 3
    assert [record.getMessage() for record in caplog.records] == ["toy_op: no measured tile of forward for sm_90, 4 bytes, size 128: a safe one runs"]
    assert tuned.options() == {"BV": 64, "num_warps": 8, "num_stages": 3}
    assert list(table.entries()) == [("forward", Key("sm_90", 2, 128), tuned)]


@pytest.mark.parametrize("op", offline.tables())
def test_shipped_tables_are_well_formed(op: str) -> None:
    table = offline.tables()[op]
    for tile in (*table.safe.values(), *(tile for _, _, tile in table.entries())):
        assert tile.num_warps in (1, 2, 4, 8, 16)
        assert 1 <= tile.num_stages <= 8
    for kernel, key, tile in table.entries():
        assert key.architecture in ARCHITECTURES
        assert tile.blocks.keys() == table.safe[kernel].blocks.keys(), "a tuned tile sets what the safe one sets"


# --- compiled without a GPU ---


def toy_launch(architecture: str, size: int, stages: int, *, aligned: bool = True) -> offline.Compilation:
    from toy_kernel import toy

    a, b, c = (torch.zeros(size * size + 1) for _ in "abc")
    with offline.launches(architecture) as found:
        toy[(1,)](a if aligned else a[1:], b, c, 7, N=size, num_warps=4, num_stages=stages)
        toy[(2,)](a if aligned else a[1:], b, c, 8, N=size, num_warps=4, num_stages=stages)  # another length: nothing new
    (launch,) = found.values()
    return launch


def test_a_launch_is_recorded_as_triton_would_compile_it() -> None:
    launch = toy_launch("sm_90", 16, 2)
    assert launch.signature == {"a": "*fp32", "b": "*fp32", "c": "*fp32", "tokens": "i32", "N": "constexpr"}
    assert (launch.options["num_warps"], launch.options["num_stages"]) == (4, 2)
    assert launch.attributes[(0,)]  # divisible by 16
    assert not toy_launch("sm_90", 16, 2, aligned=False).attributes[(0,)]
    assert "toy *fp32 {'N': 16} warps 4 stages 2 on sm_90" in launch.label


def test_what_does_not_fit_is_found() -> None:
    assert offline.too_large(toy_launch("sm_90", 64, 5)) is None
    complaint = offline.too_large(toy_launch("sm_86", 64, 5))
    assert complaint is not None
    assert "bytes of shared memory, 101,376 are there" in complaint


def test_the_most_demanding_launches_represent_the_others() -> None:
    found = [toy_launch("sm_90", size, stages) for size in (16, 32) for stages in (1, 2)]
    assert {launch.label.partition("{")[2] for launch in offline.representative(found)} == {
        "'N': 32} warps 4 stages 1 on sm_90",
        "'N': 32} warps 4 stages 2 on sm_90",
    }


def test_limits_are_known_for_every_architecture() -> None:
    assert SHARED_MEMORY.keys() == set(ARCHITECTURES)


@pytest.fixture(scope="module")
def picked_and_launched() -> Find:
    @cache
    def find(architecture: str) -> tuple[set[tuple[str, str, Key]], list[offline.Compilation]]:
        """The rows that the launchers look for on an architecture, and what they launch."""
        picked: set[tuple[str, str, Key]] = set()
        pick = TileTable.pick

        def watched(table: TileTable, kernel: str, device: torch.device, itemsize: int, size: int) -> Tile:
            picked.add((table.op, kernel, Key(architecture, itemsize, size)))
            return pick(table, kernel, device, itemsize, size)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TileTable, "pick", watched)
            return picked, list(offline.record(architecture, offline.trials()).values())

    return find


def of_every_size(found: list[offline.Compilation]) -> list[offline.Compilation]:
    """Of every kernel, width of inputs, tile, K x V and kind of token (ranks, a weight of its own) the launch with the widest gates. Fewer than four
    warps make no products of the kind that is at fault: one size stands for all, and none in float32."""

    def kind(one: offline.Compilation) -> tuple[Any, ...]:
        constants = {one.kernel.arg_names[path[0]]: value for path, value in one.constants.items()}
        warps = one.options["num_warps"]
        sizes = [constants.get(name) for name in ("K", "V", "BK", "BV", "OWN", "R") if warps >= 4]
        return one.kernel.__module__, one.kernel.__name__, is_full(one), warps, one.options["num_stages"], *sizes

    def is_full(one: offline.Compilation) -> bool:
        return next(iter(one.signature.values())) == "*fp32"

    chosen = [one for one in found if not is_full(one) or ("PRECISION" in one.kernel.arg_names and one.options["num_warps"] >= 4)]
    by_gates = sorted(chosen, key=lambda one: sum(value for value in one.constants.values() if isinstance(value, int)))
    return list({kind(one): one for one in by_gates}.values())


def test_kernels_compile_to_the_end_on_hopper(picked_and_launched: Find) -> None:
    """With the assembler, whose code is read for its known fault; the others stop before it. First, so that the next test finds these in Triton's
    cache."""
    _, found = picked_and_launched("sm_90")
    chosen = of_every_size(found)
    assert chosen
    assert not {one.label: faults[:2] for one in chosen if (faults := faults_of(one))}


def faults_of(launch: offline.Compilation) -> list[str]:
    code = launch.compile().asm
    if "STAGES" in launch.kernel.arg_names and "wgmma" in code["ptx"]:  # a ring of buffers for products
        return sass.lost_operands(code["ptx"], code["cubin"], launch.options["num_warps"])
    return sass.faults(code["ptx"], code["cubin"], launch.options["num_warps"])


def dscores_launch(G: int, K: int, V: int, BK: int) -> offline.Compilation:
    """One with 64 value columns a block and 8 warps; such a tile was shipped once."""
    from kernels.delta._triton.dscores import dscores_kernel

    numbers: dict[str, Any] = {"K": K, "V": V, "C": 64, "G": G, "B": 2, "BK": BK, "BV": 64, "PACKED": False, "EXACT": False, "PRECISION": "tf32"}
    numbers |= dict.fromkeys(("S_Q", "S_K", "S_G", "S_B"), 2 * K) | {"S_O": 2 * V} | dict.fromkeys(("H", "HV", "HG", "HB"), 2)
    numbers |= {"scale": 0.1, "tokens": 130, "per_sequence": 3, "sequences": 1}
    half, full = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    with offline.launches("sm_90") as found:
        arguments = {name: numbers.get(name, full if name in ("sums", "rest", "dg") else half) for name in dscores_kernel.arg_names}
        dscores_kernel[(1,)](**arguments, num_warps=8, num_stages=1)
    (launch,) = found.values()
    return launch


@pytest.mark.parametrize(
    ("launch", "what"),
    [
        # on an H100: garbage in dk and dg, illegal reads. The registers were written, with something else
        ({"G": 2, "K": 64, "V": 64, "BK": 32}, r"HGMMA\.64x16x16.* reads \? for 0x8000002000000280"),
        ({"G": 2, "K": 16, "V": 64, "BK": 16}, r"UIADD3 .* reads what was never written"),
    ],
)
def test_lost_registers_are_found(launch: dict[str, int], what: str) -> None:
    assert any(re.search(what, line) for line in faults_of(dscores_launch(**launch)))


def test_sound_code_is_not_complained_about() -> None:
    """Right on an H100, of the kernel and the tile that failed at other sizes."""
    assert faults_of(dscores_launch(G=2, K=128, V=128, BK=32)) == []


def test_a_loop_is_walked_until_its_condition_fails_or_twice() -> None:
    """In PTX and in machine code; the second product's descriptor is wrong from the second turn on."""
    ptx = """.entry
        mov.b32 %r1, global_smem;
        shr.u32 %r1, %r1, 4;
        mov.b32 %r2, 0;
    $L_1:
        cvt.u64.u32 %rd1, %r1;
        or.b64 %rd2, %rd1, 4611686293305294848;
        wgmma.mma_async.sync {%r5}, {%r6}, %rd2, 0, 1, 1, 0;
        add.s32 %r2, %r2, 1;
        setp.lt.u32 %p1, %r2, 3;
        @%p1 bra $L_1;
    """.replace("    $L", "$L")
    lines = [
        ("S2UR", "UR5", "SR_CgaCtaId"),
        ("UMOV", "UR4", "0x400"),
        ("ULEA", "UR4", "UR5", "UR4", "0x18"),
        ("USHF.R.U32.HI", "UR6", "URZ", "0x4", "UR4"),
        ("UMOV", "UR7", "0x40000040"),
        ("UMOV", "UR8", "URZ"),
        ("HGMMA.64x16x16.F32.BF16", "R24", "R40", "gdesc[UR4]", "R24"),
        ("UIADD3", "UR8", "UR8", "0x1", "URZ"),
        ("UISETP.LT.U32.AND", "UP0", "UPT", "UR8", "0x3", "UPT"),
        ("PLOP3.LUT", "P0", "PT", "PT", "PT", "UP0", "0x80", "0x0"),
    ]
    code = [sass.Line("", "", operation, operands) for operation, *operands in lines]
    code = [*code[:6], sass.Line(".L_1", "", "", [""]), *code[6:], sass.Line("", "P0", "BRA", ["`(.L_1)"])]
    right = [[0x40000040 << 32 | 0x40]] * 3
    assert [found for _, found in sass.Ptx(0).products(sass.ptx_code(ptx))] == right
    assert [found for _, found in sass.Machine(0).products(code)] == right
    clobbered = [*code[:-1], sass.Line("", "", "ULDC", ["UR6", "c[0x0][0x210]"]), code[-1]]
    assert [found for _, found in sass.Machine(0).products(clobbered)] == [right[0], [None], [None]]
    unknown = [*code[:-2], code[-1]]
    assert [found for _, found in sass.Machine(0).products(unknown)] == right[:2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile_fits(architecture: str, picked_and_launched: Find) -> None:
    _, found = picked_and_launched(architecture)
    complaints = [complaint for complaint in map(offline.too_large, offline.representative(found)) if complaint]
    assert not complaints


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_and_every_safe_tile_is_launched(architecture: str, picked_and_launched: Find) -> None:
    """By a check of recipes/commands/checks.py, and so by `doctor` too."""
    picked, _ = picked_and_launched(architecture)
    assert {op for op, _, _ in picked} == offline.tables().keys()
    tables = offline.tables().values()
    rows = {(table.op, kernel, key) for table in tables for kernel, key, _ in table.entries() if key.architecture == architecture}
    assert not rows - picked
    here = {(table.op, kernel) for table in tables for kernel in table.safe if architecture == "sm_90" or not kernel.endswith("_hopper")}
    assert here == {(op, kernel) for op, kernel, _ in picked}


# --- what a training launches is tried before ---

DELTAS = ("gdn2", "kda", "gdn", "deltanet", "gla")
TRAININGS = [  # heads, K, V, groups
    *((mixer, (16, 128, 128, 1)) for mixer in DELTAS),
    ("gdn2", (4, 32, 32, 1)),
    ("gdn2", (4, 256, 256, 1)),
    ("kda", (8, 64, 64, 1)),
    ("gdn", (6, 128, 256, 1)),
    ("gla", (4, 64, 128, 1)),
    ("linear_attention", (8, 64, 65, 1)),
    ("mamba2", (1, 64, 64, 72)),
    ("mamba2", (1, 128, 64, 72)),
]
CHANGED = ("K", "V", "G", "B", "W", "PACKED", "BV", "BK", "SAVE", "INITIAL")


def instances(found: Iterable[offline.Compilation]) -> set[tuple[Any, ...]]:
    """Kernels, the settings that change what they do, and the dtypes of their gates."""

    def described(one: offline.Compilation) -> tuple[Any, ...]:
        constants = {one.kernel.arg_names[path[0]]: value for path, value in one.constants.items()}
        return one.kernel.__module__, *(constants.get(name) for name in CHANGED), *(one.signature.get(name) for name in ("g", "b", "w"))

    return set(map(described, found))


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize(("mixer", "sizes"), TRAININGS)
def test_every_kernel_that_a_training_launches_is_tried_before_it(architecture: str, mixer: str, sizes: tuple[int, ...]) -> None:
    """Packed documents, 1 to 32 sequences and a long one, in bfloat16, with gradients and without, by the trials that `fit` runs for such heads."""
    heads, k_dim, v_dim, groups = sizes
    trials = checks.select(["delta_rule"], [torch.bfloat16], [k_dim], {mixer}, {mixer: {(k_dim, v_dim)}})
    tried = instances(offline.record(architecture, trials).values())
    with offline.launches(architecture) as launched:
        long = (1, checks.LONG, False)
        for batch, tokens, packed in ((1, 70, True), (1, 70, False), (2, 70, False), (4, 70, False), (8, 70, False), (32, 70, False), long):
            shape = Shape(batch, tokens, heads, k_dim, v_dim, groups)
            offline.launch(problems.delta_rule(mixer, shape, problems.Draw(), packed=packed), torch.bfloat16)
    assert not instances(launched.values()) - tried
