"""The setting `backend` of both Mamba mixers: what it refuses, and that mamba_ssm's kernels get what they document (stand-ins of
`mamba_ssm_cases` in float64: outputs, gradients and states are those of delta)."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from cli_cases import CONFIG, here_fixture, one_thread  # noqa: F401
from mamba_ssm_cases import pretend
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mixers import mamba2, mamba3, mamba_ssm, registry, testing
from mixers.contract import Case, assert_close, error, inputs
from mixers.errors import ConfigError
from mixers.init import initialize
from recipes.__main__ import main

ROOT = Path(__file__).parents[1]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
D = 32
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("mamba2", {"head_dim": 16, "d_state": 8}),
    "mamba2-grouped": ("mamba2", {"head_dim": 8, "d_state": 16, "num_groups": 2}),
    "mamba3": ("mamba3", {"head_dim": 16, "d_state": 16}),
    "mamba3-grouped": ("mamba3", {"head_dim": 16, "d_state": 16, "num_groups": 2, "rope_fraction": 1.0, "out_norm": True}),
}
FUNCTION = {
    "mamba2": "ops.triton.ssd_combined:mamba_chunk_scan_combined",
    "mamba3": "ops.triton.mamba3.mamba3_siso_combined:mamba3_siso_combined",
}
sizes = pytest.mark.parametrize("case", SIZES)


@pytest.fixture(name="pretended")
def pretended_fixture(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return pretend(monkeypatch)


@pytest.fixture(name="possible")
def possible_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the package and a GPU, as far as constructors can see."""
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def built(case: str, backend: str, d_model: int = D) -> Any:
    """In float64, with every parameter away from its initial value."""
    name, settings = SIZES[case]
    mixer = registry.build(name, d_model, {name: {**settings, "backend": backend}}).double()
    initialize(mixer, 3)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.mul_(5 if parameter.ndim == 2 else 1).add_(0.3 * inputs(*parameter.shape, dtype=torch.float64, seed=50 + i))
    return mixer


# --- the same numbers ---


def results(mixer: Any, tokens: list[int] | int, carried: bool) -> dict[str, Tensor]:
    """Output, state and every gradient, of a batch or of one row of documents; `carried`: they go on from a state."""
    sequences = 2 if isinstance(tokens, int) else len(tokens)
    shape = (2, tokens, D) if isinstance(tokens, int) else (1, sum(tokens), D)
    x, ends, state = inputs(*shape, dtype=torch.float64).requires_grad_(), None, None
    if not isinstance(tokens, int):
        ends = torch.tensor([0, *tokens]).cumsum(0)
    if carried:
        state = mixer.init_state(sequences)
        state = type(state)(*(inputs(*t.shape, dtype=t.dtype, seed=20 + i).requires_grad_() for i, t in enumerate(state)))
    y, after = mixer(x, state, cu_seqlens=ends)
    assert (after is None) == (state is None)
    out = {"y": y, **({} if after is None else {f"state {name}": t for name, t in zip(after._fields, after, strict=True)})}
    sum((t * inputs(*t.shape, dtype=t.dtype, seed=30 + i)).sum() for i, t in enumerate(out.values())).backward()
    wanted = {"x": x, **dict(mixer.named_parameters()), **({} if state is None else {f"carried {n}": getattr(state, n) for n in state._fields})}
    return {name: t.detach() for name, t in out.items()} | {f"gradient of {name}": t.grad for name, t in wanted.items()}


@sizes
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, [1, 4, 1, 7]], ids=str)
def test_both_backends_give_the_same(case: str, tokens: list[int] | int, carried: bool, pretended: list[str]) -> None:
    expected = results(built(case, "delta"), tokens, carried)
    assert not pretended
    found = results(built(case, "mamba_ssm"), tokens, carried)
    assert set(pretended) == {FUNCTION[SIZES[case][0]]}
    gradients = [t.abs().max() for name, t in expected.items() if name.startswith("gradient")]
    for name, t in expected.items():
        assert_close(found[name], t, name, 1e-3 * float(max(gradients)) if name.startswith("gradient") else 1e-30)


@pytest.mark.usefixtures("pretended")
@sizes
def test_contract_with_mamba_ssm(case: str) -> None:
    """Prefill, steps, splits and packed documents fit each other. (One token alone: Mamba-3's u is then the rounding of h - zeta k v^T, not 0.)"""
    name, settings = SIZES[case]
    on_package = Case(case, (name,), {name: {**settings, "backend": "mamba_ssm"}}, 16)
    testing.test_any_split_equals_one_forward(on_package, torch.float64, [2, 2, -3, 1, 62, -2])
    testing.test_packed_equals_separate(on_package, torch.float64)
    testing.test_ragged_prompts(on_package, torch.float64)


