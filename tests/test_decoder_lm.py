"""The language model: layouts, states, packing, generation, initial values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lit_modules.decoder_lm import DecoderLM, Sampling, cycle_layout, sample
from mixers.contract import error
from mixers.errors import ConfigError

MIXERS: dict[str, dict[str, Any]] = {
    "gdn2": {"num_heads": 2, "head_dim": 8},
    "kda": {"num_heads": 2, "head_dim": 8},
    "attention": {"num_heads": 2},
    "swa": {"num_heads": 2, "window": 5},
    "local": {"mixer": "swa", "window": 3},
}


def make(layout: list[str], n_layers: int = 3, seed: int = 0) -> DecoderLM:
    return DecoderLM(50, 32, n_layers, 48, layout, MIXERS, init_std=0.3, seed=seed).double()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS = [["gdn2"], ["gdn2", "swa"], ["kda", "attention", "local"]]


def test_layout_is_cycled_over_the_layers() -> None:
    assert cycle_layout(["a", "b"], 5) == ["a", "b", "a", "b", "a"]
    lm = make(["gdn2", "local"], 4)
    assert [type(m).__name__ for m in lm.mixers()] == ["GatedDeltaNet2", "Attention"] * 2
    assert lm.mixers()[1].window == 3


@pytest.mark.parametrize("layout", LAYOUTS, ids="+".join)
def test_forwards_and_steps_equal_one_forward(layout: list[str]) -> None:
    lm, x = make(layout), tokens(2, 30)
    whole, none = lm(x)
    assert none is None
    first, state = lm(x[:, :13], lm.init_state(2, max_tokens=30))
    parts = [first]
    for t in range(13, 20):
        logits, state = lm.step(x[:, t], state)
        parts.append(logits.unsqueeze(1))
    last, state = lm(x[:, 20:], state)
    assert error(torch.cat([*parts, last], 1), whole) < 1e-10


@pytest.mark.parametrize("layout", LAYOUTS, ids="+".join)
def test_packed_documents_equal_separate_ones(layout: list[str]) -> None:
    lm, lengths = make(layout), [1, 2, 3, 20, 7]
    x = tokens(1, sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed, _ = lm(x, cu_seqlens=cu_seqlens)
    alone = torch.cat([lm(part)[0] for part in x.split(lengths, 1)], 1)
    assert error(packed, alone) < 1e-10
    gradients = []
    for logits in (packed, alone):
        lm.zero_grad()
        logits.logsumexp(-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in lm.named_parameters()})
    for name, g in gradients[0].items():
        assert error(g, gradients[1][name]) < 1e-10, name


@pytest.mark.parametrize("layout", LAYOUTS, ids="+".join)
def test_greedy_generation_is_the_argmax_of_a_forward(layout: list[str]) -> None:
    lm, prompt = make(layout), tokens(6)
    new = list(lm.generate(prompt, 12, sampling=Sampling(temperature=0)))
    text = torch.cat([prompt, torch.tensor(new)])
    assert torch.equal(lm(text.unsqueeze(0))[0][0, 5:-1].argmax(-1), torch.tensor(new))
    assert list(lm.generate(prompt, 12, sampling=Sampling(temperature=0), stop=new[3])) == new[: new.index(new[3])]


def test_generation_repeats_with_its_generator() -> None:
    lm, prompt = make(["gdn2", "swa"]), tokens(6)
    draws = [list(lm.generate(prompt, 10, generator=torch.Generator().manual_seed(s))) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="prompt"):
        next(lm.generate(torch.zeros(0, dtype=torch.long), 3))


def test_top_p_keeps_the_smallest_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in [(0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]:
        assert set(sample(logits, Sampling(1.0, top_p), generator).tolist()) == kept
    share = (sample(logits, Sampling(1.0, 0.8), generator) == 0).float().mean()
    assert abs(share - 0.5 / 0.8) < 0.03
    cold = (sample(logits, Sampling(0.5, 1.0), generator) == 0).float().mean()
    assert abs(cold - 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025)) < 0.03
    for bad in (Sampling(-1.0, 1.0), Sampling(1.0, 0.0), Sampling(1.0, 1.5)):
        with pytest.raises(ConfigError, match="temperature"):
            sample(logits, bad)


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    lm = make(["gdn2", "swa"])
    with torch.device("meta"):
        built_elsewhere = DecoderLM(50, 32, 3, 48, ["gdn2", "swa"], MIXERS, init_std=0.3)
    torch.manual_seed(7)
    built_elsewhere = built_elsewhere.to_empty(device="cpu")
    built_elsewhere.reset_parameters()
    deeper, other = make(["gdn2", "swa"], 5), make(["gdn2", "swa"], seed=1)
    for name, p in lm.named_parameters():
        assert torch.equal(p, built_elsewhere.get_parameter(name).double()), name
        scaled = name.endswith(("o_proj.weight", "mlp.down.weight"))  # by 1 / sqrt(2 * layers)
        assert scaled or torch.equal(p, deeper.get_parameter(name)), name
        assert name.endswith("norm.weight") or "bias" in name or not torch.equal(p, other.get_parameter(name)), name


def test_scales_of_initial_values() -> None:
    lm = DecoderLM(1000, 128, 8, 256, ["gdn2", "attention"], {"gdn2": {"num_heads": 4, "head_dim": 32}, "attention": {"num_heads": 4}})
    expected = {
        "embedding": 0.02,
        "head": 0.02,
        "layers.0.mlp.gate": 0.02,
        "layers.0.mlp.down": 0.02 / 4,
        "layers.1.mixer.q_proj": 0.02,
        "layers.1.mixer.o_proj": 0.02 / 4,
    }
    for name, std in expected.items():
        assert abs(lm.get_submodule(name).weight.std() / std - 1) < 0.03, name
    gain = 2**-2.5 * math.sqrt(2 / 256)
    assert abs(lm.get_submodule("layers.0.mixer.o_proj").weight.std() / gain - 1) < 0.03, "a recurrent mixer's last projection is not scaled"


def test_parameter_groups_cover_the_model() -> None:
    lm = make(["gdn2", "swa"])
    groups = lm.parameter_groups()
    names = dict(lm.named_parameters())
    assert groups.no_decay <= names.keys()
    assert groups.fp32 == {f"layers.{i}.mixer.decay.{n}" for i in (0, 2) for n in ("a", "delta")}
    assert all(p.ndim < 2 for n, p in names.items() if n in groups.no_decay)


def test_flops_and_state_add_up() -> None:
    lm = make(["gdn2", "swa"])
    head_and_mlps = 2 * 10 * (32 * 50 + 3 * 3 * 32 * 48)
    assert lm.flops(10) == sum(m.flops(10) for m in lm.mixers()) + head_and_mlps
    assert lm.state_numel(100) == sum(t.numel() for s in lm.init_state(1, max_tokens=100) for t in s if t.is_floating_point())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model: must be an integer >= 1"),
        ({"n_layers": -1}, "n_layers"),
        ({"n_layers": 1001}, "n_layers: must be at most 1,000, got 1,001"),
        ({"layout": []}, "layout"),
        ({"layout": ["gdn2"] * 4}, "layout: has 4 entries for n_layers = 3"),
        ({"layout": ["gnd2"]}, "did you mean 'gdn2'"),
        ({"mixers": {"gdn2": {"heads": 2}}}, "mixers.gdn2.heads"),
        ({"mixers": {"nothing": {}}}, "unknown mixer 'nothing'"),
        ({"mixers": {"attention": {"num_heads": 5}}, "layout": ["attention"]}, "mixers.attention.num_heads"),
    ],
)
def test_settings_that_cannot_be_used(change: dict[str, Any], message: str) -> None:
    settings = {"vocab_size": 50, "d_model": 32, "n_layers": 3, "mlp_width": 48, "layout": ["gdn2"], "mixers": MIXERS}
    with pytest.raises(ConfigError) as caught:
        DecoderLM(**{**settings, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
