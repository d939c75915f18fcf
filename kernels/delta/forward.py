"""Launches of the forward pass, in the order of README.md, section 2. Shapes: M tokens [B*T], n chunks, C rows a chunk, HV value heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import tiles
from kernels.delta.reference import CHUNK
from kernels.delta.tiles import AT_ONCE, FEW_PROGRAMS, MOST_COLUMNS, TILES, TRANSPOSED_COLUMNS
from kernels.tiles import Tile
from kernels.varlen import device_chunks, most_chunks

# Of `_gluon/intra.py` by K: a thread holds two channels of 16 rows, so K is the number of warps; with these two or three programs fit side by side.
INTRA_REGISTERS = {64: 168, 128: 128, 256: 128}


class Problem(NamedTuple):
    """One call of the op as its kernels see it: inputs as rows of tokens, where the chunks lie, and compile-time settings."""

    inputs: dict[str, Tensor]  # q, k, v, g, b, w; an absent gate is q, and never read
    chunks: tuple[Tensor, Tensor, Tensor]  # first chunk of a sequence, first token and rows of a chunk; not read for a dense batch
    lengths: dict[str, int]  # tokens and chunks of a sequence, of a dense batch
    settings: Mapping[str, Any]
    sequences: int
    n_chunks: int  # at most
    rows: int  # M
    v_heads: int
    sizes: tuple[int, int]  # K, V
    hopper: bool  # whether there are kernels of `_gluon` for it: 16-bit inputs on an sm_90

    def tile(self, kernel: str) -> Tile:
        q = self.inputs["q"]
        return TILES.pick(kernel, q.device, q.element_size(), max(self.sizes) if min(self.sizes) >= 64 else min(self.sizes))

    @property
    def numbers(self) -> dict[str, int]:
        """What a kernel with one program a chunk is told of the lengths."""
        return {**self.lengths, "sequences": self.sequences}

    def options(self, kernel: str) -> dict[str, int]:
        """Blocks, warps and stages of a launch, no block wider than what it divides."""
        tile = self.tile(kernel)
        return tile.options() | {name: min(size, self.settings[name[1]]) for name, size in tile.blocks.items()}

    def serial_options(self, kernel: str) -> tuple[int, str, dict[str, int]]:
        """A pass over chunks, one program a sequence, head and block of value columns: how many, the name of its tile, which tells whether it is of
        `_gluon`, its options."""
        k_dim, v_dim = self.sizes
        columns = self.sequences * self.v_heads * v_dim
        packed = self.settings["PACKED"]  # one tile for any number of documents: a new one compiles nothing
        if self.hopper and k_dim in (64, 128):
            most = MOST_COLUMNS[kernel]
            transposed = kernel == "state" and (packed or columns > AT_ONCE * most) and v_dim % TRANSPOSED_COLUMNS == 0
            name = f"{kernel}_transposed_hopper" if transposed else f"{kernel}_hopper"
            options = self.options(name)
            options["STAGES"] = options["num_stages"]
            if not transposed:
                at_once = 1 << (-(-columns // AT_ONCE) - 1).bit_length()
                options["BV"] = min(most, v_dim) if packed else max(options["BV"], at_once)
            if (transposed or options["BV"] <= most) and v_dim % options["BV"] == 0:
                return columns // options["BV"], name, options
        name, options = kernel, self.options(kernel)
        if packed or columns // options["BV"] < FEW_PROGRAMS:
            name, options = kernel + "_narrow", self.options(kernel + "_narrow")
        return columns // options["BV"], name, options

    def new_sums(self) -> tuple[Tensor, Tensor]:
        """Room for G of every token [M, HV, K], in two parts where it is exact (`running_sums`); not read without a decay per channel."""
        q, s = self.inputs["q"], self.settings
        if s["G"] != 2:
            return q, q
        sums = q.new_empty(1 + s["EXACT"], self.rows, self.v_heads, s["K"], dtype=torch.float32)
        return sums[0], sums[-1]

    def gradient(self, name: str, channels: int, dtype: torch.dtype | None = None, parts: int = 1) -> Tensor:
        """Room for the gradient of an input, `parts` rows a value head [M, HV * parts, channels]: float32 where rows are to be summed."""
        x, heads = self.inputs[name], self.v_heads * parts
        summed = x.shape[2] < heads
        return x.new_empty(self.rows, heads, channels, dtype=dtype or (torch.float32 if summed else x.dtype))

    def only(self, *names: str) -> dict[str, Any]:
        """The compile-time settings of these names."""
        settings = self.settings
        return {name: settings[name] for name in names}


class Forward(NamedTuple):
    """Outputs, and what the backward pass reads. Leading axes [n, HV]."""

    o: Tensor  # [B, T, HV, V]
    final: Tensor  # [N, HV, K, V]
    A: Tensor  # [.., C, C]  (I + T)^-1
    P: Tensor  # [.., C, C]
    Y: Tensor  # [.., C, K]
    R: Tensor  # [.., C, V]
    Qg: Tensor  # [.., C, K]
    Ktail: Tensor  # [.., C, K]
    gamma: Tensor  # [.., K or 1]  decay over the chunk
    S: Tensor  # [.., K, V]  states before the chunks


def make_problem(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, cu_seqlens: Tensor | None) -> Problem:
    """Everything that the launches of both passes share."""
    batch, tokens, heads, k_dim = q.shape
    v_heads, v_dim = v.shape[-2:]
    rows = {"q": as_rows(q), "k": as_rows(k), "v": as_rows(v)}
    rows |= {name: rows["q"] if x is None else as_rows(x) for name, x in (("g", g), ("b", b), ("w", w))}
    strides = tuple([x.stride(1) for x in rows.values()])
    widths = tuple([0 if x is None else 1 + (x.shape[-1] == full) for x, full in ((g, k_dim), (b, k_dim), (w, v_dim))])
    gate_heads = tuple([heads if x is None else x.shape[-2] for x in (g, b)])
    settings = _settings(strides, widths, gate_heads, (heads, v_heads, k_dim, v_dim), cu_seqlens is not None, v.dtype == torch.float32)
    if cu_seqlens is None:
        per_sequence = -(-tokens // CHUNK)
        table: tuple[Tensor, Tensor, Tensor] = (q, q, q)  # not read
        sequences, n_chunks = batch, batch * per_sequence
    else:
        per_sequence, sequences = 0, cu_seqlens.numel() - 1
        first, start, length = device_chunks(cu_seqlens.to(q.device), tokens, CHUNK)
        table, n_chunks = (first, start, length), most_chunks(tokens, sequences, CHUNK)
    lengths = {"tokens": tokens, "per_sequence": per_sequence}
    hopper = q.element_size() == 2 and tiles.architecture(q.device) == "sm_90"
    return Problem(rows, table, lengths, settings, sequences, n_chunks, batch * tokens, v_heads, (k_dim, v_dim), hopper)


@cache  # by plain numbers: every key is compiled for, so there are few
def _settings(
    strides: tuple[int, ...], widths: tuple[int, ...], gate_heads: tuple[int, ...], sizes: tuple[int, ...], packed: bool, exact: bool
) -> Mapping[str, Any]:
    """Names and values of the compile-time arguments. `widths`: of g, b, w: 0 absent, 1 scalar, 2 channel."""
    settings: dict[str, Any] = dict(zip(("S_Q", "S_K", "S_V", "S_G", "S_B", "S_W"), strides, strict=True))
    settings |= zip(("G", "B", "W", "HG", "HB"), (*widths, *gate_heads), strict=True)
    settings |= zip(("H", "HV", "K", "V"), sizes, strict=True)
    return settings | {"C": CHUNK, "PACKED": packed, "EXACT": exact, "PRECISION": "tf32x3" if exact else "tf32"}


def as_rows(x: Tensor) -> Tensor:
    """x [B, T, H, X] such that a kernel can read it as rows of tokens: heads and channels contiguous, batch and time one axis, and rows that are a
    multiple of 16 bytes begin at one, as asynchronous copies need; else a copy.

    Stride 1 of what is returned is that of a token; its shape is x's or [1, M, H, X].
    """
    batch, tokens, heads, channels = x.shape
    size = x.element_size()
    pieces = channels * size % 16 == 0
    aligned = not pieces or x.data_ptr() % 16 == 0
    if tokens > 1 and heads * channels < 2**31 // CHUNK and aligned and x.is_contiguous():
        return x
    of_batch, of_token, of_head, of_channel = x.stride()
    stride = of_token if tokens > 1 else of_batch if batch > 1 else heads * channels
    dense = (channels == 1 or of_channel == 1) and (heads == 1 or of_head == channels)
    dense = dense and (batch == 1 or of_batch == tokens * stride) and stride >= heads * channels
    aligned = aligned and not (pieces and stride * size % 16)
    if not dense or not aligned or stride * CHUNK >= 2**31:  # inside a chunk offsets are 32 bit
        x, stride = x.clone(memory_format=torch.contiguous_format), heads * channels
    return x.as_strided((1, batch * tokens, heads, channels), (batch * tokens * stride, stride, channels, 1))


def launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, scale: float, state: Tensor | None,
           cu_seqlens: Tensor | None, save: bool) -> Forward:  # fmt: skip
    """The forward pass; without `save` the states before the chunks are not kept."""
    problem = make_problem(q, k, v, g, b, w, cu_seqlens)
    chunks = intra(problem, scale)
    return inter(problem, chunks, scale, state, (*v.shape,), save)


def intra(problem: Problem, scale: float) -> dict[str, Tensor]:
    """(2.2): P, A, Y, U, Qg, Ktail and gamma of every chunk."""
    x, s, (k_dim, v_dim) = problem.inputs, problem.settings, problem.sizes
    q, lead = x["q"], (problem.n_chunks, problem.v_heads)
    out = {
        "P": q.new_empty(*lead, CHUNK, CHUNK),
        "A": q.new_empty(*lead, CHUNK, CHUNK) if s["B"] else q,
        "Y": q.new_empty(*lead, CHUNK, k_dim) if s["B"] else q,
        "U": q.new_empty(*lead, CHUNK, v_dim),
        "Qg": q.new_empty(*lead, CHUNK, k_dim),
        "Ktail": q.new_empty(*lead, CHUNK, k_dim),
        "gamma": q.new_empty(*lead, k_dim if s["G"] == 2 else 1, dtype=torch.float32),
    }
    names = ["S_Q", "S_K", "S_V", "S_G", "S_B", "S_W", "H", "HV", "K", "V", "C", "B", "W", "HG", "HB", "PACKED"]
    if problem.hopper and s["G"] == 2 and k_dim in INTRA_REGISTERS:
        from kernels.delta._gluon.intra import intra_kernel

        T = out["A"].view(torch.float16)  # until the inverse takes its place
        kernel, tensors = intra_kernel, [*x.values(), *problem.chunks, T]
        options = {"BV": math.gcd(v_dim, 128), "num_warps": k_dim // 16, "maxnreg": INTRA_REGISTERS[k_dim]}
    else:
        from kernels.delta._triton.solve import solve_kernel

        sums = problem.new_sums()
        T = tree_scores(problem, out["P"], sums, scale) if s["G"] == 2 else q
        kernel, tensors = solve_kernel, [*x.values(), *problem.chunks, *sums, T]
        names += ["G", "EXACT", "PRECISION"]
        options = problem.options("solve")
    kernel[(problem.n_chunks * problem.v_heads,)](*tensors, *out.values(), scale, **problem.numbers, **problem.only(*names), **options)
    return out


def tree_scores(problem: Problem, P: Tensor, sums: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Section 3: the scores below the diagonal, of the queries to `P`, of e to the tensor that is returned; the running sums of g to `sums`."""
    from kernels.delta._triton.scores import scores_kernel

    x, s = problem.inputs, problem.settings
    # the inverse takes its products in float16 (solve.py)
    T = P.new_empty(P.shape, dtype=torch.float32 if s["EXACT"] else torch.float16) if s["B"] else P
    names = ("S_Q", "S_K", "S_B", "S_G", "H", "HV", "HB", "HG", "B", "K", "C", "PACKED", "EXACT", "PRECISION")
    scores_kernel[(problem.n_chunks * problem.v_heads,)](
        x["q"], x["k"], x["b"], x["g"], *problem.chunks, *sums, P, T, scale, **problem.numbers, **problem.only(*names), **problem.options("scores")
    )
    return T


