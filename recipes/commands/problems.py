"""Inputs for every public op of `kernels`, and one way to run an op on them: what `doctor`, `bench` and the tests of tile tables share.

Shapes: B batch, T tokens, H key heads, HV value heads, K key size, V value size, N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels

Width = str  # of a gate: channel, scalar, absent
WIDTHS: dict[str, tuple[Width, Width, Width]] = {  # of g, b and w, by the mixers that have them
    "gdn2": ("channel", "channel", "channel"),
    "kda": ("channel", "scalar", "scalar"),
    "gdn": ("scalar", "scalar", "scalar"),
    "deltanet": ("absent", "scalar", "scalar"),
    "gla": ("channel", "absent", "absent"),
    "mamba2": ("scalar", "absent", "scalar"),
    "linear_attention": ("absent", "absent", "absent"),
}
EXTREME_DECAYS = (0.0, -1e-6, -5.0, -50.0, -1000.0)
CONV_SIZE = 4
NORM_EPS = 1e-5
DOCUMENTS = (1, 2, 3, 64, 65, 15)  # lengths of packed sequences
PARAMETERS = frozenset({"weight"})  # float32 beside activations of 16 bits, as autocast leaves them
OUTPUTS = {
    "delta_rule": ("o", "final"),
    "delta_rule_step": ("o", "final"),
    "causal_conv1d": ("y", "final"),
    "causal_conv1d_step": ("y", "final"),
    "delta_gates": ("g", "b", "w"),
    "gated_rms_norm": ("y",),
    "l2_norm": ("q_unit", "k_unit"),
    "gated_skip": ("y",),
    "rank_values": ("y",),
    "rotary_keys": ("q", "k", "last"),
}


class Shape(NamedTuple):
    """Sizes of an op's inputs."""

    batch: int
    tokens: int
    heads: int
    dk: int
    dv: int
    groups: int = 1  # HV / H

    @property
    def v_heads(self) -> int:
        return self.heads * self.groups


class Problem(NamedTuple):
    """The arguments of an op, and the gradients that reach its outputs."""

    op: str
    leaves: dict[str, Tensor]  # differentiable arguments
    options: dict[str, Any]  # the others
    cotangents: dict[str, Tensor]  # by output; none for an op that has no backward pass
    wide: frozenset[str] = frozenset()  # leaves and outputs that stay at least float32

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Problem:
        """Rounded to `dtype` where a layer of that dtype would be, and moved."""

        def convert(name: str, x: Tensor) -> Tensor:
            return x.detach().to(device=device, dtype=torch.promote_types(dtype, torch.float32) if name in self.wide else dtype)

        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        leaves, cotangents = ({name: convert(name, x) for name, x in group.items()} for group in (self.leaves, self.cotangents))
        return self._replace(leaves=leaves, options=options, cotangents=cotangents)


def call(problem: Problem, backend: str = "auto") -> Callable[..., Any]:
    """The op with everything but its differentiable arguments given."""
    return partial(getattr(kernels, problem.op), **problem.options, backend=backend)


def run(problem: Problem, function: Callable[..., Any]) -> dict[str, Tensor]:
    """Outputs, and the gradient of every leaf as d<name>, of a function that takes the leaves by name."""
    leaves = {name: x.detach().requires_grad_(bool(problem.cotangents)) for name, x in problem.leaves.items()}
    with torch.set_grad_enabled(bool(problem.cotangents)):
        outputs = named_outputs(problem.op, function(**leaves))
    results = {name: x.detach() for name, x in outputs.items()}
    if problem.cotangents:
        names = [name for name in outputs if name in problem.cotangents]
        cotangents = [problem.cotangents[name].to(outputs[name].dtype) for name in names]
        gradients = torch.autograd.grad([outputs[name] for name in names], list(leaves.values()), cotangents)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def named_outputs(op: str, outputs: Any) -> dict[str, Tensor]:
    """What an op returned, by name, without what is None."""
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    return {name: x for name, x in zip(OUTPUTS[op], values, strict=True) if x is not None}


