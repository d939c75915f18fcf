"""The contract over every registered mixer, its variants and hybrids; then what is particular to each, against code written a second time."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import fan_out, registry
from mixers.attention import Attention
from mixers.contract import error, small_settings
from mixers.delta import DeltaMixer
from mixers.errors import ConfigError
from mixers.gdn2 import GatedDeltaNet2
from mixers.init import initialize
from mixers.layers import DecayGate, Linear, rotate
from mixers.mamba2 import Mamba2
from mixers.mamba3 import Mamba3
from mixers.testing import *  # noqa: F403
from mixers.testing import pytest_generate_tests  # noqa: F401

D = 24


def built(name: str, **settings: object) -> torch.nn.Module:
    mixer = registry.build(name, D, {name: settings}).double()
    initialize(mixer, 3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return mixer


def naive_conv(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution, tap by tap; x [T, C], weight [C, W]."""
    taps = weight.shape[1]
    rows = [sum(weight[:, taps - 1 - j] * x[t - j] for j in range(taps) if t >= j) for t in range(x.shape[0])]
    return F.silu(torch.stack(rows))


def naive_layer(m: DeltaMixer, x: Tensor) -> Tensor:
    """The layer of the paper's section 3.5 and appendix C.1 for one sequence x [T, D], token by token and head by head."""
    H, HV, K, V = m.num_heads, m.num_v_heads, m.head_dim, m.v_head_dim
    qw, kw, vw = m.conv.weight.split([H * K, H * K, HV * V])
    q = naive_conv(x @ m.q_proj.weight.T, qw).view(-1, H, K)
    k = naive_conv(x @ m.k_proj.weight.T, kw).view(-1, H, K)
    v = naive_conv(x @ m.v_proj.weight.T, vw).view(-1, HV, V)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    gates = m.gates(x)
    heads = []
    for j in range(HV):
        S, i, out = torch.zeros(K, V, dtype=x.dtype), j // (HV // H), []
        pick = [None if t is None else t[:, j if t.shape[1] == HV else i] for t in gates]
        for t in range(x.shape[0]):
            g, b, w = (torch.tensor(fill, dtype=x.dtype) if gate is None else gate[t] for gate, fill in zip(pick, (0.0, 0.0, 1.0), strict=True))
            erase = torch.eye(K, dtype=x.dtype) - torch.outer(k[t, i], (b * k[t, i]).expand(K))
            S = erase @ (g.exp().expand(K).unsqueeze(1) * S) + torch.outer(k[t, i], (w * v[t, j]).expand(V))
            out.append(S.T @ (q[t, i] / math.sqrt(K)))
        heads.append(torch.stack(out))
    o = torch.stack(heads, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.norm.weight
    first, second = m.gate_proj
    gate = (x @ first.weight.T) @ second.weight.T + second.bias
    return (o.flatten(1) * F.silu(gate)) @ m.o_proj.weight.T


@pytest.mark.parametrize("name", ["gdn2", "kda", "gdn", "deltanet"])
@pytest.mark.parametrize("v_heads", [2, 4])
def test_delta_layers_against_the_paper(name: str, v_heads: int) -> None:
    mixer = built(name, num_heads=2, head_dim=6, num_v_heads=v_heads, v_head_dim=5)
    x = torch.randn(21, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, _ = mixer(x.unsqueeze(0))
    assert error(y[0], naive_layer(mixer, x)) < 1e-10


def test_gdn2_gates() -> None:
    """g = -exp(a) softplus(f + delta); b, w sigmoids; their means and the range [0, 2] as settings."""
    x = torch.randn(5, D, dtype=torch.float64)
    plain = built("gdn2", num_heads=2, head_dim=6, num_v_heads=4, v_head_dim=5)
    g, b, w = plain.gates(x)
    f = (x @ plain.f_proj[0].weight.T @ plain.f_proj[1].weight.T + plain.decay.delta).view(5, 2, 6)
    assert error(g, -plain.decay.a.exp().view(2, 1) * torch.log1p(f.exp())) < 1e-10
    assert error(b, torch.sigmoid(x @ plain.b_proj.weight.T).view(5, 2, 6)) < 1e-12
    assert error(w, torch.sigmoid(x @ plain.w_proj.weight.T).view(5, 4, 5)) < 1e-12
    switched = built("gdn2", num_heads=2, head_dim=6, num_v_heads=4, v_head_dim=5, erase="scalar", write="scalar", allow_neg_eigval=True)
    assert [p.shape for p in switched.parameters()] == [p.shape for p in plain.parameters()]
    _, b_scalar, w_scalar = switched.gates(x)
    assert error(b_scalar, 2 * b.mean(-1, keepdim=True)) < 1e-12
    assert error(w_scalar, w.mean(-1, keepdim=True)) < 1e-12


def test_family_differs_only_in_gates() -> None:
    shapes = {n: {k: p.shape for k, p in built(n, num_heads=2, head_dim=6).named_parameters()} for n in ("gdn2", "kda", "gdn", "deltanet")}
    gates = ("b_proj", "w_proj", "f_proj", "beta_proj", "decay")
    shared = {n: {k: v for k, v in s.items() if not k.startswith(gates)} for n, s in shapes.items()}
    assert shared["gdn2"] == shared["kda"] == shared["gdn"] == shared["deltanet"]
    assert {k for k in shapes["deltanet"] if k.startswith(gates)} == {"beta_proj.weight"}
    assert shapes["gdn"]["decay.delta"] == (2,)
    assert shapes["kda"]["decay.delta"] == (12,)


RECURRENT: dict[str, tuple[str, dict[str, object]]] = {
    **{name: (name, {"num_heads": 4, "head_dim": 32}) for name in ("gdn2", "kda", "gdn", "deltanet")},
    **{name: (name, {"num_heads": 4}) for name in ("gla", "linear_attention")},
    **{"mamba2": ("mamba2", {}), "mamba3": ("mamba3", {}), "mamba3-mimo": ("mamba3", {"mimo_rank": 4})},
}


@pytest.mark.parametrize("label", RECURRENT)
def test_linears_of_recurrent_mixers_begin_with_the_papers_gain(label: str) -> None:
    """Xavier-uniform with gain 2^-2.5, biases 0."""
    name, settings = RECURRENT[label]
    mixer = registry.build(name, 256, {name: settings})
    initialize(mixer, 0)
    linears = [module for module in mixer.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) > 1
    for module in linears:
        bound = 2**-2.5 * math.sqrt(6 / (module.in_features + module.out_features))
        assert 0.95 * bound < module.weight.abs().max() <= bound, module
        assert abs(module.weight.std() / (bound / math.sqrt(3)) - 1) < 0.05, module
        assert module.bias is None or not module.bias.any(), module


def test_gdn2_parameters_and_initial_values() -> None:
    """The published size of a layer, exp(a) in [1, 16], softplus(delta) in [1e-4, 0.1]."""
    with torch.device("meta"):
        assert sum(p.numel() for p in GatedDeltaNet2(2304).parameters()) == 29_454_480
    mixer = GatedDeltaNet2(256, num_heads=4, head_dim=32)
    initialize(mixer, 0)
    dt = F.softplus(mixer.decay.delta)
    assert (mixer.decay.a.exp() >= 1).all()
    assert (mixer.decay.a.exp() <= 16).all()
    assert (dt >= 0.999e-3).all()
    assert (dt <= 0.1001).all()
    assert 0.2 < (dt < 0.01).float().mean() < 0.8, "log-uniform: half of the steps are below 0.01"
    assert {n for n, p in mixer.named_parameters() if n.endswith("bias")} == {"gate_proj.1.bias"}
    assert mixer.norm.norm.weight.shape == (32,)


@pytest.mark.parametrize("name", ["gdn2", "kda", "gdn"])
def test_decay_parameters_take_no_weight_decay_and_stay_fp32(name: str) -> None:
    groups = built(name, num_heads=2, head_dim=6).parameter_groups()
    assert groups.fp32 == {"decay.a", "decay.delta"}
    assert groups.no_decay == {"decay.a", "decay.delta", "gate_proj.1.bias", "norm.norm.weight"}
    mixer = registry.build(name, D, {name: {"num_heads": 2, "head_dim": 6}}).bfloat16()
    assert mixer.gates(torch.randn(3, D, dtype=torch.bfloat16)).g.dtype == torch.float32


def test_decay_gate_survives_extremes() -> None:
    gate = DecayGate(2, 3)
    g = gate(torch.tensor([[-1e4] * 3 + [1e4] * 3]))
    assert (g <= 0).all()
    assert g.isfinite().all()


DELTA_RULE = 3 * 4 * 8 * 5  # S'^T e, k r^T, S^T q: a multiply-add per number of the state


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, DELTA_RULE) for name in ("gdn2", "kda", "gdn", "deltanet")] + [("gla", 2 * 2 * 8 * 5), ("linear_attention", 2 * 2 * 8 * 9)],
)
def test_flops_of_the_recurrence(name: str, rule: int) -> None:
    sizes = {"num_heads": 2, "head_dim": 8}
    sizes |= {"num_v_heads": 4, "v_head_dim": 5} if rule == DELTA_RULE else {"v_head_dim": 5} if name == "gla" else {}
    mixer = built(name, **sizes)
    linear = sum(m.in_features * m.out_features for m in mixer.modules() if isinstance(m, Linear))
    conv = mixer.conv.weight.numel() if hasattr(mixer, "conv") else 0
    assert mixer.flops(10) == 2 * 10 * (linear + conv + rule)