@sizes
def test_a_state_goes_from_one_backend_to_the_other(case: str, pretended: list[str]) -> None:
    """A step is delta's with both."""
    ours, theirs, x = built(case, "delta"), built(case, "mamba_ssm"), inputs(2, 12, D, dtype=torch.float64)
    expected, _ = ours(x)
    _, state = theirs(x[:, :4], theirs.init_state(2))
    called = len(pretended)
    y, state = theirs.step(x[:, 4], state)
    assert len(pretended) == called
    assert_close(y, expected[:, 4], "step")
    middle, state = ours(x[:, 5:8], state)
    end, _ = theirs(x[:, 8:], state)
    assert_close(torch.cat([middle, end], 1), expected[:, 5:], "outputs")


@pytest.mark.usefixtures("pretended")
@sizes
def test_autocast_does_not_reach_the_kernels(case: str) -> None:
    """The stand-ins refuse to run under it."""
    mixer, x = built(case, "mamba_ssm").float(), inputs(1, 9, D, dtype=torch.float32)
    expected, _ = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mixer(x, mixer.init_state(1))
    assert error(y, expected) < 0.1


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("case", ["mamba2", "mamba3"])
def test_a_compiler_leaves_the_kernels_alone(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = built(case, "mamba_ssm"), inputs(1, 5, D, dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler would look for it
    expected = mixer(x)[0]
    compiler = CompileCounterWithBackend("eager")
    assert_close(torch.compile(mixer, backend=compiler)(x)[0], expected, "outputs")
    torch.compiler.reset()
    assert compiler.graphs
    assert not any("repeat_interleave" in str(graph.graph) for graph in compiler.graphs), "the stand-in was compiled"


# --- the choice ---


def test_auto_is_delta_where_the_package_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    table: dict[int, mamba_ssm.Resolved] = {64: "delta", 128: "mamba_ssm"}
    dtypes = (torch.bfloat16,)
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    small, large, larger = (mamba_ssm.choose("auto", table, d_state, None, dtypes) for d_state in (64, 65, 129))
    assert [c.resolve(CUDA, torch.bfloat16) for c in (small, large, larger)] == ["delta", "mamba_ssm", "delta"]
    assert large.resolve(CPU, torch.bfloat16) == large.resolve(CUDA, torch.float32) == large.resolve(CUDA, torch.bfloat16, 70_000) == "delta"
    assert mamba_ssm.choose("auto", table, 128, None, mamba_ssm.SSD_DTYPES).resolve(CUDA, torch.float32) == "delta"  # nobody asked for tf32
    assert mamba_ssm.choose("auto", table, 128, "MIMO", dtypes).resolve(CUDA, torch.bfloat16) == "delta"
    with monkeypatch.context() as patch:  # nobody asked for other bits in every run
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert large.resolve(CUDA, torch.bfloat16) == "delta"
        assert mamba_ssm.Choice("mamba_ssm", "mamba_ssm", None, dtypes).resolve(CUDA, torch.bfloat16) == "mamba_ssm"
    with monkeypatch.context() as patch:  # or for a break in a graph
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert large.resolve(CUDA, torch.bfloat16) == "delta"
    monkeypatch.setattr(mamba_ssm, "missing", lambda: "absent")
    assert mamba_ssm.choose("auto", table, 128, None, dtypes).resolve(CUDA, torch.bfloat16) == "delta"
    assert mamba_ssm.choose("delta", table, 128, None, dtypes).resolve(CUDA, torch.bfloat16) == "delta"


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(
    ("name", "device", "dtype", "sequences", "expected"),
    [
        ("mamba2", CPU, torch.float32, 1, "tensors are on cpu"),
        ("mamba3", CPU, torch.bfloat16, 1, "tensors are on cpu"),
        ("mamba2", CUDA, torch.float64, 1, "its kernels compute in float32, float16, bfloat16 here, not float64"),
        ("mamba3", CUDA, torch.float64, 1, "its kernels compute in bfloat16 here, not float64 (trainer.precision bf16-mixed gives bfloat16)"),
        ("mamba3", CUDA, torch.float32, 1, "its kernels compute in bfloat16 here, not float32"),
        ("mamba3", CUDA, torch.bfloat16, 65_536, "it takes 65,535 sequences at most, got 65,536"),
    ],
)
def test_tensors_that_do_not_fit(name: str, device: torch.device, dtype: torch.dtype, sequences: int, expected: str) -> None:
    mixer: Any = registry.build(name, 64, {name: {"backend": "mamba_ssm"}})
    with pytest.raises(ConfigError) as raised:
        mixer.kernels.resolve(device, dtype, sequences)
    assert str(raised.value).startswith(f"backend: mamba_ssm cannot run: {expected}")
    assert str(raised.value).endswith("; set backend to auto or delta")
    assert "\n" not in str(raised.value)
    assert mixer.kernels.resolve(CUDA, torch.bfloat16, 65_535) == "mamba_ssm"


@pytest.mark.parametrize(
    ("name", "batch", "tokens", "documents", "expected"),
    [
        ("mamba2", 1, 1, None, (1, "chunks")),
        ("mamba2", 3, 256, None, (3, "chunks")),
        ("mamba2", 3, 257, None, (6, "chunks")),
        ("mamba2", 1, 520, [0, 1, 2, 520], (3, "chunks")),
        ("mamba3", 3, 257, None, (3, "sequences")),
        ("mamba3", 1, 9, [0, 1, 2, 4, 9], (4, "sequences")),
    ],
)
def test_programs_of_a_forward_are_counted(
    name: str, batch: int, tokens: int, documents: list[int] | None, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a forward asks for: chunks of 256 tokens of all rows, or sequences, of which the grids take 65,535."""
    asked: list[tuple[int, str]] = []

    def resolve(_: mamba_ssm.Choice, __: torch.device, ___: torch.dtype, programs: int = 1, what: str = "sequences") -> mamba_ssm.Resolved:
        asked.append((programs, what))
        return "delta"

    monkeypatch.setattr(mamba_ssm.Choice, "resolve", resolve)
    mixer: Any = registry.build(name, 8, {name: {"head_dim": 8, "d_state": 8}})
    mixer(torch.zeros(batch, tokens, 8), cu_seqlens=None if documents is None else torch.tensor(documents))
    assert asked == [expected]


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_first_use_on_a_cpu(name: str) -> None:
    mixer = registry.build(name, 32, {name: {"backend": "mamba_ssm"}})
    with pytest.raises(ConfigError, match=r"^backend: mamba_ssm cannot run: tensors are on cpu; "):
        mixer(torch.zeros(1, 2, 32))


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("mamba2", {"head_dim": 4}, "its SSD kernels take a head_dim of at most 256 that is a multiple of 8, not 4"),
        ("mamba2", {"d_state": 264}, "its SSD kernels take a d_state of at most 256 that is a multiple of 8, not 264"),
        ("mamba3", {"head_dim": 8}, "its SISO kernels take a head_dim of 16, 32, 64 or 128, not 8"),
        ("mamba3", {"d_state": 48}, "its SISO kernels take a d_state of 16, 32, 64 or 128, not 48"),
        ("mamba3", {"rope_fraction": 0.1}, "its SISO kernels take an even number of angles, not 3 (int(d_state * rope_fraction) // 2)"),
        ("mamba3", {"mimo_rank": 4}, "its MIMO kernels need TileLang and are not used here (mimo_rank must be 1, not 4)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(name: str, settings: dict[str, Any], expected: str) -> None:
    """By name they are refused; auto takes delta."""
    with pytest.raises(ConfigError) as raised:
        registry.build(name, 64, {name: {**settings, "backend": "mamba_ssm"}})
    assert str(raised.value) == f"mixers.{name}.backend: mamba_ssm cannot run: {expected}; set backend to auto or delta"
    mixer: Any = registry.build(name, 64, {name: settings})
    assert mixer.kernels.resolve(CUDA, torch.bfloat16) == "delta"


@pytest.mark.usefixtures("possible")
@pytest.mark.parametrize(("name", "legal"), [("mamba2", (8, 24, 256)), ("mamba3", (16, 32, 64, 128))])
def test_sizes_that_fit(name: str, legal: tuple[int, ...]) -> None:
    """The smallest and the largest too."""
    for size in legal:
        for settings in ({"head_dim": size, "d_state": legal[0]}, {"head_dim": legal[0], "d_state": size}):
            mixer: Any = registry.build(name, size, {name: {**settings, "expand": legal[0], "backend": "mamba_ssm"}})
            assert mixer.kernels.resolve(CUDA, torch.bfloat16) == "mamba_ssm"


@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_backends_that_do_not_exist(name: str) -> None:
    cls = {"mamba2": mamba2.Mamba2, "mamba3": mamba3.Mamba3}[name]
    with pytest.raises(ConfigError, match=r"^backend: unknown backend 'triton' \(legal: auto, delta, mamba_ssm\)$"):
        cls(64, backend="triton")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^mixers.{name}.*backend.*triton") as raised:
        registry.build(name, 64, {name: {"backend": "triton"}})
    assert "\n" not in str(raised.value)


# --- the package ---


@pytest.mark.parametrize(
    ("absent", "expected"),
    [
        (("mamba_ssm",), "mamba-ssm is not installed: "),
        (("einops",), "einops is not installed: "),
        (("mamba_ssm", "einops", "triton"), "mamba-ssm and einops and triton are not installed: "),
    ],
    ids=str,
)
def test_missing_packages_are_named_with_the_command(absent: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None if name in absent else object())
    assert mamba_ssm.missing() == expected + mamba_ssm.INSTALL
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda _: object())
    assert mamba_ssm.missing() is None


def test_another_module_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual way past the package's `__init__`; a module without a spec, which `find_spec` does not take."""
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    for backend in ("auto", "delta"):
        assert mamba2.Mamba2(64, backend=backend).kernels.requested == backend  # type: ignore[arg-type]


def test_the_command_installs_the_version_of_the_extra() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["mamba"]
    assert mamba_ssm.INSTALL.split()[-2:] == extra
    assert mamba_ssm.INSTALL in (ROOT / "docs/recipes.md").read_text()


@pytest.fixture(name="package")
def package_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of this name whose `__init__` fails, as that of a build without nvcc does."""
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mamba_ssm"}
    for name in known:
        del sys.modules[name]
    (tmp_path / "mamba_ssm/ops").mkdir(parents=True)
    (tmp_path / "mamba_ssm/__init__.py").write_text("import selective_scan_cuda_of_nobody\n")
    (tmp_path / "mamba_ssm/ops/__init__.py").write_text("")
    (tmp_path / "mamba_ssm/ops/good.py").write_text("from mamba_ssm.ops.other import two\ndef run():\n    return two\n")
    (tmp_path / "mamba_ssm/ops/other.py").write_text("two = 2\n")
    (tmp_path / "mamba_ssm/ops/bad.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        del sys.modules[name]
    sys.modules.update(known)


def test_kernels_are_imported_past_the_package_s_init(package: Path) -> None:
    assert mamba_ssm.kernel("ops.good", "run")() == 2
    assert "mamba_ssm" not in sys.modules
    (package / "mamba_ssm/__init__.py").write_text("whole = True\n")
    import mamba_ssm as whole  # later and by itself it is the package itself

    assert whole.whole
    assert mamba_ssm.kernel("ops.good", "run")() == 2
    assert sys.modules["mamba_ssm"] is whole


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [("ops.bad", "run", "a_package_that_nobody_has"), ("ops.good", "walk", "has no attribute 'walk'"), ("ops.absent", "run", "mamba_ssm.ops.absent")],
)
def test_a_package_of_another_kind(module: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        mamba_ssm.kernel(module, name)
    message = str(raised.value)
    assert message.startswith("backend: mamba_ssm cannot be imported: ")
    assert reason in message
    assert message.endswith(mamba_ssm.INSTALL)
    assert "mamba_ssm" not in sys.modules


# --- the command line ---


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["fit", "--config", "mamba.yaml", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(name="_mamba")
def mamba_fixture(here: Path) -> None:
    lm = {**CONFIG["model"]["lm"], "d_model": 32, "layout": ["mamba2", "mamba3"], "mixers": {"mamba2": {}, "mamba3": {}}}
    (here / "mamba.yaml").write_text(yaml.safe_dump({**CONFIG, "model": {**CONFIG["model"], "lm": lm}}))


@pytest.mark.usefixtures("_mamba")
@pytest.mark.parametrize("name", ["mamba2", "mamba3"])
def test_the_line_that_a_user_reads(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, before any data are read; a GPU that is there but not used shows at the first use."""
    setting = f"--model.lm.mixers.{name}.backend=mamba_ssm"
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda _: None)
    line = refused(capsys, setting)
    assert line.startswith(f"error: model.lm.mixers.{name}.backend: mamba_ssm cannot run: mamba-ssm and einops and triton are not installed: pip ")
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, setting)
    assert f"{name}.backend: mamba_ssm cannot run: it needs a CUDA GPU, and torch finds none here; set backend to auto or delta" in line
    assert not Path("runs").exists()
    line = refused(capsys, f"--model.lm.mixers.{name}.backend=cuda")
    assert "backend" in line
    assert "cuda" in line
    monkeypatch.setattr(mamba_ssm.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("recipes.commands.gpu_ready.device_of", lambda _: None)
    line = refused(capsys, setting, "--trainer.accelerator=cpu")
    assert line == "error: backend: mamba_ssm cannot run: tensors are on cpu; set backend to auto or delta"
