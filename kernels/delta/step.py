"""Decoding: the custom op `lightning_mixers::delta_rule_step` and its launch. No gradients: `refusal` sends those to the reference.

Shapes: B sequences, H key heads, HV value heads, K key size, V value size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.autograd import is_direct
from kernels.tiles import Key, Tile, TileTable

MAX_K = 256  # a program holds whole columns of the state

# By how many states (sequence, head) there are. Few states: narrow blocks, so that every multiprocessor has work. Many: wide blocks, whose rows
# are long runs of memory. A block is never wider than V. Rows of the table are by K, rounded up to a power of two.
FEW, SOME = 64, 1024
TILES = TileTable(
    "delta_rule_step",
    safe={
        "step_few": Tile(4, 1, {"BV": 16}),
        "step_some": Tile(4, 1, {"BV": 32}),
        "step_many": Tile(4, 1, {"BV": 64}),
    },
    tuned={"step_few": {Key("sm_90", 2, 128): Tile(1, 1, {"BV": 16})}},
)

# what `bench tune` tries
CANDIDATES = {name: [Tile(warps, 1, {"BV": columns}) for columns in (16, 32, 64, 128) for warps in (1, 2, 4, 8)] for name in TILES.safe}


def refusal(q: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these arguments of `kernels.delta_rule_step`; None if it can."""
    if q.dtype == torch.float64:
        return "it computes in float32"
    if q.shape[-1] > MAX_K:
        return f"K = {q.shape[-1]} is above {MAX_K}"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others)):
        return "it has no gradients"
    return None


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """As `kernels.delta_rule_step`: o [B, HV, V] in v's dtype and the new state [B, HV, K, V]."""
    result: tuple[Tensor, Tensor] = (launch_step if is_direct(v) else _step)(q, k, v, g, b, w, scale, state)
    return result


@torch.library.custom_op("lightning_mixers::delta_rule_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    return launch_step(q, k, v, g, b, w, scale, state)


@_step.register_fake
def _(
    q: Tensor,  # noqa: ARG001
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    g: Tensor | None,  # noqa: ARG001
    b: Tensor | None,  # noqa: ARG001
    w: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def launch_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, scale: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One launch, which a CUDA graph can hold: nothing waits for the device."""
    from kernels.delta._triton.step import step_kernel

    (batch, v_heads, v_dim), k_dim = v.shape, k.shape[-1]
    q, k, v, state = _rows(q), _rows(k), _rows(v), state.contiguous()
    g, b, w = [None if x is None else _rows(x) for x in (g, b, w)]
    o, new_state = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)
    BK = _power_of_two(k_dim)
    states = batch * v_heads
    size_class = "step_few" if states <= FEW else "step_some" if states <= SOME else "step_many"
    options = TILES.pick(size_class, v.device, v.element_size(), BK).options()
    BV = options["BV"] = min(options["BV"], _power_of_two(v_dim))
    strides: list[int] = []
    for x in (q, k, v, g, b, w):
        strides += (0, 0) if x is None else x.stride()[:2]
    groups = [1 if x is None else v_heads // x.shape[1] for x in (k, g, b)]
    channels = [int(x is not None and x.shape[-1] > 1) for x in (g, b, w)]
    with torch.cuda.device_of(v):  # Triton launches on the current device
        step_kernel[(states * -(-v_dim // BV),)](
            q, k, v, g, b, w, state, o, new_state, scale, *strides, v_heads, *groups, *channels, K=k_dim, V=v_dim, BK=BK, **options
        )  # fmt: skip
    return o, new_state


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring channels side by side; the axes before them may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
