"""Both Mamba mixers against mamba-ssm's own plain-torch references, on a CPU: its functions put together as its layers put their kernels together.
In float64 where the reference can, to float32 rounding where it cannot. Skipped without the package (or a folder with it: `mamba_ssm_cases`)."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mamba_ssm_cases import needs_package, scan
from torch import Tensor

from kernels import delta_rule
from kernels.rotary.reference import wrapped
from mixers import mamba_ssm
from mixers.contract import error, inputs
from mixers.init import initialize
from mixers.mamba2 import MAMBA_SSM as NAMES_2
from mixers.mamba2 import Mamba2
from mixers.mamba3 import MAMBA_SSM as NAMES_3
from mixers.mamba3 import Mamba3
from mixers.mamba3_layers import StepSize, last_tokens, later_weights, written

pytestmark = needs_package

D, CHUNK = 16, 8
EXACT = 1e-10  # of the largest entry: two orders of the same float64 sums
ROUNDING = 1e-5  # of the largest entry: a float32 reference of a few dozen sums


def reference(module: str, name: str) -> Any:
    """A function of the package by its file; the package's `__init__` is not run."""
    return mamba_ssm.kernel(module, name)


def reference_alone(module: str, name: str) -> Any:
    """A function without the imports of its file, which need what a CPU does not have. It may use torch and its functional."""
    (folder,) = find_spec("mamba_ssm").submodule_search_locations  # type: ignore[union-attr, misc]
    tree = ast.parse((Path(folder) / f"{module.replace('.', '/')}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    found: dict[str, Any] = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(compile(ast.Module([function], []), module, "exec"), found)
    return found[name]


def away_from_start(mixer: Any) -> Any:
    """In float64, every parameter away from its initial value and a float32 number: references that round to float32 then round nothing here."""
    initialize(mixer, 3)
    with torch.no_grad():
        for i, parameter in enumerate(mixer.parameters()):
            parameter.mul_(5 if parameter.ndim == 2 else 1).add_(0.3 * inputs(*parameter.shape, dtype=torch.float32, seed=50 + i))
    return mixer.double()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return inputs(*shape, dtype=torch.float32, seed=seed).double()


def leaves(mixer: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """The parameters by mamba_ssm's names, as copies that can be differentiated."""
    own = dict(mixer.named_parameters())
    return {theirs: own[ours].detach().clone().requires_grad_() for theirs, ours in names.items() if ours in own}


def assert_layers_agree(
    mixer: Any, y: Tensor, x: Tensor, names: dict[str, str], theirs: Tensor, given: dict[str, Tensor], x2: Tensor, tol: float
) -> None:
    """Outputs and the gradients of the input and of every parameter."""
    assert error(y, theirs) < tol, f"outputs: {error(y, theirs):.1e}"
    weights = drawn(*y.shape, seed=9)
    (y * weights).sum().backward()
    (theirs * weights.to(theirs.dtype)).sum().backward()
    own = dict(mixer.named_parameters())
    pairs = {"x": (x.grad, x2.grad), **{name: (own[names[name]].grad, leaf.grad) for name, leaf in given.items()}}
    largest = max(float(b.abs().max()) for _, b in pairs.values())
    for name, (a, b) in pairs.items():
        allowed = max(tol, ROUNDING) if "norm" in name else tol  # rms_norm_ref takes its weight through float32, so that gradient too
        assert error(a, b, 1e-3 * largest) < allowed, f"gradient of {name}: {error(a, b, 1e-3 * largest):.1e}"


# --- Mamba-2 ---


def ssd_problem(groups: int, tokens: int = 4 * CHUNK, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    heads, size, d_state, batch = 4, 6, 5, 2
    x, B, C = drawn(batch, tokens, heads, size), drawn(batch, tokens, groups, d_state, seed=2), drawn(batch, tokens, groups, d_state, seed=3)
    dt, A = F.softplus(drawn(batch, tokens, heads, seed=4)), -drawn(heads, seed=5).exp()
    found = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "initial": drawn(batch, heads, size, d_state, seed=6)}
    return {name: t.to(dtype).requires_grad_() for name, t in found.items()}


def ours(p: dict[str, Tensor], state: bool = True) -> tuple[Tensor, Tensor]:
    """y and the final state by the op that `mamba2` runs on."""
    g, S = (p["dt"] * p["A"]).unsqueeze(-1), p["initial"].mT if state else None
    y, S = delta_rule(p["C"], p["B"], p["x"], g, None, p["dt"].unsqueeze(-1), scale=1.0, state=S)
    return y, S.mT


def assert_results_agree(a: tuple[Tensor, ...], b: tuple[Tensor, ...], p: dict[str, Tensor], q: dict[str, Tensor], tol: float) -> None:
    """Outputs, and gradients of what the results depend on."""
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        assert error(left, right) < tol, f"result {i}: {error(left, right):.1e}"
    for results in (a, b):
        sum((t * drawn(*t.shape, seed=9 + i).to(t.dtype)).sum() for i, t in enumerate(results)).backward()
    for name, leaf in p.items():
        assert (leaf.grad is None) == (q[name].grad is None), name
        if leaf.grad is not None:
            assert error(leaf.grad, q[name].grad) < tol, f"gradient of {name}: {error(leaf.grad, q[name].grad):.1e}"


def test_ssd_minimal_discrete() -> None:
    """In float64, from an initial state; it has B and C for every head."""
    p, q = ssd_problem(4), ssd_problem(4)
    minimal = reference("modules.ssd_minimal", "ssd_minimal_discrete")
    theirs = minimal(q["x"] * q["dt"].unsqueeze(-1), q["dt"] * q["A"], q["B"], q["C"], CHUNK, q["initial"].unsqueeze(1))
    assert_results_agree(ours(p), theirs, p, q, EXACT)


@pytest.mark.parametrize("groups", [1, 2])
def test_ssd_chunk_scan_combined_ref(groups: int) -> None:
    """It rounds to float32."""
    p, q = ssd_problem(groups), ssd_problem(groups, dtype=torch.float32)
    combined = reference("ops.triton.ssd_combined", "ssd_chunk_scan_combined_ref")
    theirs = combined(q["x"], q["dt"], q["A"], q["B"], q["C"], CHUNK)
    assert_results_agree((ours(p, state=False)[0],), (theirs,), p, q, ROUNDING)


def test_selective_scan_ref(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrence of a diagonal state space, channel by channel; it rounds to float32."""
    if "selective_scan_cuda" not in sys.modules and find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    p, q = ssd_problem(2), ssd_problem(2, dtype=torch.float32)
    heads, size, d_state = q["x"].shape[2], q["x"].shape[3], q["B"].shape[3]
    selective = reference("ops.selective_scan_interface", "selective_scan_ref")
    u, delta = q["x"].flatten(2).mT, q["dt"].repeat_interleave(size, 2).mT
    A = q["A"].repeat_interleave(size).unsqueeze(1).expand(heads * size, d_state)
    y, last = selective(u, delta, A, q["B"].permute(0, 2, 3, 1), q["C"].permute(0, 2, 3, 1), return_last_state=True)
    theirs = y.mT.unflatten(2, (heads, size)), last.unflatten(1, (heads, size))
    assert_results_agree(ours(p, state=False), theirs, p, q, ROUNDING)


@pytest.mark.parametrize("settings", [{"head_dim": 8, "d_state": 6}, {"head_dim": 4, "d_state": 5, "num_groups": 2}], ids=str)
def test_layer_of_mamba_2(settings: dict[str, Any]) -> None:
    """Projection, torch's convolution, the scan with D, the gated norm, projection, as `mamba_ssm.modules.mamba2.Mamba2.forward`."""
    combined = reference("ops.triton.ssd_combined", "ssd_chunk_scan_combined_ref")
    rms_norm = reference("ops.triton.layernorm_gated", "rms_norm_ref")
    mixer, x = away_from_start(Mamba2(D, **settings)), drawn(2, 3 * CHUNK, D).requires_grad_()
    W, x2 = leaves(mixer.float(), NAMES_2), x.detach().float().requires_grad_()
    mixer.double()
    width, G, P, S = mixer.width, mixer.num_groups, mixer.head_dim, mixer.d_state
    z, xBC, dt = (x2 @ W["in_proj.weight"].T).split([width, width + 2 * G * S, mixer.num_heads], -1)
    taps = W["conv1d.weight"].shape[-1]
    xBC = F.silu(F.conv1d(xBC.mT, W["conv1d.weight"], W["conv1d.bias"], padding=taps - 1, groups=xBC.shape[-1])[..., : 1 - taps].mT)
    u, B, C = xBC.split([width, G * S, G * S], -1)
    u, B, C = u.unflatten(-1, (-1, P)), B.unflatten(-1, (G, S)), C.unflatten(-1, (G, S))
    y = combined(u, dt, -W["A_log"].exp(), B, C, CHUNK, D=W["D"], dt_bias=W["dt_bias"], dt_softplus=True).flatten(-2)
    y = rms_norm(y, W["norm.weight"], None, z=z, eps=1e-5, group_size=width // G, norm_before_gate=False)
    assert_layers_agree(mixer, mixer(x)[0], x, NAMES_2, y @ W["out_proj.weight"].T, W, x2, ROUNDING)


def test_steps_of_mamba_2() -> None:
    """`selective_state_update_ref` in float64, token by token."""
    update = reference("ops.triton.selective_state_update", "selective_state_update_ref")
    p = {name: t.detach() for name, t in ssd_problem(2).items()}
    state, rows = p["initial"].clone(), []
    size, d_state = state.shape[-2:]
    for t in range(p["x"].shape[1]):
        dt, A = p["dt"][:, t, :, None].expand(-1, -1, size), p["A"][:, None, None].expand(-1, size, d_state)
        rows.append(update(state, p["x"][:, t], dt, A, p["B"][:, t], p["C"][:, t]))
    y, S = ours(p)
    assert error(y, torch.stack(rows, 1)) < EXACT
    assert error(S, state) < EXACT


# --- Mamba-3 ---

LAYERS: dict[str, dict[str, Any]] = {
    "siso": {},
    "siso-all-rotated": {"rope_fraction": 1.0, "num_groups": 2, "out_norm": True},
    "mimo": {"mimo_rank": 4},
    "mimo-all-rotated": {"mimo_rank": 2, "rope_fraction": 1.0, "num_groups": 2, "out_norm": True},
}


def theirs_3(m: Mamba3, W: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`mamba_ssm.modules.mamba3.Mamba3.step` on its references, token by token: outputs [B, T, D], state [B, H, V, K] and angle after the last."""
    rms_norm = reference("ops.triton.layernorm_gated", "rms_norm_ref")
    turn = reference("ops.triton.mamba3.mamba3_mimo_rotary_step", "apply_rotary_qk_inference_reference")
    update = reference_alone("ops.cute.mamba3.mamba3_step_fn", "selective_state_update_fused_ref_v2")
    H, P, K, R, G, normed = m.num_heads, m.head_dim, m.d_state, m.mimo_rank, m.num_groups, "norm.weight" in W
    up, gate, down = (W[n].transpose(0, 1) if n in W else torch.ones(R, H, P, dtype=x.dtype) for n in ("mimo_x", "mimo_z", "mimo_o"))
    batch, rows = x.shape[0], []
    state, angle = x.new_zeros(batch, H, P, K), x.new_zeros(batch, H, m.num_angles)
    k_before, v_before = x.new_zeros(batch, R, H, K), x.new_zeros(batch, H, P)
    for token in x.unbind(1):
        z, v, B, C, f, a, trap, theta = (token @ W["in_proj.weight"].T).split(m.parts, -1)
        z, v = (t.unflatten(-1, (H, P)) for t in (z, v))
        B, C = (
            rms_norm(t.unflatten(-1, (R, G, K)), W[name], None, eps=1e-5, upcast=False).repeat_interleave(H // G, 2)
            for t, name in ((B, "B_norm.weight"), (C, "C_norm.weight"))
        )
        A, dt = (-F.softplus(a)).clamp(max=-1e-4), F.softplus(f + W["dt_bias"])
        biases = {"bias_q": W["C_bias"].transpose(0, 1), "bias_k": W["B_bias"].transpose(0, 1)}
        C, B, angle = turn(C, B, angle, theta.unsqueeze(1).expand(-1, H, -1), dt, **biases, rotate_pairwise=R == 1)
        ends = (gate, None, None) if normed else (gate, z, down)
        zproj, gated, outproj = ends
        out, state = update(state, A, B, C, up, v, zproj, gated, dt, k_before, v_before, trap.sigmoid(), W["D"], outproj, compute_dtype=x.dtype)
        if normed:  # Mamba3._postprocess
            out, z_ranks = out.flatten(2), (z.unsqueeze(1) * gate).flatten(2)
            out = rms_norm(out, W["norm.weight"], None, z=z_ranks, eps=1e-5, group_size=P, norm_before_gate=True, upcast=False)
            out = (out.unflatten(2, (H, P)) * down).sum(1)
        k_before, v_before = B, v
        rows.append(out.flatten(1) @ W["out_proj.weight"].T)
    return torch.stack(rows, 1), state, angle


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
def test_layer_of_mamba_3(settings: dict[str, Any]) -> None:
    """In float64: outputs, every gradient, and what the state stands for."""
    mixer, x = away_from_start(Mamba3(D, head_dim=4, d_state=8, **settings)), drawn(2, 11, D).requires_grad_()
    W, x2 = leaves(mixer, NAMES_3), x.detach().clone().requires_grad_()
    expected, h, angle = theirs_3(mixer, W, x2)
    y, state = mixer(x, mixer.init_state(2, dtype=torch.float64))
    assert error(state.angle, wrapped(angle)) < EXACT
    if mixer.mimo_rank == 1:
        assert error(state.u + written(state.zeta, state.k, state.v.unsqueeze(1)), h.mT) < EXACT
    assert_layers_agree(mixer, y, x, NAMES_3, expected, W, x2, EXACT)


@pytest.mark.parametrize("lengths", [[16], [5, 1, 10]], ids=str)
def test_gradients_of_the_trapezoid(lengths: list[int]) -> None:
    """`compute_dtrap_ddt_ref` and its form for packed documents, in float64: token t weighs zeta_t + behind_(t+1) in the states after it, and zeta_t
    in its own output."""
    heads, tokens = 3, sum(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    delta, trap = F.softplus(drawn(1, tokens, heads)), drawn(1, tokens, heads, seed=2).requires_grad_()
    f = (delta + torch.log(-torch.expm1(-delta))).requires_grad_()  # softplus(f) is delta
    d_factor, d_own = drawn(1, tokens, heads, seed=3), drawn(1, tokens, heads, seed=4)
    step_size = StepSize(heads, 0.001, 0.1, 1e-4, 1e-4).double()
    torch.nn.init.zeros_(step_size.dt_bias)
    steps = step_size(f, torch.zeros_like(f), trap, torch.zeros(1, tokens, 1, dtype=torch.float64))
    # what a token weighs for later ones; that of a last one is zeta alone there
    factors = (d_factor * later_weights(steps.zeta, steps.behind, ends)).sum() + last_tokens(d_factor * steps.zeta, ends).sum()
    loss = factors + (d_own * steps.zeta).sum()
    df, dtrap = torch.autograd.grad(loss, [f, trap])
    given = [t.detach().mT.contiguous() for t in (d_factor, d_own, trap, delta)]
    packed = len(lengths) > 1
    name = "compute_dtrap_ddt_varlen_ref" if packed else "compute_dtrap_ddt_ref"
    ddt, expected = reference("ops.triton.mamba3.mamba3_mimo_utils", name)(*given, *((4, ends) if packed else ()))
    assert error(dtrap, expected.mT) < EXACT
    assert error(df, ddt.mT * torch.sigmoid(f)) < EXACT


# --- the stand-ins ---


def test_the_stand_in_of_the_scan() -> None:
    """What `test_mamba_backend` runs in the place of the package's kernel is its reference, from a state and across documents."""
    p = {name: t.detach() for name, t in ssd_problem(4).items()}
    minimal = reference("modules.ssd_minimal", "ssd_minimal_discrete")

    def exact(start: int, end: int, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        x, dt, B, C = (p[name][:, start:end] for name in ("x", "dt", "B", "C"))
        return minimal(x * dt.unsqueeze(-1), dt * p["A"], B, C, end - start, initial)

    given = [p[name] for name in ("x", "dt", "A", "B", "C")]
    found = scan(*given, CHUNK, initial_states=p["initial"], seq_idx=None, return_final_states=True)
    for a, b in zip(found, exact(0, 4 * CHUNK, p["initial"].unsqueeze(1)), strict=True):
        assert error(a, b) < EXACT
    document = torch.tensor([0] * 5 + [1] * 27, dtype=torch.int32).expand(2, -1)
    y = scan(*given, CHUNK, initial_states=None, seq_idx=document, return_final_states=False)
    assert error(y, torch.cat([exact(0, 5, None)[0], exact(5, 32, None)[0]], 1)) < EXACT
