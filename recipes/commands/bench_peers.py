"""Other implementations of our ops, by their public functions: flash-linear-attention (fla) and mamba-ssm, imported when they are asked for, and
torch's attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mixers import mamba_ssm
from mixers.errors import ConfigError, unknown
from recipes.commands.machine import triton_version
from recipes.commands.problems import Shape

BASELINES = ("fla", "sdpa", "mamba_ssm")
HOPPER_FIX = (3, 7, 1)  # fla refuses its scalar-decay backward pass on Hopper with an older Triton: its results are wrong there
Peer = tuple[str, Callable[..., Any]]  # the name in the rows, and a function that takes our leaves by name


def check_baselines(text: str) -> list[str]:
    """The names in a comma-separated list; ConfigError for one that is unknown or not installed."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in BASELINES:
            raise unknown("baseline", "baseline", name, BASELINES)
    if "fla" in names and find_spec("fla") is None:
        raise ConfigError("baseline: fla is not installed: pip install flash-linear-attention")
    if "mamba_ssm" in names and (why := mamba_ssm.missing()):
        raise ConfigError(f"baseline: {why}")
    return names


def mamba_ssm_version() -> str:
    """The name of the peer in the rows; a folder on the path without metadata has no version."""
    try:
        return f"mamba_ssm {version('mamba-ssm')}"
    except PackageNotFoundError:
        return "mamba_ssm"


def fla_version() -> str:
    """The name of the peer in the rows."""
    return f"fla {import_module('fla').__version__}"


def fla_delta(mixer: str, *, norm_in_kernel: bool) -> Peer | None:
    """fla's function for the gates of a mixer; a scalar gate is `b`, shared by erase and write."""
    options = {"use_qk_l2norm_in_kernel": norm_in_kernel}
    name = fla_version()
    if mixer == "gdn2":
        chunk_gdn2 = import_module("fla.ops.gdn2").chunk_gdn2
        return name, lambda q, k, v, g, b, w: chunk_gdn2(q, k, v, g, b, w, **options)[0]
    if mixer == "kda":
        chunk_kda = import_module("fla.ops.kda").chunk_kda
        return name, lambda q, k, v, g, b: chunk_kda(q, k, v, g, b.squeeze(-1), **options)[0]
    if mixer == "gdn":
        chunk_gdn = import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
        note = _allow_hopper()
        return name + note, lambda q, k, v, g, b: chunk_gdn(q, k, v, g.squeeze(-1), b.squeeze(-1), **options)[0]
    return None


def _allow_hopper() -> str:
    """Switches off fla's refusal where its results are wrong but its speed is not; what to say about it."""
    triton = tuple(int(n) for n in re.findall(r"\d+", triton_version() or "")[:3])
    if triton >= HOPPER_FIX or torch.cuda.get_device_capability()[0] != 9:
        return ""
    import_module("fla.ops.common.chunk_o").IS_NVIDIA_HOPPER = False  # type: ignore[attr-defined]
    return " (its Hopper check off: speed only)"


def fla_step(mixer: str) -> Peer | None:
    """fla's decode step; it takes a time axis of length 1."""
    module = {"gdn2": "fla.ops.gdn2", "kda": "fla.ops.kda"}.get(mixer)
    if module is None:
        return None
    step = getattr(import_module(module), f"fused_recurrent_{mixer}")

    def run(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor | None = None) -> Any:
        gates = [b.unsqueeze(1), w.unsqueeze(1)] if w is not None else [b.squeeze(-1).unsqueeze(1)]
        inputs = [x.unsqueeze(1) for x in (q, k, v, g)]
        return step(*inputs, *gates, initial_state=state, output_final_state=True)

    return fla_version(), run


def fla_conv(shape: Shape) -> Peer:
    """Convolution with SiLU, then the L2 norm of q and k. Returns two tensors, [q, k] and v."""
    conv, l2norm = import_module("fla.modules.causal_conv1d").causal_conv1d, import_module("fla.modules.norm.l2norm").l2norm
    normed = 2 * shape.heads * shape.dk

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        qk, _ = conv(x[..., :normed], weight[:normed], activation="silu")
        v, _ = conv(x[..., normed:], weight[normed:], activation="silu")
        return l2norm(qk.unflatten(-1, (-1, shape.dk))).flatten(-2), v

    return fla_version(), run


def fla_gates() -> Peer:
    """The decay's activation, and torch's sigmoid for the other two."""
    gate = import_module("fla.ops.kda.gate").fused_kda_gate

    def run(f: Tensor, a: Tensor, delta: Tensor, b: Tensor | None = None, w: Tensor | None = None) -> tuple[Tensor, ...]:
        g = gate(f.unflatten(-1, (a.shape[0], -1)), a, delta)
        return (g, *(x.sigmoid() for x in (b, w) if x is not None))

    return fla_version(), run


def fla_norm(eps: float) -> Peer:
    """RMSNorm times SiLU(gate)."""
    norm = import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
    return fla_version(), lambda x, gate, weight: norm(x, gate, weight, None, activation="swish", eps=eps)


def fla_l2norm() -> Peer:
    """Queries and keys divided by their length, one after the other."""
    l2norm = import_module("fla.modules.norm.l2norm").l2norm
    return fla_version(), lambda q, k: (l2norm(q), l2norm(k))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of torch; heads before tokens."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
