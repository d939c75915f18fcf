"""docs/paper.md: the files, names and recipes of its tables exist, and a recipe that a row names goes through the code that the row names."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from cli_cases import plan_of

from mixers.init import initialize

ROOT = Path(__file__).parents[1]
RECIPES = {file.stem.removesuffix("_1.3b") for file in (ROOT / "recipes/paper").glob("*.yaml")}
TRACED = ("kernels/", "mixers/", "lit_modules/decoder_lm.py")
# Named in the table and met by no model on a CPU: constants, what runs on a GPU, and the recurrence that everything is compared with
ELSEWHERE = {
    ("mixers/layers.py", "MIXER_GAIN"),
    ("kernels/delta/reference.py", "recurrent"),
    ("kernels/delta/backward.py", "launch"),
    ("kernels/delta/backward.py", "score_gradients"),
    ("kernels/delta/scan.py", "backward"),
    ("kernels/delta/_triton/dscan.py", "dscan_kernel"),
    ("kernels/delta/_triton/dstates.py", "dstates_kernel"),
    ("kernels/delta/_gluon/dchunks.py", "dchunks_kernel"),
}
Place = tuple[str, str]  # a file and a name in it


class Row(NamedTuple):
    """A row of a table."""

    paper: str
    code: list[Place]  # the name is "" where a file stands alone
    tests: list[Place]
    recipes: set[str]


def places(cell: str) -> list[Place]:
    found = []
    for file, names in re.findall(r"`([\w/]+\.\w+)`(?:: ((?:`\w+`(?:, )?)+))?", cell):
        found += [(file, name) for name in re.findall(r"\w+", names)] or [(file, "")]
    return found


def recipes_of(cell: str, above: set[str]) -> set[str]:
    """What stands in the last column, whose words are: recipes, "their hybrids", "variants", "all hybrids", "all", "all but", "the same"."""
    cell = re.sub(r"\(.*?\)", "", cell)
    named = set(re.findall(r"`(\w+)`", cell))
    assert named <= RECIPES, f"no such recipes: {named - RECIPES}"
    rest = set(re.findall(r"[a-z]+", re.sub(r"`\w+`", "", cell))) - {"all", "but", "hybrids", "their", "and", "variants", "the", "same"}
    assert not rest, f"words that nobody reads: {rest}"
    if "their hybrids" in cell:
        named |= {f"{name}_hybrid" for name in named}
    if "variants" in cell:
        named |= {"gdn2_scalar_erase", "gdn2_scalar_write", "gdn2_erase_range_2"}
    if "all hybrids" in cell:
        named |= {name for name in RECIPES if name.endswith("_hybrid")}
    elif cell.startswith("all"):
        named = RECIPES - named
    return named | (above if "the same" in cell else set())


def table() -> list[Row]:
    rows: list[Row] = []
    for line in (ROOT / "docs/paper.md").read_text().splitlines():
        if line.startswith("| ") and "`" in line:
            paper, code, tests, recipes = line.removeprefix("| ").removesuffix(" |").split(" | ")
            rows.append(Row(paper, places(code), places(tests), recipes_of(recipes, rows[-1].recipes if rows else set())))
    return rows


def test_the_table_is_read() -> None:
    rows = table()
    assert len(rows) > 35
    assert all(row.code and row.tests and row.recipes for row in rows)
    assert any(("kernels/delta/scan.py", "") in row.code for row in rows)
    assert recipes_of("`gdn2`, `kda`, their hybrids and variants (of low rank)", set()) == {
        *("gdn2", "kda", "gdn2_hybrid", "kda_hybrid"),
        *("gdn2_scalar_erase", "gdn2_scalar_write", "gdn2_erase_range_2"),
    }
    assert recipes_of("all but `transformer`", set()) == RECIPES - {"transformer"}
    assert recipes_of("`transformer`, all hybrids", set()) == {"transformer", *(name for name in RECIPES if name.endswith("_hybrid"))}
    assert recipes_of("the same, `mamba2`", {"kda"}) == {"kda", "mamba2"}


@pytest.mark.parametrize(("file", "name"), sorted({place for row in table() for place in row.code + row.tests}))
def test_what_the_table_names_is_there(file: str, name: str) -> None:
    source = (ROOT / file).read_text()
    assert re.search(rf"^\s*(?:(?:async )?def|class) {name}\b|^{name}(?:: [^=]+)? = ", source, re.MULTILINE) if name else source


def gone_through(recipe: str) -> set[Place]:
    """Functions, and the classes of the objects whose methods run, when a recipe made tiny is built, trained on packed documents, and decodes."""
    found: set[tuple[Any, type | None]] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add((frame.f_code, type(frame.f_locals["self"]) if "self" in frame.f_locals else None))

    tokens, ends = torch.randint(0, 257, (1, 70), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 70])
    sys.setprofile(look)
    try:
        lm = plan_of(f"--config=paper/{recipe}_1.3b", "--config=tiny").model.lm.to_empty(device="cpu")
        initialize(lm, 0)
        lm.parameter_groups()
        lm(tokens, cu_seqlens=ends)[0].sum().backward()
        lm.step(tokens[:, 0], lm(tokens, lm.init_state(1, max_tokens=71))[1])
    finally:
        sys.setprofile(None)
    met = {(code.co_filename, name) for code, _ in found for name in code.co_qualname.split(".")}
    for base in {base for _, cls in found if cls for base in cls.__mro__}:
        met.add((getattr(sys.modules[base.__module__], "__file__", None) or "", base.__name__))
    return {(file.removeprefix(f"{ROOT}/"), name) for file, name in met}


def test_recipes_go_through_the_code_of_their_rows() -> None:
    rows, met = table(), {recipe: gone_through(recipe) for recipe in sorted(RECIPES)}
    wrong = [
        f"{row.paper}: {recipe} does not go through {file}: {name}"
        for row in rows
        for file, name in row.code
        if file.startswith(TRACED) and name and (file, name) not in ELSEWHERE
        for recipe in sorted(row.recipes)
        if (file, name) not in met[recipe]
    ]
    assert not wrong, "\n".join(wrong)
    assert {place for row in rows for place in row.code} >= ELSEWHERE, "no row names them any more"
    assert not ELSEWHERE & set.union(*met.values()), "they run after all"
