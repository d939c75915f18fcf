"""A decoder-only language model of interchangeable mixers: plain torch, no Lightning.

Shapes: B batch rows, T tokens, D d_model, V vocabulary, N sequences (B, or the number of packed documents).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import registry
from mixers.base import ParameterGroups, SequenceMixer, at_least, linear_flops, positive
from mixers.errors import ConfigError
from mixers.fan_out import fan_out
from mixers.init import initialize
from mixers.layers import Linear, normal

LMState = tuple[tuple[Tensor, ...], ...]  # the state of each layer's mixer
MOST_LAYERS = 1000  # far above what is trained; a slip of the keyboard is told before minutes of building


@final
class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)).

    Args:
        d_model: width of the input and the output.
        width: width between.
        init_std: standard deviation of the initial weights.
        residual_scale: factor on the last projection's.
    """

    def __init__(self, d_model: int, width: int, *, init_std: float, residual_scale: float) -> None:
        super().__init__()
        self.gate = Linear(d_model, width, init=normal(init_std))
        self.up = Linear(d_model, width, init=normal(init_std))
        self.down = Linear(width, d_model, init=normal(init_std * residual_scale))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = fan_out(x, self.gate, self.up)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


@final
class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, mixer: SequenceMixer[Any], mlp: SwiGLU, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(mixer.d_model, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(mixer.d_model, eps=norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), state, cu_seqlens=cu_seqlens)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class Sampling(NamedTuple):
    """How a token is drawn from logits."""

    temperature: float = 1.0  # 0: the largest
    top_p: float = 1.0  # the smallest set of tokens with at least this probability


