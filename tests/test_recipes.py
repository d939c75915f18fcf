"""Every shipped recipe: the paper's sizes and training, and one step of each on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lit_cases import one_thread  # noqa: F401

from mixers.attention import Attention
from recipes.__main__ import main
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import RECIPES, collect, find_config, read_config, recipe_names
from recipes.commands.match import Match, solve
from recipes.commands.plan import Plan, make_plan
from recipes.commands.sizes import PRECISIONS, parameters_in_blocks, training_memory

PAPER = [name for name in recipe_names() if name.startswith("paper/")]
LAYOUTS = {
    "paper/gdn2_1.3b": ["gdn2"],
    "paper/gdn2_hybrid_1.3b": ["gdn2", "swa"],
    "paper/transformer_1.3b": ["attention"],
    "paper/kda_1.3b": ["kda"],
    "paper/kda_hybrid_1.3b": ["kda", "swa"],
    "paper/gdn_1.3b": ["gdn"],
    "paper/gdn_hybrid_1.3b": ["gdn", "swa"],
    "paper/mamba2_1.3b": ["mamba2"],
    "paper/mamba2_hybrid_1.3b": ["mamba2", "swa"],
    "paper/mamba3_siso_1.3b": ["mamba3"],
    "paper/mamba3_siso_hybrid_1.3b": ["mamba3", "swa"],
    "paper/mamba3_mimo_1.3b": ["mamba3"],
    "paper/mamba3_mimo_hybrid_1.3b": ["mamba3", "swa"],
    "paper/gdn2_scalar_erase_1.3b": ["gdn2"],
    "paper/gdn2_scalar_write_1.3b": ["gdn2"],
    "paper/gdn2_erase_range_2_1.3b": ["gdn2"],
}
RELEASED = {"paper/gdn2_1.3b": 1_302_638_112, "paper/gdn2_hybrid_1.3b": 1_300_314_384}  # parameters in the blocks
ABLATIONS = {  # Table 5
    "paper/gdn2_scalar_erase_1.3b": {"erase": "scalar"},
    "paper/gdn2_scalar_write_1.3b": {"write": "scalar"},
    "paper/gdn2_erase_range_2_1.3b": {"allow_neg_eigval": True},
}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    file = tmp_path / "corpus.txt"
    file.write_text("the cat sat on the mat and looked at the dog. " * 100)
    return ["--data.path", str(file), "--data.val_path", str(file)]


def parse(name: str, *arguments: str) -> tuple[MixersCLI, Plan]:
    cli = MixersCLI("preflight", collect(["--config", name, *arguments]))
    return cli, make_plan(cli.config, needs_tokenizer=False)


def test_the_paper_has_these_recipes() -> None:
    """The 13 rows of Table 2 and the three variants of Table 5."""
    assert sorted(LAYOUTS) == PAPER
    recurrent = ["mamba2", "gdn", "kda", "mamba3_siso", "mamba3_mimo", "gdn2"]
    table_2 = {"paper/transformer_1.3b", *(f"paper/{name}{kind}_1.3b" for name in recurrent for kind in ("", "_hybrid"))}
    assert len(table_2) == 13
    assert table_2 == set(PAPER) - set(ABLATIONS)
    assert {"quickstart", "tiny"} <= set(recipe_names())


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name: str) -> None:
    _, plan = parse(name)
    lm = plan.model.lm
    assert all(parameter.is_meta for parameter in lm.parameters())
    assert lm.settings["layout"] == LAYOUTS[name]
    assert (lm.settings["vocab_size"], lm.settings["d_model"], lm.settings["n_layers"]) == (32_000, 2304, 18)
    blocks = parameters_in_blocks(lm)
    assert blocks == RELEASED.get(name, blocks)
    assert abs(blocks / 1.3e9 - 1) < 0.005
    assert solve(lm, 1_300_000_000) == Match(lm.settings["mlp_width"], blocks, 1_300_000_000)
    assert f"{blocks:,}" in (RECIPES / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_one_setting(name: str) -> None:
    """Of the mixer; model, data and training are those of the full model."""
    expected = read_config(find_config("paper/gdn2_1.3b"))
    expected["model"]["lm"]["mixers"]["gdn2"] |= ABLATIONS[name]
    assert read_config(find_config(name)) == expected


@pytest.mark.parametrize("name", PAPER)
def test_state_of_the_paper(name: str) -> None:
    """The recurrent state is matched over all models (Mamba's at d_model 2048); attention has heads of 128 and, in hybrids, a window of 2048."""
    _, plan = parse(name)
    states = plan.model.lm.init_state(1, max_tokens=4096, device="meta")
    for mixer, state in zip(plan.model.lm.mixers(), states, strict=True):
        if isinstance(mixer, Attention):
            assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (18, 18, 128)
            assert mixer.window == (2048 if "hybrid" in name else None)
        else:
            S = state.u if "mamba3" in name else state.S
            assert S.numel() == (2 * 2304 * 64 if "mamba" in name else 16 * 128 * 128)
            assert S.dtype == torch.float32
            assert getattr(mixer, "mimo_rank", None) == (4 if "mimo" in name else 1 if "siso" in name else None)


@pytest.mark.parametrize("name", PAPER)
def test_training_of_the_paper(name: str) -> None:
    cli, plan = parse(name, "--trainer.devices=1")
    model, data, trainer = cli.config.model, cli.config.data, cli.config.trainer
    assert (model.lr, tuple(model.betas), model.weight_decay, model.final_lr_ratio) == (4e-4, (0.9, 0.95), 0.1, 0.1)
    assert (model.max_tokens, model.warmup_tokens) == (100_000_000_000, 1_000_000_000)
    assert data.seq_len == 4096
    assert trainer.val_check_interval == 1000 * trainer.accumulate_grad_batches
    assert plan.tokens_a_step == 524_288
    assert plan.steps == 190_735
    assert (trainer.gradient_clip_val, trainer.precision) == (1.0, "bf16-mixed")
    assert data.document_boundaries is True
    assert (data.path, data.tokenizer) == ("data/fineweb_edu", "tokenizer.model")
    lr = [plan.model.lr_at(tokens) for tokens in (500_000_000, 1_000_000_000, 100_000_000_000)]
    assert lr == pytest.approx([2e-4, 4e-4, 4e-5])


@pytest.mark.parametrize("name", PAPER)
def test_the_micro_batch_fits_a_gpu_of_80_gb(name: str) -> None:
    """79 GiB are left of it; the estimate is 1.5 to 4 % above what was seen (tests/test_cli.py), and memory falls to pieces."""
    cli, plan = parse(name, "--trainer.devices=1")
    shape = (cli.config.data.batch_size, cli.config.data.seq_len)
    assert 40 < training_memory(plan.model.lm, shape, PRECISIONS["bf16-mixed"]).total / 2**30 < 74


@pytest.mark.parametrize("name", [name for name in recipe_names() if name != "tiny"])
def test_every_recipe_takes_a_step_when_made_tiny(name: str, corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", name, "--config", "tiny", "--trainer.fast_dev_run=true", "--summary.max_new_tokens=3", *corpus]) == 0
    assert "step 1/1" in capsys.readouterr().out


def test_quickstart_takes_a_step_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """On the built-in corpus."""
    arguments = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--data.val_tokens=256", "--summary.max_new_tokens=3"]
    assert main(["fit", "--config", "quickstart", *arguments]) == 0
    assert "step 1/1" in capsys.readouterr().out


def test_quickstart_is_small() -> None:
    _, plan = parse("quickstart")
    assert 0.7e6 < sum(p.numel() for p in plan.model.lm.parameters()) < 1.5e6


def test_quickstart_has_settings_for_every_built_in_mixer() -> None:
    from mixers.registry import BUILT_IN

    for name in BUILT_IN:
        _, plan = parse("quickstart", "--model.lm.layout", f"[{name}]")
        assert set(plan.model.lm.layer_names) == {name}
        assert set(BUILT_IN) <= set(plan.model.lm.settings["mixers"])
