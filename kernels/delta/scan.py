"""Launches without erase and with at most one decay a head (README.md, section 7): one each way, two backwards where heads share keys, and one more
for few long sequences. Shapes as in `forward.py`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.delta.backward import sum_heads
from kernels.delta.forward import Problem, as_rows, make_problem
from kernels.delta.tiles import AT_ONCE

# Sequences of at least LONG chunks are divided where there are at most FEW states (sequences times value heads), so that there are some MANY, into
# segments of at least LEAST chunks.
LONG, FEW, MANY, LEAST = 64, 576, 2304, 8
SHARED = 2  # value heads of one key, from which on their gradients are summed by a launch that has them all
INPUTS = ("S_Q", "S_K", "S_V", "S_G", "S_W", "H", "HV", "HG", "K", "V", "C", "G", "W", "PACKED", "EXACT", "PRECISION")


def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, w: Tensor | None, own: Tensor | None, scale: float, state: Tensor | None,
            cu_seqlens: Tensor | None, ranks: int, save: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, the final state and, if `save`, the states before the chunks [n, HV, K, V]: all that the backward pass gets beside the inputs.

    q, k, v and o have `ranks` rows a token, side by side on their time axis; gates, own and cu_seqlens are by token.
    """
    from kernels.delta._triton.scan import scan_kernel

    problem, weights = _problem(q, k, v, g, w, own, cu_seqlens, ranks)
    x, (k_dim, v_dim) = problem.inputs, problem.sizes
    o = v.new_empty(v.shape)
    states = v.new_empty(problem.n_chunks, problem.v_heads, k_dim, v_dim) if save else v
    final = v.new_empty(problem.sequences, problem.v_heads, k_dim, v_dim, dtype=torch.float32)
    options = _options(problem)
    segments = segments_of(problem)
    local = between(problem, segments, x["k"], x["v"], 1.0, weights.settings["R"], final, back=False)
    scan_kernel[(problem.sequences * segments.number * problem.v_heads * (v_dim // options["BV"]),)](
        x["q"], x["k"], x["v"], x["g"], x["w"], weights.own, final if state is None else state.contiguous(), *local, *problem.chunks,
        o, states, final, scale, **problem.lengths, **segments.arguments, **weights.settings, INITIAL=state is not None, SAVE=save,
        **problem.only(*INPUTS), **options,
    )  # fmt: skip
    return o, final, states


def _options(problem: Problem) -> dict[str, int]:
    return problem.options("scan_narrow" if problem.settings["EXACT"] or problem.sizes[1] < 64 else "scan")


class Segments(NamedTuple):
    """How each sequence is divided: the number of segments, and of chunks in all but the last."""

    number: int
    chunks: int

    @property
    def arguments(self) -> dict[str, int]:
        """As a kernel is told."""
        return {"segments": self.number, "chunks": self.chunks}


def segments_of(problem: Problem) -> Segments:
    """By shapes alone; one segment for packed sequences, whose lengths only the device knows."""
    chunks = problem.lengths["per_sequence"]
    if problem.settings["PACKED"]:
        return Segments(1, chunks)
    each = -(-chunks // how_many(chunks, problem.sequences * problem.v_heads))
    return Segments(-(-chunks // each), each)


def how_many(chunks: int, states: int) -> int:
    """Segments of sequences of so many chunks, with so many states in all. No more than each has chunks: a program goes through the segments before
    its own too."""
    return 1 if chunks < LONG or states > FEW else min(MANY // states, chunks // LEAST, math.isqrt(chunks))


def between(
    problem: Problem, segments: Segments, x: Tensor, y: Tensor, scale: float, ranks: int, like: Tensor, *, back: bool
) -> tuple[Tensor, Tensor]:
    """What each segment adds to the state [sequences, HV, N, K, V], and its decay [sequences, HV, N], in `like`'s dtype, float32. For one segment
    `like`, which is not read then: a kernel that got a pointer of another dtype would be another kernel."""
    from kernels.delta._triton.segments import segments_kernel

    if segments.number == 1:
        return like, like
    s, options = problem.settings, _options(problem)
    lead = (problem.sequences, problem.v_heads, segments.number)
    local, decay = like.new_empty(*lead, *problem.sizes), like.new_empty(lead)
    programs = problem.sequences * (segments.number - 1) * problem.v_heads * (problem.sizes[1] // options["BV"])
    settings = problem.only("S_G", "S_W", "H", "HV", "HG", "K", "V", "C", "G", "EXACT", "PRECISION")
    segments_kernel[(programs,)](
        x, y, problem.inputs["g"], problem.inputs["w"], local, decay, scale, **problem.lengths, **segments.arguments,
        S_X=x.stride(1), S_Y=y.stride(1), W=0 if back else s["W"], R=ranks, BACK=back, **settings, **options,
    )  # fmt: skip
    return local, decay


class Weights(NamedTuple):
    """What a token's own outputs have in place of the write gate, and how many rows a token has, as the kernels see them."""

    own: Tensor  # q, which is never read, where there is none
    settings: dict[str, int]


def _problem(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, w: Tensor | None, own: Tensor | None, cu_seqlens: Tensor | None, ranks: int
) -> tuple[Problem, Weights]:
    ends = cu_seqlens if cu_seqlens is None or ranks == 1 else cu_seqlens * ranks
    problem = make_problem(q, k, v, g, None, w, ends)
    rows = problem.inputs["q"] if own is None else as_rows(own)
    return problem, Weights(rows, {"OWN": own is not None, "S_OWN": rows.stride(1), "R": ranks})


def backward(
    inputs: dict[str, Any], kept: list[Tensor], scale: float, cu_seqlens: Tensor | None, ranks: int, do: Tensor, dfinal: Tensor
) -> list[Tensor]:
    """As `backward.launch`; `kept` are the states. What nobody else holds is freed before the gradients of shared heads are summed."""
    del inputs["b"]
    problem, weights = _problem(**inputs, cu_seqlens=cu_seqlens, ranks=ranks)
    wanted = {"d" + name: (x.shape, x.dtype) for name, x in inputs.items() if x is not None}
    inputs.clear()
    dinitial = dfinal.new_empty(dfinal.shape)  # in the order of its axes, whatever the order of dfinal's
    do, dfinal = as_rows(do), dfinal.contiguous()
    if by_chunks(problem, weights):
        made = _by_chunks(problem, kept, scale, do, dfinal, dinitial)
    else:
        made = _in_one(problem, weights, kept, scale, do, dfinal, dinitial)
    kept.clear()
    problem.inputs.clear()
    del weights
    return [*(sum_heads(made.pop(name), *wanted[name]) for name in wanted), dinitial]


def _in_one(problem: Problem, weights: Weights, kept: list[Tensor], scale: float, do: Tensor, dfinal: Tensor, dinitial: Tensor) -> dict[str, Tensor]:
    """Gradients by name, one row a value head and block of value columns; and that of the initial state."""
    from kernels.delta._triton.dscan import dscan_kernel

    x, s, (k_dim, v_dim), ranks = problem.inputs, problem.settings, problem.sizes, weights.settings["R"]
    options = problem.options("dscan")
    parts = v_dim // options["BV"]
    by_token = problem._replace(rows=problem.rows // ranks)
    made = {name: problem.gradient(name[1], k_dim, parts=parts) for name in ("dq", "dk")}
    made["dv"] = problem.gradient("v", v_dim)
    if s["G"]:
        made["dg"] = by_token.gradient("g", 1, torch.float32, parts)
    if s["W"]:
        made["dw"] = by_token.gradient("w", v_dim) if s["W"] == 2 else by_token.gradient("w", 1, parts=parts)
    if weights.settings["OWN"]:
        dtype = torch.float32 if parts > 1 else weights.own.dtype
        made["down"] = weights.own.new_empty(by_token.rows, problem.v_heads * parts, 1, dtype=dtype)
    out = [made.get(name, dinitial) for name in ("dq", "dk", "dv", "dg", "dw", "down")]
    segments = segments_of(problem)
    local = between(problem, segments, x["q"], do, scale, ranks, dinitial, back=True)
    dscan_kernel[(problem.sequences * segments.number * problem.v_heads * parts,)](
        x["q"], x["k"], x["v"], x["g"], x["w"], weights.own, *kept, do, dfinal, *local, *problem.chunks, *out, dinitial, scale,
        **problem.lengths, **segments.arguments, **weights.settings, S_O=do.stride(1), **problem.only(*INPUTS), **options,
    )  # fmt: skip
    return made


def by_chunks(problem: Problem, weights: Weights) -> bool:
    """Whether the backward pass is in two halves, of which the second, `_gluon/dchunks.py`, sums over the heads that share queries and keys."""
    s = {**problem.settings, **weights.settings}
    sizes, gates = s["V"] == 64 and s["K"] in (64, 128), s["G"] == 1 and s["W"] != 2
    return problem.hopper and sizes and gates and s["HV"] >= SHARED * s["H"] and s["R"] == 1 and not s["OWN"]


def _by_chunks(problem: Problem, kept: list[Tensor], scale: float, do: Tensor, dfinal: Tensor, dinitial: Tensor) -> dict[str, Tensor]:
    """Gradients by name, those of queries and keys one row a group of value heads; and that of the initial state."""
    from kernels.delta._gluon.dchunks import dchunks_kernel

    x, s, k_dim = problem.inputs, problem.settings, problem.sizes[0]
    dS, numbers = state_gradients(problem, scale, do, dfinal, dinitial)
    groups = how_many_groups(problem.n_chunks * s["H"], s["HV"] // s["H"])
    made = {"dv": problem.gradient("v", s["V"]), "dg": problem.gradient("g", 1, torch.float32)}
    for name in ("dq", "dk"):  # in float32 for one group too: another dtype would be another kernel
        made[name] = dinitial.new_empty(problem.rows, s["H"] * groups, k_dim)
    if s["W"]:
        made["dw"] = problem.gradient("w", 1)
    options = problem.options("dchunks_hopper")
    dchunks_kernel[(problem.n_chunks * s["H"] * groups,)](
        x["q"], x["k"], x["v"], *kept, do, dS, numbers, *problem.chunks, *(made.get("d" + name, dS) for name in "qkvgw"), scale,
        **problem.numbers, groups=groups, S_O=do.stride(1), STAGES=options["num_stages"],
        **problem.only("S_Q", "S_K", "S_V", "H", "HV", "K", "V", "C", "W", "PACKED"), **options,
    )  # fmt: skip
    return made


def state_gradients(problem: Problem, scale: float, do: Tensor, dfinal: Tensor, dinitial: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the states behind the chunks [n, HV, K, V] and the numbers of their rows [n, HV, 4, C], see `_triton/dstates.py`; and that of
    the initial state."""
    from kernels.delta._triton.dstates import NUMBERS, dstates_kernel

    x, s, heads, (k_dim, v_dim) = problem.inputs, problem.settings, problem.v_heads, problem.sizes
    segments = segments_of(problem)
    local = between(problem, segments, x["q"], do, scale, 1, dinitial, back=True)
    dS = do.new_empty(problem.n_chunks, heads, k_dim, v_dim)
    numbers = dinitial.new_empty(problem.n_chunks, heads, NUMBERS.value, s["C"])
    options = problem.options("dstates_hopper")
    dstates_kernel[(problem.sequences * segments.number * heads * (v_dim // options["BV"]),)](
        x["q"], x["g"], x["w"], do, dfinal, *local, *problem.chunks, dS, numbers, dinitial, scale, **problem.lengths, **segments.arguments,
        S_O=do.stride(1), **problem.only("S_Q", "S_G", "S_W", "H", "HV", "HG", "K", "V", "C", "W", "PACKED"), **options,
    )  # fmt: skip
    return dS, numbers


def how_many_groups(programs: int, heads: int) -> int:
    """Into how many groups the heads that share a key are divided, where there are so many programs with one: of four heads or more."""
    return max(1, min(AT_ONCE // programs, heads // 4))
