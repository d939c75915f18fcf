"""Small modules that mixers and models are made of. Every one has `reset_parameters`, from which `mixers.init` draws its initial values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from kernels import causal_conv1d_step, delta_gates, gated_rms_norm, gated_skip
from kernels.conv1d.api import causal_conv1d_parts

MIXER_GAIN = 2**-2.5  # Xavier gain of every linear in a recurrent mixer (Gated DeltaNet-2, appendix)

Init = Callable[[Tensor], object]


def xavier(gain: float) -> Init:
    """Uniform in +- gain * sqrt(6 / (fan_in + fan_out))."""
    return partial(nn.init.xavier_uniform_, gain=gain)  # no lambda: a module can be pickled


def normal(std: float) -> Init:
    """Gaussian with mean 0."""
    return partial(nn.init.normal_, std=std)


@final
class Linear(nn.Linear):
    """torch's Linear with a stated initialisation; the bias starts at 0.

    `init_scale` multiplies the initial weight: a model sets it on projections that end a residual branch.
    """

    def __init__(self, in_features: int, out_features: int, *, init: Init, bias: bool = False) -> None:
        self.init, self.init_scale = init, 1.0
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.init(self.weight)
            self.weight *= self.init_scale
            if self.bias is not None:
                self.bias.zero_()


def to_autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer: cast and saved once for all layers that read it, their gradients summed in that dtype.

    Autocast itself remembers the casts of parameters only.
    """
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.dtype == torch.float32 else x


class FP32Module(nn.Module):
    """Its parameters are stored in at least float32: `.bfloat16()`, `.half()` and `.to(dtype)` leave their values alone, `.double()` widens them.

    They are to be read in this module's own `forward`, so that a sharded model gathers them there.
    """

    def initial_ranges(self) -> dict[str, tuple[float, float]]:
        """Between which bounds its parameters start, by name, where a start outside them would be a mistake; a run's audit looks."""
        return {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP32Module:
        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            if not t.is_floating_point() or out.dtype in (torch.float32, torch.float64):
                return out
            return t.to(device=out.device, dtype=torch.float32)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self


def fp32_parameter(*shape: int) -> nn.Parameter:
    """An unset parameter in at least float32, whatever the default dtype (bf16-true builds modules under a bfloat16 default)."""
    return nn.Parameter(torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32)))


def inverse_softplus(y: float) -> float:
    """The x with softplus(x) = y > 0."""
    return y + math.log(-math.expm1(-y))


class DecayModule(FP32Module):
    """Parameters of the log-decay g = -exp(a) * softplus(f + delta), in at least float32 (Gated DeltaNet-2, 3.5; Mamba-2).

    Starts with exp(a) uniform in [1, 16] and softplus(delta) log-uniform in [0.001, 0.1], floor 1e-4. A subclass's `forward` reads them.

    Args:
        heads: heads, one rate `a` each.
        channels: channels a head, one `delta` each; 1 gives a scalar decay.
    """

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        self.a = fp32_parameter(heads)
        self.delta = fp32_parameter(heads * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.a.uniform_(1, 16).log_()
            dt = self.delta.uniform_(math.log(0.001), math.log(0.1)).exp_().clamp_min_(1e-4)
            self.delta.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def initial_ranges(self) -> dict[str, tuple[float, float]]:
        return {"a": (0.0, math.log(16)), "delta": (inverse_softplus(1e-4), inverse_softplus(0.1))}


@final
class DecayGate(DecayModule):
    """The log-decay alone. Args: `DecayModule`'s."""

    def forward(self, f: Tensor) -> Tensor:
        """f [.., heads * channels] -> g [.., heads, channels] <= 0."""
        return delta_gates(f, self.a, self.delta)[0]


@final
class DeltaGates(DecayModule):
    """The log-decay with the erase and write gates, in one call of `kernels.delta_gates`. Args: `DecayModule`'s."""

    def forward(self, f: Tensor, b: Tensor, w: Tensor | None = None, *, b_scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor | None]:
        """f [.., heads * channels], logits b and w of any widths -> g [.., heads, channels] <= 0, b_scale * sigmoid(b), sigmoid(w)."""
        g, erase, write = delta_gates(f, self.a, self.delta, b, w, b_scale=b_scale)
        assert erase is not None
        return g, erase, write


@final
class ShortConv(nn.Module):
    """Causal depthwise convolution, SiLU, and an L2 norm per head on the leading channels.

    Args:
        channels: all channels.
        size: taps.
        norm_size: channels a head.
        norm_channels: leading channels that are normalised.
    """

    def __init__(self, channels: int, size: int, *, norm_size: int, norm_channels: int) -> None:
        super().__init__()
        self.norm_size, self.norm_channels = norm_size, norm_channels
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5  # torch's Conv1d: uniform in +- 1 / sqrt(fan_in)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, parts: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """x [B, T, channels], state [N, size-1, channels] -> y in tensors of the widths `parts`, and the new state, in the old one's dtype."""
        y, new = causal_conv1d_parts(
            x,
            self.weight,
            parts=parts,
            activation="silu",
            norm_size=self.norm_size,
            norm_channels=self.norm_channels,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return y, new if state is None else new.to(state.dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, channels], state [B, size-1, channels] -> y and the new state, in the dtype of the one before."""
        y, new = causal_conv1d_step(x, self.weight, activation="silu", norm_size=self.norm_size, norm_channels=self.norm_channels, state=state)
        return y, new.to(state.dtype)


@final
class GatedRMSNorm(nn.Module):
    """RMSNorm over the last axis, times SiLU(gate)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.RMSNorm(size, eps=eps)  # holds the weight

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate [.., size] -> x's shape and dtype."""
        return gated_rms_norm(x, gate, self.norm.weight, self.eps)


@final
class Skip(FP32Module):
    """o + D * x, with a number D a head that starts at 1 (Mamba-2); what Mamba-3 does to its outputs. Args: `heads`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.D = fp32_parameter(heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.D)

    def forward(self, o: Tensor, x: Tensor, gate: Tensor | None = None, scales: Sequence[Tensor] = ()) -> Tensor:
        """o, x [.., H, V] -> o's shape and dtype; computed in at least float32.

        With a gate [.., H, V], o is [.., R, H, V]: every rank times SiLU(gate), then summed, in x's shape and dtype. scales [H, R, V] of x, gate and
        output: see `kernels.gated_skip`.
        """
        if gate is not None:
            return gated_skip(o, x, gate, self.D, *scales)
        wide = self.D.dtype
        return (o.to(wide) + x.to(wide) * self.D.unsqueeze(-1)).to(o.dtype)


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary position embedding: pairs (i, i + D/2) of x [B, T, heads, D] turned by position [B or 1, T] * theta ** (-2i/D).

    Angles are formed in float64: in float32 they are off by 0.06 rad at a million tokens.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (position.unsqueeze(-1) * frequency).unsqueeze(-2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    first, second = x.to(dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
