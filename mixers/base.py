"""The contract of every mixer. `mixers.testing` checks a class against it.

Shapes: B batch rows, T tokens, D d_model, N sequences (B, or the number of packed documents).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from kernels.varlen import check_cu_seqlens
from mixers.errors import ConfigError
from mixers.layers import FP32Module

StateT = TypeVar("StateT", bound=tuple[Tensor, ...])


class ParameterGroups(NamedTuple):
    """Roles of a mixer's parameters, by their names inside the mixer."""

    no_decay: frozenset[str]  # take no weight decay
    fp32: frozenset[str]  # are stored, read and saved in at least float32


class SequenceMixer(nn.Module, ABC, Generic[StateT]):
    """Mixes a sequence of vectors along time, causally.

    Any split of a sequence into forwards and steps equals one forward; packed sequences equal separate ones; the state that is passed in is never
    changed. A mixer that cannot do something raises and says so.

    Args:
        d_model: width of the input and the output.

    Attributes:
        state_type: the `StateT` that a class names, so that another mixer's state is refused.
    """

    state_type: ClassVar[type[tuple[Any, ...]]] = tuple

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for base in cls.__dict__.get("__orig_bases__", ()):
            for named in get_args(base):
                if isinstance(named, type) and issubclass(named, tuple):
                    cls.state_type = named

    def __init__(self, d_model: int) -> None:
        super().__init__()
        at_least(1, d_model=d_model)
        self.d_model = d_model

    @abstractmethod
    def forward(self, x_BTD: Tensor, state: StateT | None = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, StateT | None]:
        """T tokens at once.

        Args:
            x_BTD: the input.
            state: what came before, from `init_state`, `forward` or `step`; None: nothing came before and no state is wanted.
            cu_seqlens: [N+1] integer, 0 to T strictly increasing: the row (B = 1) holds N packed sequences, and `state` has N entries.

        Returns:
            The output [B, T, D] and the new state; None if `state` is None.
        """

    @abstractmethod
    def init_state(
        self,
        batch_size: int,
        *,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StateT:
        """The state before the first token of `batch_size` sequences.

        `max_tokens` bounds the tokens of a sequence, for mixers whose state grows. `dtype` is that of caches (None: the parameters'); a recurrent
        state is float32 at least.
        """

    @abstractmethod
    def step(self, x_BD: Tensor, state: StateT) -> tuple[Tensor, StateT]:
        """One token of each sequence: the output [B, D] and the new state."""

    @abstractmethod
    def state_numel(self, tokens: int) -> int:
        """Numbers that the state of one sequence holds after `tokens` tokens."""

    @abstractmethod
    def flops(self, tokens: int) -> int:
        """Floating-point operations of one forward over one sequence, 2 per multiply-add: the projections, and one formula for the mixing."""

    def parameter_groups(self) -> ParameterGroups:
        """By default: vectors and everything in an `FP32Module` take no weight decay; everything in an `FP32Module` stays float32."""
        fp32 = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            if isinstance(module, FP32Module)
            for name, _ in module.named_parameters()
        }
        vectors = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        return ParameterGroups(frozenset(vectors | fp32), frozenset(fp32))

    def runs_on(self, device: torch.device, dtype: torch.dtype) -> str | None:  # noqa: ARG002
        """What computes whole sequences there, for a log line; None: ops of `kernels`, which say it themselves."""
        return None

    def set_residual_scale(self, scale: float) -> None:
        """Called by a model before it draws initial values, with 1 / sqrt(2 * layers). Mixers whose recipe scales their last projection use it."""

    def check_input(self, x: Tensor, state: tuple[Tensor, ...] | None, cu_seqlens: Tensor | None) -> None:
        """Raises ValueError for inputs of `forward` that do not fit each other."""
        name = type(self).__name__
        if x.ndim != 3 or x.shape[-1] != self.d_model or 0 in x.shape:
            raise ValueError(f"{name}: input must have shape [B, T, d_model = {self.d_model}], got {list(x.shape)}")
        sequences = x.shape[0]
        if cu_seqlens is not None:
            if x.shape[0] != 1:
                raise ValueError(f"{name}: packed sequences (cu_seqlens) need B = 1, got B = {x.shape[0]}")
            check_cu_seqlens(cu_seqlens, x.shape[1], op=name)
            sequences = cu_seqlens.numel() - 1
        self.check_state(state, sequences)

    def check_step(self, x: Tensor, state: tuple[Tensor, ...]) -> None:
        """Raises ValueError for inputs of `step` that do not fit each other."""
        if x.ndim != 2 or x.shape[-1] != self.d_model or 0 in x.shape:
            raise ValueError(f"{type(self).__name__}: input of a step must have shape [B, d_model = {self.d_model}], got {list(x.shape)}")
        if state is None:
            raise ValueError(f"{type(self).__name__}: a step needs a state, of init_state, forward or the step before, got None")
        self.check_state(state, x.shape[0])

    def check_state(self, state: tuple[Tensor, ...] | None, sequences: int) -> None:
        """Raises ValueError for a state of another kind of mixer, or of another number of sequences."""
        if state is not None and not isinstance(state, self.state_type):
            raise ValueError(f"{type(self).__name__}: the state must be a {self.state_type.__name__}, got a {type(state).__name__}")
        if state is not None and any(t.shape[:1] != (sequences,) for t in state):
            got = [list(t.shape) for t in state]
            raise ValueError(f"{type(self).__name__}: the state must hold {sequences} sequences, its tensors have shapes {got}")


