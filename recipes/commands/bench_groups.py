"""What `bench op` compares: for each op and shape our implementation and its peers on the same tensors, and the float64 results that prove it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import causal_conv1d, delta_gates, delta_rule, gated_rms_norm, gated_skip, l2_norm, rank_values, rotary_keys
from kernels.backend import Requested
from kernels.delta.reference import chunkwise
from mixers import mamba_ssm
from mixers.mamba3 import Mamba3
from recipes.commands import bench_peers as peers
from recipes.commands import problems
from recipes.commands.bench_timing import Entry
from recipes.commands.problems import Draw, Problem, Shape

OPS = {
    "delta": "delta_rule",
    "conv": "causal_conv1d",
    "gates": "delta_gates",
    "norm": "gated_rms_norm",
    "l2norm": "l2_norm",
    "ssd": "delta_rule",
    "siso": "delta_rule",
    "rotary": "rotary_keys",
    "skip": "gated_skip",
    "ranks": "rank_values",
}
RANKS = (1, 4)  # of Mamba-3: SISO and MIMO
OURS = "ours"
Function = Callable[..., Any]


class Group(NamedTuple):
    """Implementations of one thing on the same tensors; the first is ours."""

    entries: list[Entry]
    exact: Function  # the same in float64, in plain torch
    heads: tuple[int, ...] | None = None  # where only these heads of the last batch row are held against it; (): all heads of it; None: everything
    shared: frozenset[str] = frozenset()  # leaves without a batch axis; with `heads` their gradients, sums over the batch, are not held against it
    sums: frozenset[str] = frozenset()  # leaves whose gradients are sums over all later tokens that nearly cancel, see `bench_ops.allowed`


def groups(op: str, mixers: Sequence[str], shape: Shape, dtype: torch.dtype, baselines: Sequence[str], device: str = "cuda") -> Iterator[Group]:
    """What is compared for an op at a shape, one group after the other."""
    if op == "delta":
        for i, mixer in enumerate(mixers):
            yield _delta(mixer, shape, dtype, baselines, device, raw=False)
            if i == 0 and "sdpa" in baselines:
                yield _attention(shape, dtype, device)
            yield _delta(mixer, shape, dtype, baselines, device, raw=True)
        return
    fla, mamba = "fla" in baselines, "mamba_ssm" in baselines
    if op in ("ssd", "siso"):
        yield (_ssd if op == "ssd" else _siso)(shape, dtype, device, mamba)
    elif op == "conv":
        yield _conv(shape, dtype, device, fla)
    elif op == "gates":
        yield _gates(shape, dtype, device, fla)
    elif op in RANKED:
        for ranks in RANKS if op != "ranks" else RANKS[1:]:
            yield _ranked(op, ranks, shape, dtype, device)
    elif op == "l2norm":
        yield _group(problems.l2_norm(shape, Draw(device)).to(dtype), "l2_norm", l2_norm, [peers.fla_l2norm()] if fla else [])
    else:
        problem = problems.gated_rms_norm(shape, Draw(device)).to(dtype)
        yield _group(problem, "gated_rms_norm", gated_rms_norm, [peers.fla_norm(problems.NORM_EPS)] if fla else [], keep=("eps",))


def _delta(mixer: str, shape: Shape, dtype: torch.dtype, baselines: Sequence[str], device: str, *, raw: bool) -> Group:
    """The recurrence from normalised queries and keys, or (raw) each side's own norm with it."""
    exact = problems.delta_rule(mixer, shape, Draw(device))
    if raw:
        exact = exact._replace(leaves={n: 5 * x if n in ("q", "k") else x for n, x in exact.leaves.items()})
    problem = exact.to(dtype)
    leaves, shared = share_gate(mixer, problem.leaves)

    def recurrence(function: Function, backend: Requested, **given: Tensor) -> Any:
        given = normed(given, backend) if raw else given
        return function(**given, **({"w": given["b"]} if shared else {}))[0]

    ours, in_float64 = partial(recurrence, delta_rule, kernels_on(device)), partial(recurrence, chunkwise, "reference")
    what = f"{mixer}+norm" if raw else mixer
    found = peers.fla_delta(mixer, norm_in_kernel=raw) if "fla" in baselines else None
    implementations: list[peers.Peer] = [(OURS, ours), *([found] if found else [])]
    entries = [Entry(what, name, function, _leaves(leaves), (problem.cotangents["o"],)) for name, function in implementations]
    return Group(entries, in_float64, tuple({0, shape.heads - 1}))


