"""Mamba-3 against its recurrence, written out token by token, head by head, pair by pair (mixers/mamba3.md)."""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.rotary.reference import turns, wrapped
from mixers import registry
from mixers.contract import assert_close, error, inputs
from mixers.errors import ConfigError
from mixers.init import initialize
from mixers.mamba3 import MAMBA_SSM, Mamba3, Mamba3State

D, T = 8, 11
LONG = 70  # more than a chunk of the delta rule
SIZES = {"head_dim": 4, "d_state": 8}
LAYERS: dict[str, dict[str, Any]] = {
    "siso": {},
    "siso-all-rotated": {"rope_fraction": 1.0, "num_groups": 2, "out_norm": True},
    "rank-2": {"mimo_rank": 2, "rope_fraction": 0.25},
    "mimo": {"mimo_rank": 4},
    "mimo-all-rotated": {"mimo_rank": 4, "rope_fraction": 1.0, "num_groups": 2, "out_norm": True},
    "other-constants": {"mimo_rank": 2, "out_norm": True, "norm_eps": 0.1, "a_floor": 0.7},
}


def built(**settings: Any) -> Mamba3:
    """In float64, with every parameter away from its initial value."""
    mixer = Mamba3(D, **{**SIZES, **settings}).double()
    initialize(mixer, 3)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.mul_(5 if parameter.ndim == 2 else 1).add_(0.3 * inputs(*parameter.shape, dtype=torch.float64, seed=50 + i))
    return mixer


layers = pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)


def published(mixer: Mamba3) -> dict[str, Tensor]:
    """The parameters under the names of mamba_ssm.modules.mamba3.Mamba3."""
    own = dict(mixer.named_parameters())
    return {name: own[ours] for name, ours in MAMBA_SSM.items() if ours in own}


def turned(x: Tensor, angle: Tensor, neighbours: bool) -> Tensor:
    """x [K, ..] with a pair of channels turned by each angle."""
    out, half = list(x.unbind()), x.shape[0] // 2
    for i, theta in enumerate(angle):
        a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + half)
        out[a], out[b] = x[a] * theta.cos() - x[b] * theta.sin(), x[a] * theta.sin() + x[b] * theta.cos()
    return torch.stack(out)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


class Direct(NamedTuple):
    y: Tensor  # [T, D]
    h: Tensor  # [H, K, V] after the last token
    angle: Tensor  # [H, A]


