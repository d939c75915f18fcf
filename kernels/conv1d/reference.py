"""The causal short convolution in plain torch. Any device; exact in float64.

Shapes: D channels, W taps, N sequences, M tokens of a flattened [B*T] axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import first_order
from kernels.varlen import gather_rows, scatter_rows, sequence_lengths, token_table

NORM_EPS = 1e-6  # added to the sum of squares


def epilogue(y: Tensor, activation: str | None, norm_size: int | None, norm_channels: int | None) -> Tensor:
    """SiLU, then x / sqrt(sum x^2 + eps) over groups of `norm_size` of the leading `norm_channels` channels. y [.., D]."""
    if activation == "silu":
        y = F.silu(y)
    if norm_size is None:
        return y
    split = y.shape[-1] if norm_channels is None else norm_channels
    # x / sqrt(sum + eps) = rms_norm(x, eps / n) / sqrt(n): the sum is n times the mean
    normed = F.rms_norm(y[..., :split].unflatten(-1, (-1, norm_size)), (norm_size,), eps=NORM_EPS / norm_size) * norm_size**-0.5
    return torch.cat([normed.flatten(-2), y[..., split:]], -1)


class _Taps(torch.autograd.Function):
    """y_i = sum_j kernel_j * x_{i+j} for x [R + W - 1, D], kernel [W, D]; y [R, D]. Each pass is one multiply-add over whole rows."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, kernel)
        rows = x.shape[0] - kernel.shape[0] + 1
        y = x[:rows] * kernel[0]
        for j in range(1, kernel.shape[0]):
            y.addcmul_(x[j : j + rows], kernel[j])
        return y

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        x, kernel = ctx.saved_tensors
        rows, grad_x = grad.shape[0], torch.zeros_like(x)
        for j in range(kernel.shape[0]):
            grad_x[j : j + rows].addcmul_(grad, kernel[j])
        grad_kernel = torch.stack([(grad * x[j : j + rows]).sum(0) for j in range(kernel.shape[0])])
        return grad_x, grad_kernel


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] * x_{t-j}; x before a sequence is its state, or zero.

    x [B, T, D], weight [D, W], bias [D], state [N, W-1, D] (the last inputs, oldest first). Returns y [B, T, D] in at least float32 and the new
    state in x's dtype.
    """
    batch, tokens, channels = x.shape
    lengths = sequence_lengths(batch, tokens, cu_seqlens, x.device)
    history, n = weight.shape[1] - 1, lengths.numel()
    wide = torch.promote_types(x.dtype, torch.float32)
    # the sequences end to end, each behind `history` rows of its own past: no tap can then reach a neighbour
    sequence = token_table(lengths).sequence
    row = torch.arange(sequence.numel(), device=x.device) + (sequence + 1) * history
    padded = scatter_rows(x.reshape(-1, channels), row, sequence.numel() + n * history)
    past = (lengths.cumsum(0) - lengths + torch.arange(n, device=x.device) * history).unsqueeze(1)
    past = past + torch.arange(history, device=x.device)
    if state is not None:
        padded = padded.index_copy(0, past.flatten(), state.to(x.dtype).flatten(0, 1))
    taps = _Taps.apply(padded.to(wide), weight.to(wide).t().contiguous())  # type: ignore[no-untyped-call]
    y = gather_rows(taps, row - history)
    if bias is not None:
        y = y + bias.to(wide)
    return y.view(batch, tokens, channels), padded[past + lengths.unsqueeze(1)]


def step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x [B, D], state [B, W-1, D] -> y [B, D] in at least float32, new state in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat([state.to(x.dtype), x.unsqueeze(1)], 1)
    y = (window.to(wide) * weight.to(wide).t()).sum(1)
    return (y if bias is None else y + bias.to(wide)), window[:, 1:]