def errors(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """max|got - expected| / max|expected| of each tensor; infinite where one is missing, of another shape, not finite, or differs from zeros."""
    found = {}
    for name, reference in expected.items():
        value = got.get(name)
        if value is None or value.shape != reference.shape or not bool(value.isfinite().all()):
            found[name] = math.inf
            continue
        difference, largest = (x.abs().max().item() for x in (value.to(reference) - reference, reference))
        found[name] = (difference / largest if largest else math.inf) if difference else 0.0
    return found


class Draw:
    """Random float64 numbers on a device; those for gradients are exact in bfloat16, so that every dtype differentiates the same loss."""

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device, dtype=torch.float32).double()

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self._generator, device=self.device, dtype=torch.float32).double()

    def one_of(self, values: tuple[float, ...], *shape: int) -> Tensor:
        index = torch.randint(len(values), shape, generator=self._generator, device=self.device)
        return torch.tensor(values, dtype=torch.float64, device=self.device)[index]

    def cotangent(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(torch.bfloat16).double()

    def decay(self, *shape: int, extreme: bool) -> Tensor:
        return self.one_of(EXTREME_DECAYS, *shape) if extreme else -0.1 * self.uniform(*shape)


def delta_rule(mixer: str, shape: Shape, draw: Draw, *, extreme: bool = False, packed: bool = False, state: bool = False) -> Problem:
    """Keys and queries of length 1, gates of a mixer's widths. `packed`: DOCUMENTS in one row, in place of `shape`'s batch and tokens.

    The write gate of Mamba-2 is its step size, which stays float32."""
    lead = (1, sum(DOCUMENTS)) if packed else (shape.batch, shape.tokens)
    sequences = len(DOCUMENTS) if packed else shape.batch
    leaves = _delta_inputs(mixer, lead, shape, draw, extreme)
    final = (sequences, shape.v_heads, shape.dk, shape.dv)
    if state:
        leaves["state"] = draw.normal(*final)
    options = {"cu_seqlens": torch.tensor([0, *DOCUMENTS], device=draw.device).cumsum(0).to(torch.int32)} if packed else {}
    cotangents = {"o": draw.cotangent(*lead, shape.v_heads, shape.dv), "final": draw.cotangent(*final)}
    return Problem("delta_rule", leaves, options, cotangents, frozenset({"g", "state", "final"} | ({"w"} if mixer == "mamba2" else set())))


def ranked_delta_rule(shape: Shape, draw: Draw, *, ranks: int, packed: bool = False) -> Problem:
    """`delta_rule` as Mamba-3 calls it: `ranks` keys, values and queries a token, no erase, what a token reads of itself weighted by `own`."""
    problem = delta_rule("mamba2", shape, draw, packed=packed, state=True)
    q = problem.leaves["q"]
    lead = (*q.shape[:2], ranks)
    leaves = {name: F.normalize(draw.normal(*lead, shape.heads, shape.dk), dim=-1) for name in "qk"}
    leaves |= {"v": draw.normal(*lead, shape.v_heads, shape.dv), "own": draw.uniform(*q.shape[:2], shape.v_heads, 1)}
    cotangents = {**problem.cotangents, "o": draw.cotangent(*lead, shape.v_heads, shape.dv)}
    return problem._replace(leaves={**problem.leaves, **leaves}, cotangents=cotangents, wide=problem.wide | {"own"})


def delta_rule_step(mixer: str, shape: Shape, draw: Draw, *, extreme: bool = False) -> Problem:
    """One token of `delta_rule` for `shape.batch` sequences; forward only."""
    leaves = _delta_inputs(mixer, (shape.batch,), shape, draw, extreme)
    leaves["state"] = draw.normal(shape.batch, shape.v_heads, shape.dk, shape.dv)
    return Problem("delta_rule_step", leaves, {}, {}, frozenset({"g", "state", "final"}))


def _delta_inputs(mixer: str, lead: tuple[int, ...], shape: Shape, draw: Draw, extreme: bool) -> dict[str, Tensor]:
    heads, v_heads, gate_heads = shape.heads, shape.v_heads, shape.heads
    q, k = (F.normalize(draw.normal(*lead, heads, shape.dk), dim=-1) for _ in "qk")
    leaves = {"q": q, "k": k, "v": draw.normal(*lead, v_heads, shape.dv)}
    channels = {"channel": {"g": shape.dk, "b": shape.dk, "w": shape.dv}, "scalar": {"g": 1, "b": 1, "w": 1}}
    for name, width in zip("gbw", WIDTHS[mixer], strict=True):
        if width == "absent":
            continue
        size = (*lead, v_heads if name == "w" or width == "scalar" else gate_heads, channels[width][name])
        leaves[name] = draw.decay(*size, extreme=extreme) if name == "g" else (2.0 if extreme and name == "b" else 1.0) * draw.uniform(*size)
    return leaves


def causal_conv1d(shape: Shape, draw: Draw, *, packed: bool = False, state: bool = False, norm: bool = True, taps: int = CONV_SIZE) -> Problem:
    """The convolution of a delta mixer: q, k and v side by side, SiLU, L2 norm on q and k."""
    lead = (1, sum(DOCUMENTS)) if packed else (shape.batch, shape.tokens)
    sequences = len(DOCUMENTS) if packed else shape.batch
    leaves, options, channels = _conv_inputs(lead, shape, draw, norm, taps)
    if state:
        leaves["state"] = draw.normal(sequences, taps - 1, channels)
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *DOCUMENTS], device=draw.device).cumsum(0).to(torch.int32)
    cotangents = {"y": draw.cotangent(*lead, channels)}
    if state:
        cotangents["final"] = draw.cotangent(sequences, taps - 1, channels)
    return Problem("causal_conv1d", leaves, options, cotangents, PARAMETERS)


