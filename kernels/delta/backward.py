"""Launches of the backward pass, in the order of README.md, section 4. Shapes as in `forward.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.delta.forward import Problem, as_rows, make_problem
from kernels.delta.reference import CHUNK


def launch(inputs: dict[str, Any], kept: dict[str, Tensor], scale: float, cu_seqlens: Tensor | None, do: Tensor, dfinal: Tensor) -> list[Tensor]:
    """Gradients of those of q, k, v, g, b, w that there are, and of the initial state.

    Args:
        inputs: q, k, v, g, b, w by name, None for an absent gate.
        kept: fields of `forward.Forward`, from the third on, by name.

    Both are emptied on the way: what nobody else holds is freed behind its last reader, before the next launch takes memory.
    """
    problem = make_problem(**inputs, cu_seqlens=cu_seqlens)
    wanted = {"d" + name: (x.shape, x.dtype) for name, x in inputs.items() if x is not None}
    inputs.clear()
    do = as_rows(do)
    dR, dS, dinitial = state_gradients(problem, kept, do, dfinal, scale)
    _drop(kept, "Y", "P", "Qg", "Ktail", "gamma")
    made = value_gradients(problem, kept, do, dR, scale)
    found = {name: sum_heads(made.pop(name), *wanted[name]) for name in wanted if name in made}
    _drop(kept, "A")
    _drop(problem.inputs, "v", "w")
    made = score_gradients(problem, kept, do, dS, made, scale)
    kept.clear()
    found |= {name: sum_heads(made.pop(name), *wanted[name]) for name in wanted if name in made}
    return [*(found[name] for name in wanted), dinitial]


def _drop(tensors: dict[str, Tensor], *names: str) -> None:
    for name in names:
        del tensors[name]


def state_gradients(problem: Problem, kept: dict[str, Tensor], do: Tensor, dfinal: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(4.1) and (4.3), serially from the last chunk: dR, the gradients of the states behind the chunks, the gradient of the initial state."""
    dR, dS = torch.empty_like(kept["R"]), torch.empty_like(kept["S"])
    dinitial = dfinal.new_empty(dfinal.shape)  # in the order of its axes, whatever the order of dfinal's
    programs, tile, options = problem.serial_options("dstate")
    names = ["HV", "K", "V", "C", "G", "B", "PACKED"]
    if tile == "dstate_hopper":
        from kernels.delta._gluon.dstate import dstate_kernel
    else:
        from kernels.delta._triton.dstate import dstate_kernel

        names += ["PRECISION"]
    dstate_kernel[(programs,)](
        kept["Y"], kept["P"], kept["Qg"], kept["Ktail"], kept["gamma"], do, dfinal.contiguous(), *problem.chunks, dR, dS, dinitial, scale,
        **problem.lengths, S_O=do.stride(1), **problem.only(*names), **options,
    )  # fmt: skip
    return dR, dS, dinitial


def value_gradients(problem: Problem, kept: dict[str, Tensor], do: Tensor, dR: Tensor, scale: float) -> dict[str, Tensor]:
    """(4.2): dv, dw, and dZ in dR's memory. Where the next launch is not of `_gluon`, also (4.5): dP times scale, and dT; and G once more."""
    from kernels.delta._triton.dvalues import dvalues_kernel

    x, s, v_dim = problem.inputs, problem.settings, problem.sizes[1]
    scores = not problem.hopper
    square = (*dR.shape[:-1], CHUNK)
    out = {"dZ": dR, "dP": dR.new_empty(square) if scores else dR, "dT": dR.new_empty(square) if scores and s["B"] else dR}
    out["sums"], out["rest"] = problem.new_sums() if scores else (dR, dR)
    out["dv"] = problem.gradient("v", v_dim)
    out["dw"] = problem.gradient("w", v_dim if s["W"] == 2 else 1) if s["W"] else dR
    names = ("S_V", "S_G", "S_W", "HV", "HG", "K", "V", "C", "G", "B", "W", "PACKED", "EXACT", "PRECISION")
    dvalues_kernel[(problem.n_chunks * problem.v_heads,)](
        x["v"], x["g"], x["w"], *problem.chunks, kept["A"], kept["R"], do, *out.values(), scale, **problem.numbers,
        S_O=do.stride(1), SCORES=scores, **problem.only(*names), **problem.options("dvalues"),
    )  # fmt: skip
    return out


def score_gradients(problem: Problem, kept: dict[str, Tensor], do: Tensor, dS: Tensor, made: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """(4.4) to (4.9): dq, dk, dg, db. `made` are the results of `value_gradients`."""
    x, s, k_dim = problem.inputs, problem.settings, problem.sizes[0]
    options = problem.options("dscores_hopper" if problem.hopper else "dscores")
    parts = k_dim // options["BK"]
    out = {"dq": problem.gradient("q", k_dim), "dk": problem.gradient("k", k_dim)}
    # where a launch before has put G, which is not needed any more, the gradient of a decay per channel takes its place
    out["dg"] = problem.gradient("g", k_dim, torch.float32) if s["G"] == 2 and problem.hopper else made["sums"]
    out["db"] = problem.gradient("b", k_dim) if s["B"] == 2 else dS
    for name in ("g", "b"):  # a scalar gate's gradient is summed over the programs, in float32
        if s[name.upper()] == 1:
            out["d" + name] = problem.gradient(name, parts, torch.float32)
    tensors = [x["q"], x["k"], x["g"], x["b"], *problem.chunks, kept["R"], kept["S"], do, made["dZ"], dS]
    names = ["S_Q", "S_K", "S_G", "S_B", "H", "HV", "K", "V", "C", "G", "B", "HG", "HB", "PACKED"]
    if problem.hopper:
        from kernels.delta._gluon.dscores import dscores_kernel
    else:
        from kernels.delta._triton.dscores import dscores_kernel

        tensors += [made[name] for name in ("dP", "dT", "sums", "rest")]
        names += ["EXACT", "PRECISION"]
    dscores_kernel[(problem.n_chunks * problem.v_heads * parts,)](
        *tensors, *out.values(), scale, **problem.numbers, S_O=do.stride(1), **problem.only(*names), **options
    )
    for name in ("g", "b"):
        if s[name.upper()] == 1 and parts > 1:
            out["d" + name] = out["d" + name].sum(-1, keepdim=True)
    return out


def sum_heads(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient [M, HV, channels] of an input of `shape` [B, T, heads, channels], summed over the value heads that read one of its heads."""
    if gradient.shape[1] != shape[2]:
        gradient = gradient.unflatten(1, (shape[2], -1)).sum(2)
    gradient = gradient.view(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)
