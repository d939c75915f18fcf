"""Softmax attention with rotary positions and grouped query heads; a window makes it sliding-window attention.

Shapes: B batch, T tokens, N sequences, H query heads, J key/value heads, D head size, L cache slots.
"""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.varlen import is_readable, positions
from mixers import flash
from mixers.base import SequenceMixer, at_least, default_head_dim, linear_flops, multiple_of, positive
from mixers.fan_out import fan_out
from mixers.layers import Linear, normal, rotate
from mixers.state import AttentionState, zero_cache


@final
class Attention(SequenceMixer[AttentionState]):
    """Causal softmax attention; token t reads the last `window` tokens, itself included.

    Args:
        d_model: width of the input and the output.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; null: num_heads.
        head_dim: size of a head, even; null: d_model / num_heads.
        window: tokens that are read back, >= 1; null: all of them.
        rope_theta: base of the rotary frequencies.
        init_std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rope_theta: float = 10000.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(d_model)
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        at_least(1, num_heads=num_heads, num_kv_heads=self.num_kv_heads)
        multiple_of("num_heads", num_heads, "num_kv_heads", self.num_kv_heads)
        self.head_dim = default_head_dim("head_dim", head_dim, d_model, num_heads)
        multiple_of("head_dim", self.head_dim, "a rotary pair", 2)
        if window is not None:
            at_least(1, window=window)
        positive(rope_theta=rope_theta, init_std=init_std)
        self.window, self.rope_theta = window, rope_theta
        init = normal(init_std)
        self.q_proj = Linear(d_model, num_heads * self.head_dim, init=init)
        self.k_proj = Linear(d_model, self.num_kv_heads * self.head_dim, init=init)
        self.v_proj = Linear(d_model, self.num_kv_heads * self.head_dim, init=init)
        self.o_proj = Linear(num_heads * self.head_dim, d_model, init=init)

    def set_residual_scale(self, scale: float) -> None:
        self.o_proj.init_scale = scale

    def forward(
        self, x_BTD: Tensor, state: AttentionState | None = None, *, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        q, k, v = self._heads(x_BTD)
        if state is None:
            return self._output(self._without_cache(q, k, v, cu_seqlens)), None
        if cu_seqlens is None:
            o, state = self._attend(q, k, v, state)
            return self._output(o), state
        outputs, states = [], []
        lengths = cu_seqlens.diff().tolist()
        for n, (q_n, k_n, v_n) in enumerate(zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)):
            o, after = self._attend(q_n, k_n, v_n, AttentionState(*(t[n : n + 1] for t in state)))
            outputs.append(o)
            states.append(after)
        return self._output(torch.cat(outputs, 1)), AttentionState(*(torch.cat(ts) for ts in zip(*states, strict=True)))

    def step(self, x_BD: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        self.check_step(x_BD, state)
        y, after = self.forward(x_BD.unsqueeze(1), state)
        assert after is not None
        return y.squeeze(1), after

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> str:
        why = flash.refusal(device, dtype, self.head_dim)
        return "torch's variable-length flash attention" if why is None else f"torch's scaled_dot_product_attention, one document at a time ({why})"

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        if max_tokens is None and self.window is None:
            raise ValueError("Attention: init_state needs max_tokens, the cache of full attention grows with the sequence")
        like = self.k_proj.weight
        shape = (batch_size, self._capacity(max_tokens), self.num_kv_heads, self.head_dim)
        k, v = (zero_cache(like, shape, device, dtype) for _ in "kv")
        return AttentionState(k, v, torch.zeros(batch_size, device=k.device, dtype=torch.int64))

    def state_numel(self, tokens: int) -> int:
        return 2 * self._capacity(tokens) * self.num_kv_heads * self.head_dim

    def flops(self, tokens: int) -> int:
        """The mixing: q k^T and p v for every pair of tokens that the mask lets through."""
        window = tokens if self.window is None else min(self.window, tokens)
        pairs = window * (window + 1) // 2 + (tokens - window) * window
        return linear_flops(self, tokens) + 4 * pairs * self.num_heads * self.head_dim

    def _capacity(self, tokens: int | None) -> int:
        return min(n for n in (tokens, self.window) if n is not None)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, D], k and v [B, T, J, D], not rotated yet."""
        q, k, v = fan_out(x, self.q_proj, self.k_proj, self.v_proj)
        return q.unflatten(-1, (self.num_heads, -1)), k.unflatten(-1, (self.num_kv_heads, -1)), v.unflatten(-1, (self.num_kv_heads, -1))

    def _output(self, o: Tensor) -> Tensor:
        out: Tensor = self.o_proj(o.flatten(-2))
        return out

    def _without_cache(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """Attention of whole sequences to themselves; o [B, T, H, D]."""
        batch, tokens = q.shape[:2]
        position = positions(tokens, cu_seqlens, q.device).unsqueeze(0)
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        if cu_seqlens is None and (self.window is None or tokens <= self.window):
            return self._softmax(q, k, v, position, position)
        if flash.refusal(q.device, q.dtype, self.head_dim) is None:
            ends = torch.arange(0, (batch + 1) * tokens, tokens, device=q.device) if cu_seqlens is None else cu_seqlens
            return flash.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, self.window, tokens).view_as(q)
        if cu_seqlens is None:
            return self._softmax(q, k, v, position, position)
        documents = zip(*(t.split(cu_seqlens.diff().tolist(), 1) for t in (q, k, v, position)), strict=True)
        return torch.cat([self._softmax(q_n, k_n, v_n, own, own) for q_n, k_n, v_n, own in documents], 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: AttentionState) -> tuple[Tensor, AttentionState]:
        """Attention of T new tokens to the cache and to themselves; o [B, T, H, D] and the new cache."""
        position = state.length.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)
        q, k = rotate(q, position, self.rope_theta), rotate(k, position, self.rope_theta)
        self._check_room(state, q.shape[1])
        # slot j of the cache holds the last position p < length with p = j modulo the capacity; none if that is negative
        last = state.length.unsqueeze(1) - 1
        slots = torch.arange(state.k.shape[1], device=q.device)
        held = last - (last - slots).remainder(state.k.shape[1])
        o = self._softmax(
            q,
            torch.cat([state.k.to(k.dtype), k], 1),
            torch.cat([state.v.to(v.dtype), v], 1),
            position,
            torch.cat([held, position], 1),
        )
        return o, self._store(state, k, v, position)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """Scaled dot products under the causal (and window) mask; positions [B or 1, T] and [B or 1, L], negative where a slot is empty."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        grouped = self.num_heads != self.num_kv_heads
        full_square = q_pos is k_pos and (self.window is None or q.shape[2] <= self.window)
        if full_square:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
        q_pos, k_pos = q_pos.unsqueeze(-1), k_pos.unsqueeze(-2)
        mask = (k_pos <= q_pos) & (k_pos >= 0)
        if self.window is not None:
            mask &= k_pos > q_pos - self.window
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=grouped).transpose(1, 2)

    def _store(self, state: AttentionState, k: Tensor, v: Tensor, position: Tensor) -> AttentionState:
        """The cache with the newest tokens written in; the oldest make room."""
        newest, capacity = min(k.shape[1], state.k.shape[1]), state.k.shape[1]
        slot = position[:, -newest:]
        if capacity == self.window:
            slot = slot.remainder(capacity)
        index = slot[..., None, None].expand(-1, -1, *k.shape[2:])
        return AttentionState(
            state.k.scatter(1, index, k[:, -newest:].to(state.k.dtype)),
            state.v.scatter(1, index, v[:, -newest:].to(state.v.dtype)),
            state.length + k.shape[1],
        )

    def _check_room(self, state: AttentionState, tokens: int) -> None:
        """A full cache is an error. On a GPU its write would be out of range, which the device reports."""
        capacity = state.k.shape[1]
        if capacity == self.window or not is_readable(state.length):
            return
        if int(state.length.max()) + tokens > capacity:
            raise ValueError(
                f"Attention: the cache holds {capacity} tokens (init_state's max_tokens), {int(state.length.max())} are in it and {tokens} came"
            )