def causal_conv1d_step(shape: Shape, draw: Draw, *, taps: int = CONV_SIZE) -> Problem:
    """One token of `causal_conv1d`; forward only."""
    leaves, options, channels = _conv_inputs((shape.batch,), shape, draw, True, taps)
    leaves["state"] = draw.normal(shape.batch, taps - 1, channels)
    return Problem("causal_conv1d_step", leaves, options, {}, PARAMETERS)


def _conv_inputs(lead: tuple[int, ...], shape: Shape, draw: Draw, norm: bool, taps: int) -> tuple[dict[str, Tensor], dict[str, Any], int]:
    normed = 2 * shape.heads * shape.dk
    channels = normed + shape.v_heads * shape.dv
    leaves = {"x": draw.normal(*lead, channels), "weight": draw.normal(channels, taps) / 2}
    options: dict[str, Any] = {"activation": "silu"}
    return leaves, options | ({"norm_size": shape.dk, "norm_channels": normed} if norm else {}), channels


def delta_gates(mixer: str, shape: Shape, draw: Draw, *, extreme: bool = False) -> Problem:
    """The decay's activation and the two sigmoids behind a mixer's projections."""
    lead = (shape.batch, shape.tokens)
    g, b, w = WIDTHS[mixer]
    heads = shape.heads if g == "channel" else shape.v_heads
    channels = shape.dk if g == "channel" else 1
    spread = 40.0 if extreme else 1.0
    leaves = {"f": spread * draw.normal(*lead, heads * channels), "a": draw.uniform(heads) * math.log(16), "delta": draw.normal(heads * channels)}
    cotangents = {"g": draw.cotangent(*lead, heads, channels)}
    for name, width, size in (("b", b, shape.heads * shape.dk), ("w", w, shape.v_heads * shape.dv)):
        if width == "channel":
            leaves[name] = spread * draw.normal(*lead, size)
            cotangents[name] = draw.cotangent(*lead, size)
    return Problem("delta_gates", leaves, {}, cotangents, frozenset({"a", "delta", "g"}))


