"""Tile tables: what they pick, and that every shipped tile compiles for every architecture and fits its shared memory, without a GPU.

Here for every kernel and tile the launch that asks for most; all of them: `make test-tiles`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import pytest
import torch

pytest.importorskip("triton")
import offline
import sass
from triton import knobs

from kernels import tiles
from kernels.tiles import ARCHITECTURES, SHARED_MEMORY, Key, Tile, TileTable

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


def test_kernels_compile_to_the_end_on_hopper(picked_and_launched: Find) -> None:
    """With the assembler, whose code is read for its known fault; the others stop before it. First, so that the next test finds these in Triton's
    cache."""
    _, found = picked_and_launched("sm_90")
    lost = {}
    for compilation in offline.representative(found):
        if not any(t == "*fp32" for t in list(compilation.signature.values())[:1]):
            lost[compilation.label] = sass.never_written(sass.instructions(compilation.compile().asm["cubin"]))
    assert lost
    assert not {label: found[:2] for label, found in lost.items() if found}


def test_a_lost_register_is_seen() -> None:
    """The lines are those of kernels that failed on an H100, and of their neighbours that did not."""
    good = [
        ("ULDC.64", ["UR8", "c[0x0][0x208]"]),
        ("LDG.E.128", ["R8", "desc[UR8][R8.64]"]),
        ("UIMAD.WIDE.U32", ["UR16", "UR8", "0x2", "URZ"]),
        ("UIADD3", ["UR18", "UP0", "UR16", "0x20", "URZ"]),
        ("UIADD3.X", ["UR19", "UR17", "-0x3ffffff0", "URZ", "UP0", "!UPT"]),
        ("HGMMA.64x32x16.F32", ["R40", "R80", "gdesc[UR16].tnspB", "RZ", "!UPT"]),
        ("HGMMA.64x32x16.F32", ["R40", "gdesc[UR16].tnspB", "R40"]),
    ]
    assert sass.never_written(iter(good)) == []
    assert sass.never_written(iter([*good[:3], ("UIADD3", ["UR18", "UP0", "UR18", "0x20", "URZ"])])) == ["UIADD3 UR18, UP0, UR18, 0x20, URZ"]
    assert sass.never_written(iter([("UPRMT", ["UR12", "UR15", "0x7732", "URZ"])])) == ["UPRMT UR12, UR15, 0x7732, URZ"]
    assert sass.never_written(iter([*good[:3], good[-1]])) != []


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
    assert {(table.op, kernel) for table in tables for kernel in table.safe} == {(op, kernel) for op, kernel, _ in picked}