def inter(problem: Problem, chunks: dict[str, Tensor], scale: float, state: Tensor | None, shape: tuple[int, ...], save: bool) -> Forward:
    """(2.3) to (2.5): the serial pass. U's memory holds R afterwards if `save`."""
    v, (k_dim, v_dim) = problem.inputs["v"], problem.sizes
    o = v.new_empty(shape)
    states = v.new_empty(problem.n_chunks, problem.v_heads, k_dim, v_dim) if save else v
    final = v.new_empty(problem.sequences, problem.v_heads, k_dim, v_dim, dtype=torch.float32)
    programs, tile, options = problem.serial_options("state")
    names = ["HV", "K", "V", "C", "G", "B", "PACKED"]
    c = chunks
    read, kept = [c["Y"], c["U"], c["P"], c["Qg"], c["Ktail"]], states
    if tile == "state_transposed_hopper":
        from kernels.delta._gluon.state_transposed import state_kernel
    elif tile == "state_hopper":
        from kernels.delta._gluon.state import described, state_kernel

        read, kept = described(*read, states, options["BV"], erase=bool(problem.settings["B"]), save=save)
    else:
        from kernels.delta._triton.state import state_kernel

        names += ["PRECISION"]
    state_kernel[(programs,)](
        *read, c["gamma"], final if state is None else state.contiguous(), *problem.chunks, o, kept, final,
        scale, **problem.lengths, S_O=problem.v_heads * v_dim, INITIAL=state is not None, SAVE=save, **problem.only(*names), **options,
    )  # fmt: skip
    return Forward(o, final, c["A"], c["P"], c["Y"], c["U"], c["Qg"], c["Ktail"], c["gamma"], states)