def rms_norm(shape: Shape, draw: Draw) -> Problem:
    """Mamba-2's norm, over all channels of a layer."""
    size = (shape.batch, shape.tokens, shape.v_heads * shape.dv)
    leaves = {"x": 4 * draw.normal(*size), "weight": 1 + draw.normal(size[-1]) / 10}
    return Problem("gated_rms_norm", leaves, {"gate": None, "eps": NORM_EPS}, {"y": draw.cotangent(*size)}, PARAMETERS)


def gated_rms_norm(shape: Shape, draw: Draw) -> Problem:
    """The norm and the gate behind the delta rule."""
    size = (shape.batch, shape.tokens, shape.v_heads, shape.dv)
    leaves = {"x": draw.normal(*size), "gate": draw.normal(*size), "weight": 1 + draw.normal(shape.dv) / 10}
    return Problem("gated_rms_norm", leaves, {"eps": NORM_EPS}, {"y": draw.cotangent(*size)}, PARAMETERS)


def l2_norm(shape: Shape, draw: Draw) -> Problem:
    """Queries and keys before the delta rule."""
    size = (shape.batch, shape.tokens, shape.heads, shape.dk)
    leaves = {name: draw.normal(*size) for name in "qk"}
    return Problem("l2_norm", leaves, {}, {name: draw.cotangent(*size) for name in OUTPUTS["l2_norm"]})


def gated_skip(shape: Shape, draw: Draw, *, ranks: int) -> Problem:
    """What Mamba-3 does to the outputs of its recurrence; without scales for one rank."""
    size, each = (shape.batch, shape.tokens, shape.v_heads, shape.dv), (shape.v_heads, ranks, shape.dv)
    leaves = {"o": draw.normal(*size[:2], ranks, *size[2:]), "v": draw.normal(*size), "z": draw.normal(*size), "D": draw.normal(shape.v_heads)}
    scales = {name: draw.normal(*each) for name in ("v_scale", "z_scale", "out_scale")} if ranks > 1 else {}
    return Problem("gated_skip", leaves | scales, {}, {"y": draw.cotangent(*size)}, frozenset({"D", *scales}))


def rank_values(shape: Shape, draw: Draw, *, ranks: int) -> Problem:
    """The values of every rank, before Mamba-3's recurrence."""
    size, each = (shape.batch, shape.tokens, shape.v_heads, shape.dv), (shape.v_heads, ranks, shape.dv)
    leaves = {"v": draw.normal(*size), "scale": draw.normal(*each)}
    return Problem("rank_values", leaves, {}, {"y": draw.cotangent(*size[:2], ranks, *size[2:])}, frozenset({"scale"}))


def rotary_keys(shape: Shape, draw: Draw, *, ranks: int, packed: bool = False) -> Problem:
    """The keys and queries of Mamba-3, half of whose channels turn. The last angles stay away from pi, where rounding would show as a whole turn."""
    lead = (1, sum(DOCUMENTS)) if packed else (shape.batch, shape.tokens)
    sequences, heads, angles = len(DOCUMENTS) if packed else shape.batch, shape.heads, shape.dk // 4
    leaves = {name: draw.normal(*lead, ranks, 1, shape.dk) for name in "BC"} | {f"{name}_bias": draw.normal(heads, ranks, shape.dk) for name in "BC"}
    leaves |= {"theta": draw.normal(*lead, angles), "delta": 0.02 * draw.uniform(*lead, heads)}
    leaves["first"] = draw.uniform(sequences, heads, angles)
    options: dict[str, Any] = {"neighbours": ranks == 1}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, *DOCUMENTS], device=draw.device).cumsum(0).to(torch.int32)
    cotangents = {name: draw.cotangent(*lead, ranks, heads, shape.dk) for name in "qk"} | {"last": draw.cotangent(sequences, heads, angles)}
    return Problem("rotary_keys", leaves, options, cotangents, frozenset({"B_bias", "C_bias", "delta", "first", "last"}))
