"""What the contract tests of `mixers.testing` run on: mixers made small, variants, stacks of mixers, and the ways errors are measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixers import registry
from mixers.base import SequenceMixer
from mixers.init import initialize

if TYPE_CHECKING:
    import pytest

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
TOKENS = 72  # more than a chunk of the delta rule
# sizes that make any mixer small; a setting that a mixer does not have is left out
SMALL = {"num_heads": 2, "head_dim": 8, "d_state": 8, "window": 5}

State = tuple[Tensor, ...]
Mixer = SequenceMixer[Any]


class Case(NamedTuple):
    """A mixer (or a stack of mixers) under test."""

    label: str
    names: tuple[str, ...]
    settings: dict[str, dict[str, Any]]
    d_model: int

    def build(self, dtype: torch.dtype = torch.float64) -> Mixer:
        """The mixer with initial values of seed 0, ten times as large as usual: gates then move away from 1/2."""
        parts = [registry.build(name, self.d_model, self.settings) for name in self.names]
        mixer = parts[0] if len(parts) == 1 else Stack(parts)
        initialize(mixer, 0)
        fp32 = mixer.parameter_groups().fp32
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                if parameter.ndim > 1 and name not in fp32:
                    parameter.mul_(10)
        return mixer.to(dtype)


class Stack(SequenceMixer[State]):
    """x + mixer(norm(x)), mixer after mixer: the contract holds for hybrids if it holds here."""

    def __init__(self, parts: list[Mixer]) -> None:
        super().__init__(parts[0].d_model)
        self.parts = nn.ModuleList(parts)
        self.sizes = [len(part.init_state(1, max_tokens=1)) for part in parts]

    def _each(self, x: Tensor, state: State | None, call: Callable[[Mixer, Tensor, Any], tuple[Tensor, Any]]) -> tuple[Tensor, State | None]:
        after: list[Tensor] = []
        start = 0
        for part, size in zip(self.parts, self.sizes, strict=True):
            before = None if state is None else type(part.init_state(1, max_tokens=1))(*state[start : start + size])  # type: ignore[operator]
            y, s = call(part, F.rms_norm(x, (self.d_model,), eps=1e-5), before)  # type: ignore[arg-type]
            x, start = x + y, start + size
            after.extend(s or ())
        return x, None if state is None else tuple(after)

    def forward(self, x_BTD: Tensor, state: State | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, State | None]:
        self.check_input(x_BTD, state, cu_seqlens)
        return self._each(x_BTD, state, lambda part, x, s: part(x, s, cu_seqlens=cu_seqlens))

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        y, after = self._each(x_BD, state, lambda part, x, s: part.step(x, s))
        assert after is not None
        return y, after

    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        states = (part.init_state(batch_size, max_tokens=max_tokens, device=device, dtype=dtype) for part in self.parts)  # type: ignore[operator]
        return tuple(t for state in states for t in state)

    def state_numel(self, tokens: int) -> int:
        return sum(part.state_numel(tokens) for part in self.parts)  # type: ignore[operator]

    def flops(self, tokens: int) -> int:
        return sum(part.flops(tokens) for part in self.parts)  # type: ignore[operator]


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gdn2-grouped": ("gdn2", {"num_v_heads": 4, "v_head_dim": 12}),
    "gdn2-scalar-gates": ("gdn2", {"erase": "scalar", "write": "scalar", "allow_neg_eigval": True}),
    "kda-grouped": ("kda", {"num_v_heads": 4}),
    "gdn-grouped": ("gdn", {"num_v_heads": 6, "v_head_dim": 4}),
    "mamba2-grouped": ("mamba2", {"num_groups": 2, "d_state": 6}),
    "mamba3-mimo": ("mamba3", {"mimo_rank": 4}),
    "mamba3-grouped": ("mamba3", {"mimo_rank": 2, "num_groups": 2, "rope_fraction": 1.0, "out_norm": True}),
    "attention-grouped": ("attention", {"num_heads": 4, "num_kv_heads": 2}),
    "swa-window-1": ("swa", {"window": 1}),
}
HYBRIDS = (("gdn2", "swa"), ("kda", "gdn2", "attention"), ("deltanet", "gla", "swa", "linear_attention"), ("mamba2", "swa", "mamba3"))


def small_settings(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    """`SMALL` where the mixer has such a setting and does not fix it itself, then `extra`."""
    source = registry.find(name)
    legal = registry.settings_of(registry.load(source, key=name))
    wanted = {k: v for k, v in SMALL.items() if k in legal and not (k == "window" and "window" not in source.preset)}
    return {**wanted, **extra}


def cases(config: pytest.Config) -> list[Case]:
    """The mixers named by `--mixer`; without it every registered one, variants and hybrids."""
    d_model, names = config.getoption("--mixer-d-model"), config.getoption("--mixer")
    if names:
        extra = json.loads(config.getoption("--mixer-settings"))
        return [Case(name, (name,), {name: small_settings(name, extra)}, d_model) for name in names]
    singles: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in registry.available()}
    found = [Case(label, (name,), {name: small_settings(name, extra)}, d_model) for label, (name, extra) in {**singles, **VARIANTS}.items()]
    return found + [Case("+".join(h), h, {n: small_settings(n, {}) for n in h}, d_model) for h in HYBRIDS]


def error(a: Tensor, b: Tensor, floor: float = 1e-30) -> float:
    """max|a - b| / max(|b|, floor); infinite where either is not finite."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {list(a.shape)} and {list(b.shape)}")
    a, b = a.detach().double(), b.detach().double()
    worst = (a - b).abs().max() / b.abs().max().clamp_min(floor)
    return float(worst) if bool(a.isfinite().all() and b.isfinite().all()) else float("inf")


def assert_close(a: Tensor, b: Tensor, what: str, floor: float = 1e-30) -> None:
    found = error(a, b, floor)
    assert found <= TOLERANCE[b.dtype], f"{what}: error {found:.2e} above {TOLERANCE[b.dtype]:.0e} of the largest entry"


def assert_states_close(a: State, b: State) -> None:
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        if right.is_floating_point():
            assert_close(left, right, f"state tensor {i}")
        else:
            assert torch.equal(left, right), f"state tensor {i}"


def inputs(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(mixer: Mixer, x: Tensor, weights: Tensor, **call: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of one forward and the gradients of sum(output * weights): the input's and every parameter's."""
    x = x.detach().requires_grad_()
    mixer.zero_grad()
    y, _ = mixer(x, **call)
    (y * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), {"input": x.grad, **gradients}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{what}: gradient of {name} is not bitwise the same"