@pytest.mark.parametrize(("name", "window"), [("attention", None), ("swa", 4)])
def test_flops_of_attention(name: str, window: int | None) -> None:
    """q k^T and p v for every pair that the mask lets through, counted one by one."""
    mixer = built(name, num_heads=4, num_kv_heads=2, head_dim=6, **({} if window is None else {"window": window}))
    pairs = sum(min(t + 1, window or 10) for t in range(10))
    linear = sum(m.in_features * m.out_features for m in mixer.modules() if isinstance(m, Linear))
    assert mixer.flops(10) == 2 * (10 * linear + pairs * 4 * 6 * 2)


def test_gla_against_its_equation() -> None:
    mixer = built("gla", num_heads=2, head_dim=6, v_head_dim=4)
    x = torch.randn(9, D, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(9, 2, -1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    first, second = mixer.f_proj
    alpha = torch.sigmoid(x @ first.weight.T @ second.weight.T + second.bias).view(9, 2, 6) ** (1 / 16)
    S, out = torch.zeros(2, 6, 4, dtype=x.dtype), []
    for t in range(9):
        S = alpha[t].unsqueeze(-1) * S + k[t].unsqueeze(-1) * v[t].unsqueeze(-2)
        out.append((S * q[t].unsqueeze(-1)).sum(-2) / 6**0.5)
    o = torch.stack(out)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * F.silu(x @ mixer.gate_proj.weight.T).view(9, 2, 4)
    assert error(mixer(x.unsqueeze(0))[0][0], o.flatten(1) @ mixer.o_proj.weight.T) < 1e-10


def test_linear_attention_against_its_equation() -> None:
    mixer = built("linear_attention", num_heads=2, head_dim=6)
    x = torch.randn(9, D, dtype=torch.float64)
    q, k, v = ((x @ p.weight.T).view(9, 2, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    scores = torch.einsum("thd,shd->hts", F.elu(q) + 1, F.elu(k) + 1).tril()
    o = torch.einsum("hts,shd->thd", scores / (scores.sum(-1, keepdim=True) + 1e-6), v)
    assert error(mixer(x.unsqueeze(0))[0][0], o.flatten(1) @ mixer.o_proj.weight.T) < 1e-10


@pytest.mark.parametrize("window", [None, 1, 2, 5, 11, 12, 13])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_against_a_loop(window: int | None, kv_heads: int) -> None:
    mixer: Attention = built("attention", num_heads=4, num_kv_heads=kv_heads, head_dim=6, window=window)
    x = torch.randn(12, D, dtype=torch.float64)
    position = torch.arange(12).unsqueeze(0)
    q, k, v = ((x @ p.weight.T).view(1, 12, -1, 6) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k, v = rotate(q, position, 10000.0)[0], rotate(k, position, 10000.0)[0], v[0]
    rows = []
    for t in range(12):
        low = 0 if window is None else max(0, t - window + 1)
        for h in range(4):
            j = h // (4 // kv_heads)
            rows.append((k[low : t + 1, j] @ q[t, h] / 6**0.5).softmax(0) @ v[low : t + 1, j])
    o = torch.stack(rows).view(12, 24)
    assert error(mixer(x.unsqueeze(0))[0][0], o @ mixer.o_proj.weight.T) < 1e-10


def test_rotary_positions_are_relative_and_exact_far_out() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = (rotate(q, torch.tensor([[5]]), 1e4) * rotate(k, torch.tensor([[2]]), 1e4)).sum()
    far = (rotate(q, torch.tensor([[1_000_005]]), 1e4) * rotate(k, torch.tensor([[1_000_002]]), 1e4)).sum()
    assert abs(near - far) < 1e-8
    assert torch.equal(rotate(q, torch.tensor([[0]]), 1e4), q)
    in_fp32 = rotate(q.float(), torch.tensor([[1_000_003]]), 1e4)
    assert error(in_fp32, rotate(q, torch.tensor([[1_000_003]]), 1e4)) < 1e-6


@pytest.mark.parametrize("name", sorted(registry.available()))
def test_mixers_can_be_pickled_and_refuse_tokens_of_another_width(name: str) -> None:
    mixer = built(name, **small_settings(name, {}))
    x = torch.randn(2, 5, D, dtype=torch.float64)
    assert torch.equal(pickle.loads(pickle.dumps(mixer))(x)[0], mixer(x)[0])
    state = mixer.init_state(2, max_tokens=8)
    for bad in (x[:, :1], x[:, 0, :-1], x[0]):
        with pytest.raises(ValueError, match=r"^[^\n]*shape \[[^\n]*\]$|holds? 2 sequences|must hold"):
            mixer.step(bad, state)


@pytest.mark.parametrize("name", sorted(registry.available()))
def test_states_of_another_kind_and_caches_without_fractions_are_refused(name: str) -> None:
    mixer, x = built(name, **small_settings(name, {})), torch.randn(2, 3, D, dtype=torch.float64)
    kind = type(mixer.init_state(2, max_tokens=4))
    others = [built(other, **small_settings(other, {})).init_state(2, max_tokens=4) for other in ("gdn2", "gla", "mamba3", "attention")]
    for state in [tuple(mixer.init_state(2, max_tokens=4)), *(other for other in others if type(other) is not kind)]:
        message = f"{type(mixer).__name__}: the state must be a {kind.__name__}, got a {type(state).__name__}"
        for call in (lambda: mixer(x, state), lambda: mixer.step(x[:, 0], state)):  # noqa: B023
            with pytest.raises(ValueError, match=message):
                call()
    with pytest.raises(ValueError, match=f"^{type(mixer).__name__}: a step needs a state, of init_state, forward or the step before, got None$"):
        mixer.step(x[:, 0], None)
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"):
        with pytest.raises(TypeError, match=r"init_state: dtype must be one of torch\.float64, torch\.float32, "):
            mixer.init_state(2, max_tokens=4, dtype=dtype)
    for batch_size in (0, -1, 2.0):
        with pytest.raises(ValueError, match="init_state: batch_size must be an integer >= 1, got"):
            mixer.init_state(batch_size, max_tokens=4)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        *((cls, {"conv_size": n}, "conv_size: must be an integer >= 2, got ") for cls in (GatedDeltaNet2, Mamba2) for n in (1, 2.5, "4", None, True)),
        (GatedDeltaNet2, {"allow_neg_eigval": "no"}, "allow_neg_eigval: must be true or false, got 'no'"),
        (GatedDeltaNet2, {"erase": "scaler"}, r"erase: unknown gate 'scaler'; did you mean 'scalar'\? \(legal: channel, scalar\)"),
        (GatedDeltaNet2, {"write": None}, "write: unknown gate 'None'"),
        (Mamba3, {"out_norm": "no"}, "out_norm: must be true or false, got 'no'"),
    ],
    ids=str,
)
def test_constructors_check_what_a_config_cannot_hold(cls: type[torch.nn.Module], settings: dict[str, object], message: str) -> None:
    """A config's types are checked before; somebody who calls the class gets the same kind of line, and nothing passes for true."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        cls(64, **settings)


def test_full_attention_cache_does_not_overflow_silently() -> None:
    mixer = built("attention", num_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="max_tokens"):
        mixer.init_state(1)
    state = mixer.init_state(1, max_tokens=3)
    _, state = mixer(torch.zeros(1, 3, D, dtype=torch.float64), state)
    with pytest.raises(ValueError, match="holds 3 tokens"):
        mixer.step(torch.zeros(1, D, dtype=torch.float64), state)


def test_initialize_refuses_what_it_cannot_set() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(2))

    class Forgetful(Bare):
        def reset_parameters(self) -> None:
            pass

    with pytest.raises(TypeError, match="no reset_parameters"):
        initialize(Bare(), 0)
    with pytest.raises(ValueError, match="leaves it unset"):
        initialize(Forgetful(), 0)


# --- products that are taken together ---


def readers(*widths: int) -> list[Linear]:
    return [Linear(6, width, init=lambda weight: weight.normal_()).double() for width in widths]


@pytest.mark.parametrize("narrow", [0, 4, 512])
@pytest.mark.parametrize("tokens", [6, 7])
def test_layers_that_read_one_input_are_the_layers_one_by_one(monkeypatch: pytest.MonkeyPatch, tokens: int, narrow: int) -> None:
    """With few tokens and with many, in products of their own or shared ones; also where only some outputs or leaves have gradients."""
    monkeypatch.setattr(fan_out, "NARROW", narrow)
    a, b, c, d, e = layers = readers(4, 4, 3, 5, 2)
    x = torch.randn(1, tokens, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(layer.weight for layer in layers)]
    together = fan_out.fan_out(x, (a, b), c, d, e)
    apart = [torch.cat([a(x), b(x)], -1), c(x), d(x), e(x)]
    for used in ([0, 1, 2, 3], [1], [0, 2], [3, 2]):
        wanted = leaves if len(used) == 4 else leaves[::-1][-3:]
        found, expected = (
            torch.autograd.grad(sum(y[i].square().sum() for i in used), wanted, materialize_grads=True, retain_graph=True) for y in (together, apart)
        )
        for got, exact in zip((*together, *found), (*apart, *expected), strict=True):
            assert (got - exact).abs().max() < 1e-13
    assert fan_out.fan_out(x.detach(), a, d)[1].grad_fn is not None  # weights alone have gradients
    (frozen,) = fan_out.fan_out(x, e.requires_grad_(False))
    assert error(torch.autograd.grad(frozen.sum(), x)[0], e.weight.sum(0).expand(1, tokens, 6)) < 1e-14


def test_a_layer_that_is_more_than_its_weight_is_called() -> None:
    a, b, c = readers(4, 4, 3)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    calls: list[int] = []
    handle = b.register_forward_hook(lambda *_: calls.append(1))
    assert error(fan_out.fan_out(x, (a, b), c)[0].detach(), torch.cat([a(x), b(x)], -1).detach()) < 1e-14
    assert calls == [1, 1]
    handle.remove()
    wrapped = torch.nn.Sequential(c, torch.nn.ReLU())
    assert torch.equal(fan_out.fan_out(x, (a, b), wrapped)[1], c(x).relu())


@pytest.mark.parametrize("name", ["gdn2", "kda"])
def test_autocast_casts_a_mixers_input_once(name: str) -> None:
    """Also an input that is no parameter, whose casts autocast does not remember; the output is that of a rounded input."""
    mixer = built(name, num_heads=2, head_dim=8).float()
    x = torch.randn(1, 40, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
    casts: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (casts.append(t.data_ptr()) if t.shape[-2:] == (40, D) else None, t)[1], lambda t: t):
            y = mixer(2 * x)[0]
        assert torch.equal(y, mixer((2 * x.detach()).bfloat16())[0])
    assert len(set(casts)) == 1
    (dx,) = torch.autograd.grad(y.float().sum(), x)
    assert dx.dtype == torch.float32
    assert dx.isfinite().all()
