"""Checkpoints: what they hold, a model from one alone, and refusals in one line."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lit_cases import fit, make_batch, make_lit, make_lm, one_thread, saved  # noqa: F401

from lit_modules import checkpoint
from lit_modules.checkpoint import load_lm, read_checkpoint
from lit_modules.decoder_lm import DecoderLM
from lit_modules.lit_lm import LitLM
from mixers import mamba_ssm
from mixers.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice: no logger, few workers, ..


def test_a_model_comes_back_from_its_checkpoint_alone(tmp_path):
    lit = make_lit(make_lm(n_layers=2, layout=["gdn2", "swa"]))
    path = saved(tmp_path / "a.ckpt", lit, make_batch(0), max_steps=2)
    lm = load_lm(path)
    tokens = torch.arange(9).unsqueeze(0)
    assert torch.equal(lm(tokens)[0], lit.lm(tokens)[0])
    assert lm.settings == lit.lm.settings
    assert not lm.training
    assert all(p.requires_grad for p in lm.parameters())
    path.unlink()
    lm(tokens)  # nothing is read from the file any more


def test_a_checkpoint_holds_no_hyperparameters_that_could_override_the_command_line(tmp_path):
    lit = make_lit(lr=0.5)
    checkpoint = read_checkpoint(saved(tmp_path / "a.ckpt", lit, make_batch(0), max_steps=1))
    assert "hyper_parameters" not in checkpoint
    assert checkpoint["lm"] == lit.lm.settings
    assert checkpoint["lightning_mixers"] == {"format": 1, "tokens": 12}


def test_the_new_learning_rate_wins_over_the_checkpoints(tmp_path):
    path = saved(tmp_path / "a.ckpt", make_lit(lr=0.5), make_batch(0), max_steps=1)
    log = fit(make_lit(lr=0.25, max_tokens=10**12), make_batch(0), max_steps=2, ckpt_path=path)
    assert log.rows[0]["lr"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 16}, r"model\.lm\.d_model: .* has 8, the model has 16"),
        ({"vocab_size": 32}, r"model\.lm\.vocab_size: .* has 31, the model has 32"),
        ({"n_layers": 3}, r"model\.lm\.n_layers: "),
        ({"layout": ["gdn2", "attention"]}, r"model\.lm\.layout: .* has \['attention', 'swa'\], the model has \['gdn2', 'attention'\]"),
        ({"layout": ["attention"]}, r"model\.lm\.mixers\.attention\.window: .* has 4, the model has None"),
        (
            {"mixers": {"attention": {"num_heads": 4}, "swa": {"num_heads": 2, "window": 4}}},
            r"model\.lm\.mixers\.attention\.num_heads: .* has 2, the model has 4",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(settings, message, tmp_path):
    path = saved(tmp_path / "a.ckpt", make_lit(make_lm(n_layers=2, layout=["attention", "swa"])), make_batch(0), max_steps=1)
    other = make_lit(make_lm(**({"n_layers": 2, "layout": ["attention", "swa"]} | settings)))
    with pytest.raises(ConfigError, match=message) as error:
        fit(other, make_batch(0), max_steps=1, ckpt_path=path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_the_same_model_in_other_words_is_accepted(tmp_path):
    path = saved(tmp_path / "a.ckpt", make_lit(make_lm(n_layers=2, layout=["attention", "swa"])), make_batch(0), max_steps=1)
    words = {
        "layout": ["full", "local"],
        "mixers": {"full": {"mixer": "attention", "num_heads": 2}, "local": {"mixer": "swa", "num_heads": 2, "window": 4, "rope_theta": 1e4}},
        "seed": 5,
    }
    lit = make_lit(make_lm(n_layers=2, **words))
    fit(lit, make_batch(0), max_steps=1, ckpt_path=path)
    reference = load_lm(path)
    assert all(torch.equal(p, reference.get_parameter(name)) for name, p in lit.lm.named_parameters())


def test_files_that_are_no_checkpoint(tmp_path):
    good = saved(tmp_path / "good.ckpt", make_lit(), make_batch(0), max_steps=1)
    content = good.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "empty.ckpt").touch()
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("a", "b")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save({"state_dict": {}, "lm": SimpleNamespace(a=1)}, tmp_path / "code.ckpt")
    expected = {
        "missing.ckpt": "no such checkpoint",
        "": "is a folder",
        "cut.ckpt": "is truncated, or not a checkpoint",
        "text.ckpt": "is truncated, or not a checkpoint",
        "empty.ckpt": "is truncated, or not a checkpoint",
        "zip.ckpt": "cannot be read as a checkpoint",
        "list.ckpt": "it holds a list",
        "foreign.ckpt": "it has no key 'lightning_mixers'",
        "code.ckpt": "cannot be read as a checkpoint",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=message) as error:
            load_lm(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))
        assert "\n" not in str(error.value)


def test_checkpoints_with_something_wrong_inside(tmp_path):
    good = read_checkpoint(saved(tmp_path / "good.ckpt", make_lit(), make_batch(0), max_steps=1))

    def refused(message: str, **changes) -> None:
        torch.save(good | changes, tmp_path / "bad.ckpt")
        with pytest.raises(ConfigError, match=message) as error:
            load_lm(tmp_path / "bad.ckpt")
        assert str(error.value).startswith(str(tmp_path / "bad.ckpt"))
        assert "\n" not in str(error.value)

    refused("has format 2, this version reads up to 1", lightning_mixers={"format": 2, "tokens": 0})
    refused(r"the setting lm\.d_model is missing", lm={k: v for k, v in good["lm"].items() if k != "d_model"})
    refused(r"the setting lm\.depth is unknown", lm=good["lm"] | {"depth": 3})
    refused("unknown mixer 'nothing'", lm=good["lm"] | {"layout": ["nothing"]})
    refused("do not fit its settings.*Missing", state_dict={})
    refused("do not fit its settings.*size mismatch", lm=good["lm"] | {"mlp_width": 20})


def test_lightnings_own_loading_takes_the_checkpoint_too(tmp_path):
    lit = make_lit()
    path = saved(tmp_path / "a.ckpt", lit, make_batch(0), max_steps=1)
    again = LitLM.load_from_checkpoint(path, lm=make_lm(), weights_only=True)
    assert all(torch.equal(p, lit.lm.get_parameter(name)) for name, p in again.lm.named_parameters())
    assert again.tokens == 12


def test_the_backend_of_the_training_does_not_bind_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with mamba_ssm, read without it, and fit for a model of another backend."""
    settings = {"vocab_size": 9, "d_model": 16, "n_layers": 1, "mlp_width": 8, "layout": ["mamba2"]}
    mixers: dict[str, Any] = {"head_dim": 8, "d_state": 8}
    with monkeypatch.context() as patch:
        patch.setattr(mamba_ssm, "missing", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        lm = DecoderLM(**settings, mixers={"mamba2": {**mixers, "backend": "mamba_ssm"}})
    contents: dict[str, Any] = {"state_dict": {f"lm.{name}": value for name, value in lm.state_dict().items()}}
    checkpoint.write_header(contents, lm, 0)
    torch.save(contents, tmp_path / "mamba.ckpt")
    assert checkpoint.load_lm(tmp_path / "mamba.ckpt").settings["mixers"]["mamba2"]["backend"] == "auto"
    checkpoint.check_same_model(lm.settings, DecoderLM(**settings, mixers={"mamba2": mixers}).settings, "mamba.ckpt")