def kernels_on(device: str) -> Requested:
    """The backend whose time is ours: the kernels by name, so that what they refuse gets no figure; on a CPU, which gets none, whatever runs."""
    return "auto" if device == "cpu" else "triton"


def share_gate(mixer: str, leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Where erase and write are one scalar (KDA, GDN), one tensor for both: `b`."""
    shared = mixer in ("kda", "gdn", "deltanet")
    return {name: x for name, x in leaves.items() if not (shared and name == "w")}, shared


def normed(leaves: Mapping[str, Tensor], backend: Requested) -> dict[str, Tensor]:
    """Queries and keys divided by their length."""
    q, k = l2_norm(leaves["q"], leaves["k"], backend=backend)
    return {**leaves, "q": q, "k": k}


def _leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same storage, differentiable on its own."""
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def _attention(shape: Shape, dtype: torch.dtype, device: str) -> Group:
    draw = Draw(device)
    q, k, v = (draw.normal(shape.batch, shape.heads, shape.tokens, shape.dk).to(dtype) for _ in "qkv")
    entry = Entry("attention", "torch sdpa", peers.attention, _leaves({"q": q, "k": k, "v": v}), (torch.randn_like(v),))
    return Group([entry], peers.attention)


def _group(problem: Problem, what: str, op: Function, found: list[peers.Peer], keep: tuple[str, ...] = ()) -> Group:
    """An op whose arguments are the problem's; `keep` names options."""
    options = {name: problem.options[name] for name in keep}
    cotangents = tuple(problem.cotangents.values())
    ours = _outputs(op, options, kernels_on(cotangents[0].device.type))
    entries = [Entry(what, OURS, ours, _leaves(problem.leaves), cotangents)]
    entries += [Entry(what, name, function, _leaves(problem.leaves), cotangents) for name, function in found]
    return Group(entries, _outputs(op, options, "reference"))


def _outputs(op: Function, options: Mapping[str, Any], backend: str) -> Function:
    """What an op returns without what is None, and without the state of the convolution."""

    def run(**leaves: Tensor) -> tuple[Tensor, ...]:
        found = op(**leaves, **options, backend=backend)
        if op is causal_conv1d:
            return (found[0],)
        return tuple(x for x in found if x is not None) if isinstance(found, tuple) else (found,)

    return run


def _conv(shape: Shape, dtype: torch.dtype, device: str, fla: bool) -> Group:
    problem = problems.causal_conv1d(shape, Draw(device)).to(dtype)
    group = _group(problem, "conv+silu+norm", causal_conv1d, [], ("activation", "norm_size", "norm_channels"))
    if not fla:
        return group
    name, function = peers.fla_conv(shape)
    normed_channels = 2 * shape.heads * shape.dk
    dy = problem.cotangents["y"]
    apart = dy[..., :normed_channels].contiguous(), dy[..., normed_channels:].contiguous()
    return group._replace(entries=[*group.entries, Entry("conv+silu+norm", name, function, _leaves(problem.leaves), apart)])


def _gates(shape: Shape, dtype: torch.dtype, device: str, fla: bool) -> Group:
    problem = problems.delta_gates("gdn2", shape, Draw(device)).to(dtype)
    return _group(problem, "gates", delta_gates, [peers.fla_gates()] if fla else [])


RANKED: dict[str, tuple[Callable[..., Problem], Function, tuple[str, ...]]] = {  # problem, op and options
    "rotary": (problems.rotary_keys, rotary_keys, ("neighbours",)),
    "skip": (problems.gated_skip, gated_skip, ()),
    "ranks": (problems.rank_values, rank_values, ()),
}


def _ranked(op: str, ranks: int, shape: Shape, dtype: torch.dtype, device: str) -> Group:
    """What Mamba-3 does around its recurrence."""
    make, function, keep = RANKED[op]
    problem = make(shape, Draw(device), ranks=ranks).to(dtype)
    shared = frozenset({"B_bias", "C_bias", "D", "v_scale", "z_scale", "out_scale", "scale"} & problem.leaves.keys())
    return _group(problem, f"{problem.op}, rank {ranks}", function, [], keep)._replace(heads=(), shared=shared)


def _ssd(shape: Shape, dtype: torch.dtype, device: str, mamba: bool) -> Group:
    """Mamba-2's recurrence: `heads` value heads of `dv` share B and C of `dk`; step sizes and rates in float32."""
    draw, lead = Draw(device), (shape.batch, shape.tokens)
    B, C = (draw.normal(*lead, 1, shape.dk).to(dtype) for _ in "BC")
    x, o = (draw.cotangent(*lead, shape.heads, shape.dv).to(dtype) for _ in "xo")
    dt, A = 0.1 * draw.uniform(*lead, shape.heads).float(), -1 - 15 * draw.uniform(shape.heads).float()

    def with_op(op: Function, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        return op(C, B, x, (dt * A).unsqueeze(-1), None, dt.unsqueeze(-1), scale=1.0)[0]

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
        return mamba_ssm.ssd(C, B, x, dt, A, None, None)[0]

    found: list[peers.Peer] = [
        (OURS, partial(with_op, partial(delta_rule, backend=kernels_on(device)))),
        *([(peers.mamba_ssm_version(), theirs)] if mamba else []),
    ]
    leaves = {"x": x, "dt": dt, "A": A, "B": B, "C": C}
    return Group([Entry("ssd", name, run, _leaves(leaves), (o,)) for name, run in found], partial(with_op, chunkwise), (), frozenset({"A"}))


def _siso(shape: Shape, dtype: torch.dtype, device: str, mamba: bool) -> Group:
    """Mamba-3's steps, biases, rotation and recurrence of rank 1, from what a layer's projection and norms give."""
    draw, lead = Draw(device), (shape.batch, shape.tokens)
    mixer = Mamba3(shape.heads * shape.dv, expand=1, head_dim=shape.dv, d_state=shape.dk).to(device)
    parameters = {name: x for name, x in mixer.named_parameters() if name in ("step_size.dt_bias", "rotary.B_bias", "rotary.C_bias")}
    v, o = (draw.cotangent(*lead, shape.heads, shape.dv).to(dtype) for _ in "vo")
    leaves = {"v": v, **{name: draw.normal(*lead, 1, 1, shape.dk).to(dtype) for name in "BC"}}
    leaves |= {name: draw.normal(*lead, shape.heads).to(dtype) for name in ("f", "a", "trap")}
    leaves |= {"theta": draw.normal(*lead, mixer.num_angles).to(dtype), **parameters}

    class Recurrence(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, backend: mamba_ssm.Resolved, v: Tensor, B: Tensor, C: Tensor, *raw: Tensor) -> Tensor:
            return mixer.recurrence(backend, v, v.unsqueeze(2), B, C, list(raw))[0].squeeze(2).to(v.dtype)

    module = Recurrence()

    def recurrence(backend: mamba_ssm.Resolved, **given: Tensor) -> Any:
        own = {f"mixer.{name}": given.pop(name) for name in parameters}
        return torch.func.functional_call(module, own, (backend, *given.values()))

    found: list[peers.Peer] = [(OURS, partial(recurrence, "delta"))]
    found += [(peers.mamba_ssm_version(), partial(recurrence, "mamba_ssm"))] if mamba else []
    entries = [Entry("siso", name, run, _leaves(leaves), (o,)) for name, run in found]
    return Group(entries, partial(recurrence, "delta"), (), frozenset(parameters), frozenset({"theta"}))


# --- proof ---


def results(entry: Entry) -> dict[str, Tensor]:
    """Outputs and gradients of an implementation."""
    outputs = entry.outputs()
    gradients = torch.autograd.grad(outputs, list(entry.leaves.values()), list(entry.cotangents))
    named = {f"d{name}": x for name, x in zip(entry.leaves, gradients, strict=True)}
    return {f"out{i}": x.detach() for i, x in enumerate(outputs)} | named


def expected(group: Group) -> dict[str, Tensor]:
    """The float64 results, of the heads that the group names."""
    ours = group.entries[0]
    leaves = {name: (x if name in group.shared else cut(group, x)).detach().double().requires_grad_() for name, x in ours.leaves.items()}
    cotangents = tuple(cut(group, x).double() for x in ours.cotangents)
    found = results(Entry(ours.what, "float64", group.exact, leaves, cotangents))
    return {name: x for name, x in found.items() if name.removeprefix("d") not in group.shared}


def cut(group: Group, x: Tensor) -> Tensor:
    """What of a tensor [B, T, H, ..] is held against float64."""
    if not group.heads:
        return x.detach() if group.heads is None else x.detach()[-1:]
    return x.detach()[-1:, :, list(group.heads)]


def errors_of(group: Group, exact: Mapping[str, Tensor], entry: Entry) -> dict[str, float]:
    """The error of each tensor of an implementation; outputs that it cuts otherwise than ours are left out."""
    found = {name: cut(group, x) for name, x in results(entry).items() if name in exact}
    same_outputs = len(entry.cotangents) == len(group.entries[0].cotangents)
    return problems.errors(found, {name: x for name, x in exact.items() if same_outputs or not name.startswith("out")})
