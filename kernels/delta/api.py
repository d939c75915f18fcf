"""The public functions: check the arguments, choose the implementation, run it."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend as backends
from kernels.delta import op as triton_op
from kernels.delta import reference
from kernels.delta import step as triton_step
from kernels.varlen import check_cu_seqlens, is_readable


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    b: Tensor | None = None,
    w: Tensor | None = None,
    *,
    own: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated delta rule with erase and write gates (Gated DeltaNet-2, arXiv 2605.22791, and its special cases).

        S_t = (I - k_t (b_t * k_t)^T) Diag(exp g_t) S_{t-1} + k_t (w_t * v_t)^T,   o_t = S_t^T (scale * q_t)

    Without an erase gate, and with at most one decay and one write gate a head, a token may have R keys, values and queries, and read what it writes
    itself with another weight than later tokens (Mamba-3, MIMO):

        S_t = exp(g_t) S_{t-1} + w_t X_t,   o_{t,r} = (exp(g_t) S_{t-1} + own_t X_t)^T (scale * q_{t,r}),   X_t = sum_r k_{t,r} v_{t,r}^T

    Args:
        q, k: queries and keys [B, T, H, K], or [B, T, R, H, K], of one floating dtype with v.
        v: values [B, T, HV, V], or [B, T, R, HV, V]; HV is a multiple of H, value head j reads key head j // (HV // H).
        g: log-decay <= 0, [B, T, H or HV, K or 1], float32 (float64 for float64 inputs); None: no decay.
        b: erase gate [B, T, H or HV, K or 1]; None: nothing is erased.
        w: write gate [B, T, HV, V or 1]; None: 1.
        own: what stands for w in a token's own outputs, [B, T, HV, 1]; None: w.
        scale: factor on q; None: K ** -0.5.
        state: initial state [N, HV, K, V], float32 (float64 for float64 inputs), N = B or the number of packed sequences; None: zero.
        cu_seqlens: [N+1] integer, strictly increasing from 0 to T: T holds N packed sequences, B is 1, and nothing crosses a boundary.
        backend: "auto" | "triton" | "reference" (the chunkwise form in plain torch); see `kernels.backend.resolve`. The kernels take K up to 256,
            with ranks or own K and V up to 128 and R up to 64; "auto" runs the reference beyond.

    Returns:
        o, of v's shape and dtype, and the final state [N, HV, K, V], float32 or float64.

    Raises:
        ValueError: shapes, devices or (where they can be read without waiting for a device) values that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: `backend="triton"` where it cannot run.

    b and w are not range-checked. Expanded (stride 0) inputs are accepted.
    """
    ranked = reference.is_ranked(q, own)
    _check(q, k, v, g, b, w, axes="B T R H" if q.ndim == 5 else "B T H")
    if ranked:
        _check_ranked(q, v, g, b, w, own)
    sequences = q.shape[0]
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"delta_rule: packed sequences (cu_seqlens) need B = 1, got B = {q.shape[0]}")
        check_cu_seqlens(cu_seqlens, q.shape[1], op="delta_rule")
        sequences = cu_seqlens.numel() - 1
    if state is not None:
        _check_state("delta_rule", state, sequences, k, v)
    resolved = backends.resolve("delta_rule", backend, q.device, triton_op.refusal(q, v, ranked=ranked))
    if resolved == "triton":  # nothing in it that autocast would touch
        return triton_op.delta_rule(q, k, v, g, b, w, own, q.shape[-1] ** -0.5 if scale is None else float(scale), state, cu_seqlens)
    with torch.autocast(q.device.type, enabled=False):
        return reference.chunkwise(q, k, v, g, b, w, own=own, scale=scale, state=state, cu_seqlens=cu_seqlens)


def delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    b: Tensor | None = None,
    w: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor,
    backend: backends.Requested = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`: the same arguments without the T axis, ranks and `own`: q, k [B, H, K], v [B, HV, V], state [B, HV, K, V].

    Returns o [B, HV, V] in v's dtype and the new state; `state` itself is not changed. Raises as `delta_rule`.
    """
    _check(q, k, v, g, b, w, axes="B H")
    _check_state("delta_rule_step", state, q.shape[0], k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)  # a number of another kind would be compiled for
    if backends.resolve("delta_rule_step", backend, q.device, triton_step.refusal(q, k, v, g, b, w, state)) == "triton":
        return triton_step.delta_rule_step(q, k, v, g, b, w, scale, state)
    dtype, heads = reference.accumulator_dtype(v), v.shape[-2]
    inputs = (reference.expand_heads(x, heads, dtype) for x in (q, k, v, g, b, w))
    with torch.autocast(q.device.type, enabled=False):
        o, new_state = reference.step(*inputs, scale=scale, state=state)  # type: ignore[arg-type]
    return o.to(v.dtype), new_state


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, *, axes: str) -> None:
    """Shapes, dtypes, devices and readable values of everything but the state; `axes` names the axes before the channels."""
    op = "delta_rule" if "T" in axes else "delta_rule_step"
    names = axes.split()
    gate_names = [name for name in names if name != "R"]
    for name, given in (("q", q), ("k", k), ("v", v), ("g", g), ("b", b), ("w", w)):
        if not isinstance(given, Tensor) and (given is not None or name in "qkv"):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(given).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != len(names) + 1:
            raise ValueError(f"{op}: {name} must have axes [{', '.join(names)}, channels], got shape {list(x.shape)}")
    q_shape, v_shape = q.shape, v.shape  # every look at a shape makes a new one
    *lead, heads, k_dim = q_shape
    *v_lead, v_heads, v_dim = v_shape
    if k.shape != q_shape:
        raise ValueError(f"{op}: k must have q's shape {list(q_shape)}, got {list(k.shape)}")
    if v_lead != lead:
        raise ValueError(f"{op}: v must share q's leading axes {lead}, got shape {list(v_shape)}")
    lead = lead[: len(gate_names) - 1]
    if heads == 0 or v_heads == 0 or v_heads % heads:
        raise ValueError(f"{op}: v's heads must be a multiple of q's {heads}, got {v_heads}")
    if 0 in q_shape or 0 in v_shape:
        raise ValueError(f"{op}: every axis must be at least 1, got q {list(q_shape)} and v {list(v_shape)}")
    for name, gate, fewest_heads, channels in (("g", g, heads, k_dim), ("b", b, heads, k_dim), ("w", w, v_heads, v_dim)):
        if gate is None:
            continue
        *gate_lead, gate_heads, width = gate.shape if gate.ndim == len(gate_names) + 1 else (0, 0)
        if gate_lead != lead or gate_heads not in (fewest_heads, v_heads) or width not in (1, channels):
            legal = " or ".join(str(n) for n in sorted({fewest_heads, v_heads}))
            raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, lead))}, {legal} heads, {channels} or 1], got {list(gate.shape)}")
    _check_dtypes(op, q, k, v, g, b, w)
    if g is not None and is_readable(g) and bool((g > 0).any()):  # NaN goes on, as on a GPU
        raise ValueError(f"{op}: g is a log-decay and must be <= 0 everywhere, its largest entry is {g.max().item():g}")


def _check_ranked(q: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, own: Tensor | None) -> None:
    """What a call with ranks, or with `own`, must not have, and own's shape, dtype and device."""
    what = "own" if own is not None else "q with ranks [B, T, R, H, K]"
    if b is not None:
        raise ValueError(f"delta_rule: {what} needs b = None: with an erase gate a token has one key, and its own output that of its state")
    for name, gate in (("g", g), ("w", w)):
        if gate is not None and gate.shape[-1] != 1:
            raise ValueError(f"delta_rule: {what} needs at most one number a head in {name}, got shape {list(gate.shape)}")
    if own is None:
        return
    expected = [*v.shape[:2], v.shape[-2], 1]
    if list(own.shape) != expected:
        raise ValueError(f"delta_rule: own must have shape [B, T, HV, 1] = {expected}, got {list(own.shape)}")
    _check_gate("delta_rule", "own", own, v)
    if own.device != q.device:
        raise ValueError(f"delta_rule: own is on {own.device}, q on {q.device}")


def _check_dtypes(op: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None) -> None:
    dtype, device = v.dtype, q.device
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16) or q.dtype != dtype or k.dtype != dtype:
        raise TypeError(
            f"{op}: q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {dtype} (legal: float64, float32, float16, bfloat16)"
        )
    accumulator = reference.accumulator_dtype(v)
    if g is not None and g.dtype != accumulator:
        raise TypeError(f"{op}: g must be {accumulator} for {dtype} values, got {g.dtype}")
    for name, x in (("b", b), ("w", w)):
        if x is not None:
            _check_gate(op, name, x, v)
    for name, x in (("k", k), ("v", v), ("g", g), ("b", b), ("w", w)):
        if x is not None and x.device != device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {device}")


def _check_gate(op: str, name: str, x: Tensor, v: Tensor) -> None:
    legal = dict.fromkeys((v.dtype, reference.accumulator_dtype(v)))
    if x.dtype not in legal:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, legal))}, got {x.dtype}")


def _check_state(op: str, state: Tensor, sequences: int, k: Tensor, v: Tensor) -> None:
    expected = (sequences, v.shape[-2], k.shape[-1], v.shape[-1])
    if tuple(state.shape) != expected:
        raise ValueError(f"{op}: state must have shape [N, HV, K, V] = {list(expected)}, got {list(state.shape)}")
    if state.dtype != reference.accumulator_dtype(v):
        raise TypeError(f"{op}: state must be {reference.accumulator_dtype(v)} for {v.dtype} values, got {state.dtype}")
    if state.device != v.device:
        raise ValueError(f"{op}: state is on {state.device}, v on {v.device}")