MOST_NAMED = 16  # values in a message


def _listed(values: Iterable[object]) -> str:
    """The first of `values` for a message, in one line."""
    texts = [" ".join(str(value).split()) for value in values]
    return ", ".join([*texts[:MOST_NAMED], *(["..."] if len(texts) > MOST_NAMED else [])]) or "none"


def at_least(least: int, /, **settings: Any) -> None:
    """Raises ConfigError for the first of `settings` that is not an integer >= `least`."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{name}: must be an integer >= {least}, got {value!r}")


def boolean(**settings: Any) -> None:
    """Raises ConfigError for the first of `settings` that is neither True nor False: any text would pass for true."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: must be true or false, got {value!r}")


def positive(**settings: Any) -> None:
    """Raises ConfigError for the first of `settings` that is not a finite number above 0, in float32 too."""
    least, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    for name, value in settings.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
            finite = isinstance(value, float) and 0 < value < math.inf
            size = "" if not finite else "small" if value < least else "large"
            raise ConfigError(f"{name}: must be a finite number above 0, got {value!r}{f', which is too {size} for float32' if size else ''}")


def multiple_of(name: str, value: int, base_name: str, base: int) -> None:
    """Raises ConfigError unless `value` is a multiple of `base`."""
    if value % base:
        near = sorted({max(base, value - value % base), value - value % base + base})
        raise ConfigError(f"{name}: must be a multiple of {base_name} = {base}, got {value} (nearest: {', '.join(map(str, near))})")


def divides(name: str, value: int, whole: int, what: str) -> None:
    """Raises ConfigError unless `value` divides `whole`, which is the number of `what`."""
    if whole % value:
        small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
        legal = sorted({*small, *(whole // n for n in small)}, key=lambda n: abs(n - value))
        raise ConfigError(f"{name}: {value} does not divide {what} (legal: {_listed([*sorted(legal[:MOST_NAMED]), *legal[MOST_NAMED:]])})")


def default_head_dim(name: str, given: int | None, width: int, num_heads: int) -> int:
    """`given`, or `width` shared evenly by the heads; ConfigError if that does not come out even."""
    if given is not None:
        at_least(1, **{name: given})
        return given
    if width < num_heads or width % num_heads:
        raise ConfigError(f"num_heads: {num_heads} heads do not divide {width} channels; set {name} or another number of heads")
    return width // num_heads


def load_named(module: nn.Module, state_dict: Mapping[str, Tensor], table: Mapping[str, str], source: str) -> None:
    """Copies the weights of another package's layer.

    Args:
        module: takes them.
        state_dict: the other layer's, by its own names.
        table: other name -> name of the parameter of `module`; entries that `module` has no parameter for do not count.
        source: the other package, for messages.

    Raises:
        ConfigError: a tensor that is missing, has another shape, no finite real numbers, or is not in the table; nothing is changed then.
    """
    own = dict(module.named_parameters())
    names = {theirs: ours for theirs, ours in table.items() if ours in own}
    if not isinstance(state_dict, Mapping):
        raise ConfigError(f"state dict of {source}: must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for theirs, ours in names.items():
        if theirs not in state_dict:
            raise ConfigError(f"state dict of {source}: has no tensor {theirs} (it has: {_listed(sorted(map(str, state_dict)))})")
        if why := _unfit(state_dict[theirs], own[ours]):
            raise ConfigError(f"state dict of {source}: {theirs} {why}")
    if more := sorted(map(str, state_dict.keys() - names.keys())):
        raise ConfigError(f"state dict of {source}: has tensors that this layer does not have: {_listed(more)} (legal: {_listed(names)})")
    with torch.no_grad():
        for theirs, ours in names.items():
            own[ours].copy_(state_dict[theirs])


def _unfit(value: Any, parameter: Tensor) -> str | None:
    """Why a parameter cannot take a value; None if it can."""
    wanted = "must be a tensor of floating-point numbers, got"
    if not isinstance(value, Tensor):
        return f"{wanted} {type(value).__name__}"
    if value.is_meta:
        return f"{wanted} a tensor without values"
    if value.layout != torch.strided or not value.is_floating_point():
        return f"{wanted} {value.dtype}, {value.layout}"
    if value.shape != parameter.shape:
        return f"has the shape {list(value.shape)}, this layer's is {list(parameter.shape)}"
    if parameter.is_meta:
        return "cannot be taken: this layer is on the meta device, without memory"
    if not value.to(parameter.dtype).isfinite().all():
        return f"has numbers that are not finite in {parameter.dtype}"
    return None


def linear_flops(module: nn.Module, tokens: int) -> int:
    """2 per weight of every linear layer in `module`, per token."""
    return sum(2 * tokens * m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))
