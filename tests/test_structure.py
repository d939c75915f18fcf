"""What holds for the tree as a whole: who imports whom, what stays lazy, how long files are, what the wheel contains."""

from __future__ import annotations

import ast
import csv
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "mixers", "lit_modules", "recipes")  # a package imports itself and those before it
FILES = [path for package in LAYERS for path in sorted((ROOT / package).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Import(NamedTuple):
    module: str
    line: int
    in_function: bool


def imports_of(source: str, package: str = "") -> Iterator[Import]:
    """Every import in `source`, those inside functions, of relative names and of dotted names in strings included."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(f"{module}.{alias.name}", node.lineno, in_function) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+(:\w+)?", node.value):
            yield Import(node.value.partition(":")[0], node.lineno, True)  # as import_module and registries take it
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


def imports_in(path: Path) -> list[Import]:
    return list(imports_of(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter that looks for packages in the repository root first."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- imports ---


def test_the_reader_of_imports_sees_all_of_them() -> None:
    source = "import a.b as c\nfrom d import e\ndef f():\n    from ..g import h\n    import_module('mixers.gdn2:GatedDeltaNet2')\n"
    expected = [("a.b", 1, False), ("d.e", 2, False), ("x.g.h", 4, True), ("mixers.gdn2", 5, True)]
    assert list(imports_of(source, "x.y")) == [Import(*found) for found in expected]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    above = LAYERS[LAYERS.index(package) + 1 :]
    wrong = [found for found in imports_in(path) if found.module.split(".")[0] in (*above, "tests")]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_triton_is_imported_only_by_kernels(path: Path) -> None:
    found = [x for x in imports_in(path) if x.module.split(".")[0] == "triton"]
    if re.fullmatch(r"kernels/\w+/_(triton|gluon)/\w+\.py", relative(path)):
        return
    if re.fullmatch(r"kernels/\w+/(op|forward|backward)\.py", relative(path)):
        found = [x for x in found if not x.in_function]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_lightning_is_imported_only_by_the_shell(path: Path) -> None:
    lightning = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
    found = [x for x in imports_in(path) if x.module.split(".")[0] in lightning]
    assert not found or relative(path).startswith(("lit_modules/", "recipes/"))


LIGHT = {
    "kernels": {"torch", "triton", "numpy", "lightning"},
    "mixers": {"torch", "triton", "numpy", "lightning"},
    "lit_modules": {"torch", "triton", "numpy", "lightning"},
    "recipes.__main__": {"torch", "triton", "numpy", "lightning"},
    "lit_modules.decoder_lm": {"triton", "lightning"},
    "kernels.delta.api": {"triton", "lightning"},
}


@pytest.mark.parametrize("module", LIGHT)
def test_light_imports(module: str) -> None:
    loaded = set(run_python(f"import {module}, sys; print(*sys.modules)").split())
    assert module in loaded
    assert not loaded & LIGHT[module]


def test_importing_every_module_of_kernels_and_mixers_loads_neither_triton_nor_lightning() -> None:
    paths = [path for path in FILES if relative(path).startswith(("kernels/", "mixers/")) and not {"_triton", "_gluon"} & set(path.parts)]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    modules = [m for m in modules if m not in ("mixers.testing", "mixers.contract")]  # a test module for plug-ins
    assert len(modules) > 10
    loaded = set(run_python(f"import sys; from importlib import import_module\nfor m in {modules}: import_module(m)\nprint(*sys.modules)").split())
    assert set(modules) <= loaded
    assert not loaded & {"triton", "lightning", "pytorch_lightning"}


def test_transformers_is_not_confused_by_the_name_of_our_package() -> None:
    """transformers looks for a package index package called `kernels` and finds our folder. It takes versions of a certain range for the real one:
    the probe must say no for ours."""
    code = """
import kernels, transformers
from pathlib import Path
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_kernels_available
import transformers.integrations.hub_kernels
assert Path(kernels.__file__) == Path("kernels/__init__.py").resolve(), kernels.__file__
assert callable(kernels.delta_rule)
config = AutoConfig.for_model("llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
transformers.AutoModelForCausalLM.from_config(config)
print(is_kernels_available(), is_flash_attn_2_available())
"""
    assert run_python(code) == "False False"


def test_a_name_that_kernels_does_not_have_is_an_import_error() -> None:
    code = "try:\n    from kernels import get_kernel\nexcept ImportError as error:\n    print(error)"
    assert "cannot import name 'get_kernel' from 'kernels'" in run_python(code)


# --- files ---


PYTHON_FILES = [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_files_are_short(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= (400 if relative(path).startswith("tests/") else 300)


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_forbidden_words(path: Path) -> None:
    source = path.read_text()
    assert "block_ptr" not in source, "block pointers are removed in triton 3.9: use pointers or tensor descriptors"
    bare = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler) and node.type is None]
    assert not bare, "name the exception"
    if relative(path).startswith(("kernels/", "mixers/")):
        assert not re.search(r"os\.environ|getenv", source), "an environment variable must not change a result"


def test_the_chunkwise_reference_is_ten_times_as_fast_as_the_recurrent_one() -> None:
    """In the committed table of tests/bench_reference.py, forward and backward."""
    with (ROOT / "docs/benchmarks/reference_cpu.csv").open() as table:
        rows = list(csv.DictReader(table))
    times = {(row["what"], row["impl"]): float(row["fwd_bwd_ms"]) for row in rows}
    assert {what for what, _ in times} == {"gdn2", "kda", "gdn", "deltanet", "gla"}
    for what in {what for what, _ in times}:
        assert times[what, "chunkwise"] * 10 <= times[what, "recurrent"], what
    assert all(row["gpu"] and row["torch"] and row["commit"] and row["date"] and int(row["tokens"]) >= 1024 for row in rows)


# --- the wheel ---


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that no build folder is left behind and none is read."""
    copy = tmp_path_factory.mktemp("source")
    for package in LAYERS:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (copy / "dist").iterdir()
    return built


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"lightning_mixers-{PROJECT['version']}-py3-none-any.whl"


def test_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {relative(path) for package in LAYERS for kind in ("*.py", "*.yaml", "*.md", "py.typed") for path in (ROOT / package).rglob(kind)}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {name.split("/")[0] for name in expected} == set(LAYERS)
    assert any(name.endswith(".yaml") for name in expected)
    assert {"kernels/delta/README.md", "kernels/py.typed", "mixers/py.typed", "lit_modules/py.typed"} <= names


def test_wheel_names_its_commands_and_its_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"lightning_mixers-{PROJECT['version']}.dist-info"
    points = archive.read(f"{info}/entry_points.txt").decode()
    assert "lightning-mixers = recipes.__main__:main" in points
    assert "lightning_mixers = mixers.pytest_plugin" in points
    assert archive.read(f"{info}/licenses/LICENSE").decode() == (ROOT / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in archive.read(f"{info}/METADATA").decode()


def test_version_is_that_of_the_newest_changelog_entry() -> None:
    entries = re.findall(r"^## \[?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries
    assert entries[0] == PROJECT["version"]