def direct(m: Mamba3, x: Tensor, settings: dict[str, Any], *, turn_the_state: bool = False) -> Direct:
    """h_t = a_t h_{t-1} + eta_t x_{t-1} + zeta_t x_t with rotated keys and queries; or with plain ones and a state that turns the other way."""
    W, pairs, eps, a_floor = published(m), m.mimo_rank == 1, settings.get("norm_eps", 1e-5), settings.get("a_floor", 1e-4)
    H, P, K, R, G, A = m.num_heads, m.head_dim, m.d_state, m.mimo_rank, m.num_groups, m.num_angles
    one = torch.ones(H, R, P, dtype=x.dtype)
    up, gate, down = (W.get(name, one) for name in ("mimo_x", "mimo_z", "mimo_o"))
    h, before, angle = [torch.zeros(K, P, dtype=x.dtype)] * H, [torch.zeros(K, P, dtype=x.dtype)] * H, torch.zeros(H, A, dtype=x.dtype)
    rows = []
    for token in x:
        z, v, B, C, f, a, trap, theta = (W["in_proj.weight"] @ token).split([H * P, H * P, R * G * K, R * G * K, H, H, H, A])
        z, v, B, C = z.view(H, P), v.view(H, P), B.view(R, G, K), C.view(R, G, K)
        delta = torch.log1p((f + W["dt_bias"]).exp())
        alpha = (-torch.log1p(a.exp()).clamp_min(a_floor) * delta).exp()
        lam = 1 / (1 + (-trap).exp())
        eta, zeta = (1 - lam) * delta * alpha, lam * delta
        turn = math.pi * theta.tanh() * delta.unsqueeze(1)
        angle = angle + turn
        y = []
        for j in range(H):
            keys = [rms(B[r, j // (H // G)], W["B_norm.weight"], eps) + W["B_bias"][j, r] for r in range(R)]
            queries = [rms(C[r, j // (H // G)], W["C_norm.weight"], eps) + W["C_bias"][j, r] for r in range(R)]
            if turn_the_state:
                h[j], before[j] = turned(h[j], -turn[j], pairs), turned(before[j], -turn[j], pairs)
            else:
                keys, queries = ([turned(u, angle[j], pairs) for u in side] for side in (keys, queries))
            now = sum(torch.outer(keys[r], up[j, r] * v[j]) for r in range(R))
            h[j] = alpha[j] * h[j] + eta[j] * before[j] + zeta[j] * now
            before[j], out = now, 0
            for r in range(R):
                o = h[j].T @ queries[r] + W["D"][j] * up[j, r] * v[j]
                if "norm.weight" in W:
                    o = rms(o, W["norm.weight"].view(H, P)[j], eps)
                out = out + o * F.silu(z[j] * gate[j, r]) * down[j, r]
            y.append(out)
        rows.append(W["out_proj.weight"] @ torch.cat(y))
    return Direct(torch.stack(rows), torch.stack(h), angle)


def assert_state(mixer: Mamba3, state: Mamba3State, expected: list[Direct], what: str) -> None:
    """h = u + zeta sum_r k_r v_r^T and the angle are the recurrence's, of every sequence."""
    for n, end in enumerate(expected):
        v = state.v[n] if mixer.mimo_rank == 1 else state.v[n] * mixer.mimo_x.weight.transpose(0, 1)
        last = torch.einsum("rhk,rhv->hkv", state.k[n], v.expand(mixer.mimo_rank, -1, -1))
        assert_close(state.u[n] + state.zeta[n, :, None, None] * last, end.h, f"h of {what}, sequence {n}")
        assert_close(state.angle[n], wrapped(end.angle), f"angle of {what}, sequence {n}")


def gradients(mixer: Mamba3, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    mixer.zero_grad()
    x.grad = None
    (y * inputs(*y.shape, dtype=y.dtype, seed=9)).sum().backward()
    return {"input": x.grad.clone(), **{name: p.grad.clone() for name, p in mixer.named_parameters()}}


@pytest.mark.parametrize(("name", "tokens"), [*product(LAYERS, (1, 2, T)), ("siso", LONG), ("mimo", LONG)])
def test_forward_and_gradients_against_the_recurrence(name: str, tokens: int) -> None:
    settings = LAYERS[name]
    mixer, x = built(**settings), inputs(tokens, D, dtype=torch.float64).requires_grad_()
    y, expected = mixer(x.unsqueeze(0))[0][0], direct(mixer, x, settings).y
    assert_close(y, expected, "outputs")
    ours, theirs = gradients(mixer, y, x), gradients(mixer, expected, x)
    largest = max(float(g.abs().max()) for g in theirs.values())
    for what, g in theirs.items():
        assert g.any() or tokens == 1, f"{what} has no part in the output"
        assert_close(ours[what], g, f"gradient of {what}", 1e-3 * largest)


@layers
def test_rotated_keys_are_a_state_that_turns(settings: dict[str, Any]) -> None:
    """The rotation as Mamba-3 has it in its state-space model: the state turns, keys and queries stay."""
    mixer, x = built(**settings), inputs(T, D, dtype=torch.float64)
    assert_close(mixer(x.unsqueeze(0))[0][0], direct(mixer, x, settings, turn_the_state=True).y, "outputs")


@layers
def test_the_state_is_the_recurrence_s_without_the_last_write(settings: dict[str, Any]) -> None:
    """h_T = u_T + zeta_T sum_r k_r v_r^T, and the sum of all angles; the same after steps."""
    mixer, x = built(**settings), inputs(T, D, dtype=torch.float64)
    expected = direct(mixer, x, settings)
    y, state = mixer(x.unsqueeze(0), mixer.init_state(1))
    stepped, rows = mixer.init_state(1), []
    for token in x:
        o, stepped = mixer.step(token.unsqueeze(0), stepped)
        rows.append(o)
    for what, outputs, s in (("forward", y[0], state), ("steps", torch.cat(rows), stepped)):
        assert_close(outputs, expected.y, f"outputs of {what}")
        assert_state(mixer, s, [expected], what)


@layers
@pytest.mark.parametrize("carried", [False, True])
def test_packed_documents_against_the_recurrence(settings: dict[str, Any], carried: bool) -> None:
    """Every document by itself, with its final state and gradients; `carried`: each goes on from tokens that came before it."""
    lengths = [1, 4, 1, 2, 3]
    mixer, x = built(**settings), inputs(1, sum(lengths), D, dtype=torch.float64).requires_grad_()
    prefix = inputs(len(lengths), 3, D, dtype=torch.float64, seed=4).requires_grad_()
    ends = torch.tensor([0, *lengths]).cumsum(0)
    state = mixer(prefix, mixer.init_state(len(lengths)))[1] if carried else None
    y, after = mixer(x, state, cu_seqlens=ends)
    after = after or mixer(x, mixer.init_state(len(lengths)), cu_seqlens=ends)[1]  # without a state none comes back
    documents = [torch.cat([prefix[i], part]) if carried else part for i, part in enumerate(x[0].split(lengths))]
    alone = [direct(mixer, document, settings) for document in documents]
    expected = torch.cat([a.y[-n:] for a, n in zip(alone, lengths, strict=True)])
    assert_close(y[0], expected, "outputs")
    assert_state(mixer, after, alone, "the state")
    ours, theirs = gradients(mixer, y[0], x), gradients(mixer, expected, x)
    for name, g in theirs.items():
        assert_close(ours[name], g, f"gradient of {name}")


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [1e12, math.nan])
def test_documents_do_not_reach_each_other(rank: int, dtype: torch.dtype, factor: float) -> None:
    """A document between others of huge numbers or NaN, with a loss of its own: output, its input's gradient and state are to the bit those beside
    ordinary ones, and those of the document alone (whose matrix products have fewer rows, and other roundings)."""
    mixer, x, weights = built(mimo_rank=rank).to(dtype), inputs(1, 84, D, dtype=dtype), inputs(1, 9, D, dtype=dtype, seed=2)

    def results(x: Tensor, ends: list[int], span: slice, document: int) -> list[Tensor]:
        x, state = x.clone().requires_grad_(), mixer.init_state(len(ends) - 1)
        y, after = mixer(x, state, cu_seqlens=torch.tensor(ends))
        (y[:, span] * weights).sum().backward()
        return [y[:, span], x.grad[:, span], *(t[document] for t in after)]

    ends, span = [0, 70, 79, 84], slice(70, 79)
    wild = torch.cat([factor * x[:, :70], x[:, span], factor * x[:, 79:]], 1)
    found, ordinary, alone = results(wild, ends, span, 1), results(x, ends, span, 1), results(x[:, span], [0, 9], slice(9), 0)
    for i, (t, beside, by_itself) in enumerate(zip(found, ordinary, alone, strict=True)):
        assert torch.equal(t, beside), f"result {i}"
        assert_close(t, by_itself, f"result {i}")


def test_steps_at_the_ends_of_their_ranges() -> None:
    """A stays at the floor or below it; lambda goes to 0 and 1 without leaving [0, 1]; a turn is at most pi Delta."""
    step_size = built().step_size
    ends = torch.tensor([-1e4, -50.0, 50.0, 1e4], dtype=torch.float64)
    delta = F.softplus(step_size.dt_bias)
    g, zeta, behind, theta, step = step_size(torch.zeros(4, dtype=torch.float64), ends, ends, ends[[0, 3]])
    assert_close(g, -torch.tensor([1e-4, 1e-4, 50, 1e4], dtype=torch.float64) * delta, "g")
    assert_close(step, delta.expand(4), "step size")
    assert_close(zeta + behind, delta, "both weights")
    assert_close(zeta / delta, torch.tensor([0, math.exp(-50), 1, 1], dtype=torch.float64), "lambda")
    assert_close(turns(theta, step), math.pi * torch.tensor([-1, 1], dtype=torch.float64) * delta.unsqueeze(1), "turn")


# --- parameters ---


@pytest.mark.parametrize("rank", [1, 4])
def test_parameters_are_those_of_mamba_ssm(rank: int) -> None:
    """Names and shapes as its constructor makes them; initial values as it draws them (projections: ours)."""
    d, n, p, r, g, mimo = 32, 16, 8, rank, 2, rank > 1
    heads, angles = 2 * d // p, n // 4
    shapes = {
        "in_proj.weight": (2 * 2 * d + 2 * n * g * r + 3 * heads + angles, d),
        "dt_bias": (heads,),
        "B_bias": (heads, r, n),
        "C_bias": (heads, r, n),
        "B_norm.weight": (n,),
        "C_norm.weight": (n,),
        **(dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (heads, r, p)) if mimo else {}),
        "D": (heads,),
        "norm.weight": (2 * d,),
        "out_proj.weight": (d, 2 * d),
    }
    mixer = Mamba3(d, head_dim=p, d_state=n, num_groups=g, mimo_rank=r, out_norm=True)
    initialize(mixer, 0)
    own = published(mixer)
    assert {name: tuple(t.shape) for name, t in own.items()} == shapes
    assert len(own) == len(list(mixer.parameters()))
    for name, value in {"B_bias": 1, "C_bias": 1, "D": 1, "norm.weight": 1, "mimo_x": 1 / r, "mimo_z": 1, "mimo_o": 1 / r}.items():
        assert name not in own or (own[name] == value).all()
    assert (F.softplus(own["dt_bias"]) > 0.999e-3).all()
    assert (F.softplus(own["dt_bias"]) < 0.1001).all()
    kept = {MAMBA_SSM[name] for name in ("dt_bias", "B_bias", "C_bias", "D", *(("mimo_x", "mimo_z", "mimo_o") if mimo else ()))}
    assert mixer.parameter_groups().fp32 == kept
    assert mixer.parameter_groups().no_decay == kept | {"B_norm.weight", "C_norm.weight", "norm.weight"}


@pytest.mark.parametrize("settings", [{}, {"dt_min": 0.02, "dt_max": 0.5}, {"dt_min": 0.01, "dt_max": 0.4, "dt_floor": 0.05}], ids=str)
def test_first_step_sizes_are_as_set(settings: dict[str, float]) -> None:
    """Log-uniform from dt_min to dt_max and raised to dt_floor, by quantiles of 512 heads; an audit gets the same bounds."""
    least, most, floor = {"dt_min": 0.001, "dt_max": 0.1, "dt_floor": 1e-4, **settings}.values()
    mixer = Mamba3(256, **{**SIZES, "head_dim": 1, **settings})
    initialize(mixer, 0)
    share = torch.linspace(0, 1, 9, dtype=torch.float64)
    expected = (least * (most / least) ** share).clamp_min(floor)
    assert error(F.softplus(mixer.step_size.dt_bias.double()).quantile(share).log(), expected.log()) < 0.05
    bounds = torch.tensor(mixer.step_size.initial_ranges()["dt_bias"], dtype=torch.float64)
    assert_close(F.softplus(bounds), expected[[0, -1]], "bounds")


@layers
def test_weights_load_from_mamba_ssm(settings: dict[str, Any]) -> None:
    source, x = built(**settings), inputs(1, T, D, dtype=torch.float64)
    target = Mamba3(D, **{**SIZES, **settings}).double()
    target.load_mamba_ssm({name: value.detach() for name, value in published(source).items()})
    assert torch.equal(target(x)[0], source(x)[0])


def test_state_dicts_that_do_not_fit() -> None:
    mixer = built(mimo_rank=2)
    good = {name: value.detach() + 1 for name, value in published(mixer).items()}
    before = [p.clone() for p in mixer.parameters()]
    bad = [
        ({name: value for name, value in good.items() if name != "mimo_x"}, r"has no tensor mimo_x \(it has: B_bias,"),
        ({}, r"has no tensor in_proj.weight \(it has: none\)"),
        ({**good, "B_bias": good["B_bias"][:, :1]}, r"B_bias has the shape \[4, 1, 8\], this layer's is \[4, 2, 8\]"),
        ({**good, "norm.weight": torch.ones(16)}, r"has tensors that this layer does not have: norm.weight \(legal: in_proj.weight, dt_bias,"),
    ]
    for state_dict, message in bad:
        with pytest.raises(ConfigError, match=f"state dict of mamba_ssm: {message}") as caught:
            mixer.load_mamba_ssm(state_dict)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, mixer.parameters(), strict=True)), "a refused state dict changed the layer"


# --- settings and sizes ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mimo_rank": 0}, "mimo_rank: must be an integer >= 1, got 0"),
        ({"rope_fraction": 0.0}, r"rope_fraction: must be in \[0.25, 1\] \(one pair of 8 channels at least\), got 0.0"),
        ({"rope_fraction": float("nan")}, r"rope_fraction: must be in .*, got nan"),
        ({"rope_fraction": float("inf")}, r"rope_fraction: must be in .*, got inf"),
        ({"rope_fraction": 1.5}, r"rope_fraction: must be in \[0.25, 1\] \(one pair of 8 channels at least\), got 1.5"),
        ({"rope_fraction": 0.2}, r"rope_fraction: must be in \[0.25, 1\] \(one pair of 8 channels at least\), got 0.2"),
        ({"head_dim": 3}, r"head_dim: 3 does not divide expand \* d_model = 16 channels \(legal: 1, 2, 4, 8, 16\)"),
        ({"num_groups": 3}, r"num_groups: 3 does not divide the 4 heads \(expand \* d_model / head_dim\) \(legal: 1, 2, 4\)"),
        ({"head_dim": 33, "expand": 10**9}, r"head_dim: 33 does not divide expand .* \(legal: 1, 2, .*, 125, \.\.\.\)"),
        ({"d_state": 7}, "d_state: must be even"),
        ({"dt_min": 0.2}, "dt_min: must be at most dt_max = 0.1, got 0.2"),
        ({"dt_min": 0.0}, "dt_min: must be a finite number above 0, got 0.0"),
        ({"norm_eps": 1e-46}, "norm_eps: must be a finite number above 0, got 1e-46, which is too small for float32"),
        ({"dt_max": 1e39}, r"dt_max: must be a finite number above 0, got 1e\+39, which is too large for float32"),
        ({"dt_floor": 0.2}, "dt_floor: must be at most dt_max = 0.1, got 0.2"),
        ({"dt_floor": 0.0}, "dt_floor: must be a finite number above 0, got 0.0"),
        ({"a_floor": -1.0}, "a_floor: must be a finite number above 0, got -1.0"),
        ({"norm_eps": float("nan")}, "norm_eps: must be a finite number above 0, got nan"),
        ({"expand": 0}, "expand: must be an integer >= 1"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    """One line that names the setting; through the registry it names the mixer too."""
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        Mamba3(D, **{**SIZES, **settings})
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=f"^mixers.mamba3.{message}"):
        registry.build("mamba3", D, {"mamba3": {**SIZES, **settings}})


def test_as_many_legal_values_as_are_named_are_all() -> None:
    with pytest.raises(ConfigError, match=r"\(legal: 1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 24, 30, 40, 60, 120\)$"):
        Mamba3(60, **{**SIZES, "head_dim": 7})


def test_a_fraction_that_is_no_number() -> None:
    with pytest.raises(ConfigError, match=r"^rope_fraction: must be in .*, got '0.5'$"):
        Mamba3(D, **{**SIZES, "rope_fraction": "0.5"})


@pytest.mark.parametrize("rank", [1, 4])
def test_a_state_that_does_not_fit_is_refused(rank: int) -> None:
    """By each of its tensors and axes: a smaller one would be repeated along that axis. Sums are kept in float32 at least."""
    mixer = built(mimo_rank=rank)
    x, state = torch.randn(2, 3, D), mixer.init_state(2)
    wrong = [
        (name, bad)
        for name, t in state._asdict().items()
        for bad in (*(t.narrow(axis, 0, 1) for axis in range(1, t.ndim) if t.shape[axis] > 1), t.unsqueeze(-1), t.long())
    ]
    wrong += [(name, getattr(state, name).half()) for name in ("u", "zeta", "angle")]
    for name, bad in wrong:
        for call in (lambda s: mixer(x, s), lambda s: mixer.step(x[:, 0], s)):
            with pytest.raises(ValueError, match=f"^Mamba3: the state's {name} must be .* of shape ") as raised:
                call(state._replace(**{name: bad}))
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rank", [1, 4])
def test_flops_and_state(rank: int) -> None:
    """Per token and head: R writes and R reads of the state, R^2 products q . k of the token itself and as many times v."""
    mixer = built(mimo_rank=rank)
    linear = D * (2 * 16 + 2 * 8 * rank + 3 * 4 + 2) + 16 * D
    assert mixer.flops(10) == 2 * 10 * (linear + 4 * (2 * rank * 8 * 4 + rank * rank * (8 + 4)))
    assert mixer.state_numel(10) == 4 * (8 * 4 + rank * 8 + 4 + 1 + 2)
    with torch.device("meta"):
        paper = Mamba3(2048, mimo_rank=rank)  # the comparison of the paper: u alone holds 262,144 numbers
    assert paper.init_state(1).u.numel() == 262_144


@pytest.mark.parametrize("rank", [1, 4])
def test_under_autocast(rank: int) -> None:
    """bf16 projections, float32 around the recurrence: near float32, forward, steps and gradients."""
    mixer, x = built(mimo_rank=rank).float(), inputs(1, T, D, dtype=torch.float32)
    expected, _ = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = mixer(x, mixer.init_state(1))
        o, after = mixer.step(x[:, 0], state)
        y.float().square().sum().backward()
    assert error(y, expected) < 0.1
    assert [t.dtype for t in after] == [t.dtype for t in mixer.init_state(1)] == [torch.float32] * 5
    assert o.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