@final
class DecoderLM(nn.Module):
    """Embedding, n blocks of (RMSNorm, mixer, RMSNorm, SwiGLU), RMSNorm, head.

    Args:
        vocab_size: tokens in the vocabulary.
        d_model: width of the residual stream.
        n_layers: blocks.
        mlp_width: width of the SwiGLU MLPs.
        layout: names of mixers, cycled over the layers: built-in, plug-in, dotted path, or an alias from `mixers`.
        mixers: settings by name; may list mixers that the layout does not use. An entry with the key `mixer` is an alias.
        norm_eps: epsilon of the RMSNorms.
        init_std: standard deviation of the initial embeddings, MLPs and head.
        seed: initial values are a function of it and of each parameter's name.

    Raises:
        ConfigError: a setting that cannot be used; one line that names it.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        mlp_width: int,
        layout: list[str],
        mixers: dict[str, dict[str, Any]] | None = None,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, mlp_width=mlp_width)
        if n_layers > MOST_LAYERS:
            raise ConfigError(f"n_layers: must be at most {MOST_LAYERS:,}, got {n_layers:,}")
        positive(norm_eps=norm_eps, init_std=init_std)
        self.settings: dict[str, Any] = {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "n_layers": n_layers,
            "mlp_width": mlp_width,
            "layout": list(layout),
            "mixers": dict(mixers or {}),
            "norm_eps": norm_eps,
            "init_std": init_std,
            "seed": seed,
        }
        self.layer_names = cycle_layout(layout, n_layers)
        registry.check_unused(self.settings["mixers"], set(layout))
        residual_scale = (2 * n_layers) ** -0.5
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList()
        makers = {name: registry.builder(name, self.settings["mixers"]) for name in dict.fromkeys(self.layer_names)}
        for name in self.layer_names:
            mixer = makers[name](d_model)
            mixer.set_residual_scale(residual_scale)
            mlp = SwiGLU(d_model, mlp_width, init_std=init_std, residual_scale=residual_scale)
            self.layers.append(Block(mixer, mlp, norm_eps))
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.head = Linear(d_model, vocab_size, init=normal(init_std))
        if self.embedding.weight.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all initial values anew from (seed, parameter name)."""
        initialize(self, self.settings["seed"])
        with torch.no_grad():
            self.embedding.weight.mul_(self.settings["init_std"])  # torch draws embeddings from N(0, 1)

    def forward(self, tokens_BT: Tensor, state: LMState | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, LMState | None]:
        """Logits [B, T, V] for the token behind each of `tokens_BT`, and the new state (None if `state` is None).

        `cu_seqlens` [N+1]: the row (B = 1) holds N packed documents; nothing crosses a boundary, and `state` has N entries.
        """
        x = self.embedding(tokens_BT)
        states = []
        for i, block in enumerate(self.layers):
            x, after = block(x, None if state is None else state[i], cu_seqlens)
            states.append(after)
        return self.head(self.norm(x)), None if state is None else tuple(states)

    def step(self, tokens_B: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        """Logits [B, V] for the token behind one token of each sequence, and the new state."""
        x = self.embedding(tokens_B)
        states = []
        for block, before in zip(self.layers, state, strict=True):
            x, after = block.step(x, before)  # type: ignore[operator]
            states.append(after)
        return self.head(self.norm(x)), tuple(states)

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LMState:
        """The state before the first token; arguments as `SequenceMixer.init_state`."""
        return tuple(m.init_state(batch_size, max_tokens=max_tokens, device=device, dtype=dtype) for m in self.mixers())

    @torch.no_grad()
    def generate(
        self,
        prompt_T: Tensor,
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Yield new tokens one by one: a forward over the prompt [T], then steps.

        Args:
            prompt_T: token numbers, at least one.
            max_new_tokens: how many at most.
            sampling: None: temperature 1, no cut.
            stop: a token number that ends the text (it is not yielded).
            generator: source of randomness, on the model's device; None: torch's.
        """
        if max_new_tokens < 0:
            raise ConfigError(f"max_new_tokens: must be >= 0, got {max_new_tokens}")
        if prompt_T.ndim != 1 or prompt_T.numel() == 0:
            raise ValueError(f"generate: the prompt must have shape [T] with T >= 1, got {list(prompt_T.shape)}")
        state: LMState | None = self.init_state(1, max_tokens=prompt_T.numel() + max_new_tokens)
        logits, state = self(prompt_T.unsqueeze(0), state)
        last = logits[:, -1]
        for i in range(max_new_tokens):
            token = sample(last, sampling or Sampling(), generator)
            number = int(token)
            if number == stop:
                return
            yield number
            if i + 1 < max_new_tokens:
                assert state is not None
                last, state = self.step(token, state)

    def mixers(self) -> list[SequenceMixer[Any]]:
        """The mixer of each layer."""
        return [block.mixer for block in self.layers]  # type: ignore[misc]

    def parameter_groups(self) -> ParameterGroups:
        """Roles of all parameters by full name: what the mixers declare, and no weight decay on any vector."""
        no_decay = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        fp32: set[str] = set()
        for i, mixer in enumerate(self.mixers()):
            groups = mixer.parameter_groups()
            no_decay |= {f"layers.{i}.mixer.{name}" for name in groups.no_decay}
            fp32 |= {f"layers.{i}.mixer.{name}" for name in groups.fp32}
        return ParameterGroups(frozenset(no_decay), frozenset(fp32))

    def state_numel(self, tokens: int) -> int:
        """Numbers in the state of one sequence after `tokens` tokens, over all layers."""
        return sum(mixer.state_numel(tokens) for mixer in self.mixers())

    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward over one sequence, 2 per multiply-add: mixers, MLPs and head."""
        mixing = sum(mixer.flops(tokens) for mixer in self.mixers())
        mlps = sum(linear_flops(block.get_submodule("mlp"), tokens) for block in self.layers)
        return mixing + mlps + linear_flops(self.head, tokens)


def cycle_layout(layout: list[str], n_layers: int) -> list[str]:
    """The mixer name of each of `n_layers` layers; ConfigError for an empty layout or one longer than the layers."""
    if not layout or not all(isinstance(name, str) for name in layout):
        raise ConfigError(f"layout: must be a list of at least one mixer name, got {layout!r}")
    if len(layout) > n_layers:
        raise ConfigError(f"layout: has {len(layout)} entries for n_layers = {n_layers}; shorten it or add layers")
    return [layout[i % len(layout)] for i in range(n_layers)]


def sample(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Token numbers [B] drawn from softmax(logits / temperature), cut to the top-p set."""
    if not 0 <= sampling.temperature < float("inf") or not 0 < sampling.top_p <= 1:
        raise ConfigError(f"sampling: temperature must be finite and >= 0 and top_p in (0, 1], got {sampling.temperature} and {sampling.top_p}")
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    # float64, and the largest logit at 0: no temperature then overflows
    ordered, index = ((logits_BV.double() - logits_BV.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1).sort(-1, descending=True)
    # a token stays if those before it hold less than top_p: the first always does
    kept = ordered * (ordered.cumsum(-1) - ordered < sampling.top_p)
    return index.gather(-1, torch.multinomial(kept, 1, generator=generator)).squeeze(-1)
