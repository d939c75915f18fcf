"""The delta rule as a custom op of torch: opaque to tracing, with shapes for fake tensors and a backward pass of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.autograd import differentiable, is_direct
from kernels.delta.reference import CHUNK
from kernels.varlen import most_chunks

MAX_HEAD = 256  # a column block of the state has K rows, all in registers
MAX_SCAN = 128  # the gradient of a whole state is in registers
MAX_RANKS = CHUNK  # a token lies in one chunk
INPUTS = ("q", "k", "v", "g", "b", "w", "own")
KEPT = ("A", "P", "Y", "R", "Qg", "Ktail", "gamma", "S")  # fields of `forward.Forward` for the backward pass


def refusal(q: Tensor, v: Tensor, *, ranked: bool = False) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    if v.dtype == torch.float64:
        return "float64 has no kernel"
    if ranked and max(q.shape[-1], v.shape[-1]) > MAX_SCAN:
        return f"K = {q.shape[-1]} and V = {v.shape[-1]} must be at most {MAX_SCAN} with ranks or own"
    if q.ndim == 5 and q.shape[2] > MAX_RANKS:
        return f"R = {q.shape[2]} is above {MAX_RANKS}"
    return f"K = {q.shape[-1]} is above {MAX_HEAD}" if q.shape[-1] > MAX_HEAD else None


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, own: Tensor | None, scale: float,
    state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kernels.delta_rule` on Triton. Sizes without a kernel of their own are filled up with zeros, which change nothing: channels, and ranks."""
    k_dim, v_dim, ranks = q.shape[-1], v.shape[-1], q.shape[2] if q.ndim == 5 else 1
    k_more, v_more, more = _padded(k_dim) - k_dim, _padded(v_dim) - v_dim, (1 << (ranks - 1).bit_length()) - ranks
    if k_more or v_more:
        q, k, v = F.pad(q, (0, k_more)), F.pad(k, (0, k_more)), F.pad(v, (0, v_more))
        # a gate of one channel stays one number a head: of one channel in all it would become one a channel, which ranks and own cannot have
        g, b = (x if x is None or x.shape[-1] == 1 else F.pad(x, (0, k_more)) for x in (g, b))
        w = w if w is None or w.shape[-1] == 1 else F.pad(w, (0, v_more))
        state = None if state is None else F.pad(state, (0, v_more, 0, k_more))
    with_ranks = q.ndim == 5
    if with_ranks:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, more)).flatten(1, 2) if more else x.flatten(1, 2) for x in (q, k, v))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, g, b, w, own, state))
    o, final, *_ = _run(q, k, v, g, b, w, own, scale, state, cu_seqlens, ranks + more, save)
    if with_ranks:
        o = o.unflatten(1, (-1, ranks + more))[:, :, :ranks]
    return (o[..., :v_dim], final[..., :k_dim, :v_dim]) if k_more or v_more else (o, final)


def _padded(size: int) -> int:
    """The next size with kernels: a power of two from 32 on, and above MAX_HEAD (values only) a multiple of 64."""
    return -(-size // 64) * 64 if size > MAX_HEAD else max(32, 1 << (size - 1).bit_length())


@torch.library.custom_op("lightning_mixers::delta_rule", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, own: Tensor | None, scale: float,
    state: Tensor | None, cu_seqlens: Tensor | None, ranks: int, save: bool,
) -> list[Tensor]:  # fmt: skip
    """q, k and v with `ranks` rows a token, side by side on their time axis."""
    from kernels.delta import forward, scan

    with torch.cuda.device_of(q):  # Triton launches on the current device
        if scans(q, v, g, b):
            o, final, states = scan.forward(q, k, v, g, w, own, scale, state, cu_seqlens, ranks, save)
            return [o, final, states] if save else [o, final]
        done = forward.launch(q, k, v, g, b, w, scale, state, cu_seqlens, save)
    return [done.o, done.final, *(getattr(done, name) for name in _kept(q, v, g, b) if save)]


def scans(q: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None) -> bool:
    """Whether the launches are those of `scan.py`: without erase nothing of a chunk needs to be solved for before the serial pass."""
    return b is None and (g is None or g.shape[-1] == 1) and max(q.shape[-1], v.shape[-1]) <= MAX_SCAN


def _kept(q: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None) -> tuple[str, ...]:
    """Which of `KEPT` there are: all that `scan.py` leaves are the states; without erase there is neither A nor Y."""
    return KEPT[-1:] if scans(q, v, g, b) else tuple(name for name in KEPT if b is not None or name not in "AY")


def _shapes(q: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, cu_seqlens: Tensor | None, save: bool) -> list[tuple[Any, ...]]:
    """Shapes of what the op returns."""
    (batch, tokens, _, k_dim), (heads, v_dim) = q.shape, v.shape[-2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    n = batch * (-(-tokens // CHUNK)) if cu_seqlens is None else most_chunks(tokens, sequences, CHUNK)
    square, keys, values = (n, heads, CHUNK, CHUNK), (n, heads, CHUNK, k_dim), (n, heads, CHUNK, v_dim)
    decay = (n, heads, k_dim if g is not None and g.shape[-1] == k_dim else 1)
    shapes = dict(zip(KEPT, [square, square, keys, values, keys, keys, decay, (n, heads, k_dim, v_dim)], strict=True))
    return [(*v.shape,), (sequences, heads, k_dim, v_dim), *(shapes[name] for name in _kept(q, v, g, b) if save)]


@_forward.register_fake
def _(q, k, v, g, b, w, own, scale, state, cu_seqlens, ranks, save):  # type: ignore[no-untyped-def]  # noqa: ARG001
    shapes = _shapes(q, v, g, b, cu_seqlens, save)
    single = (1, max(1, len(shapes) - 2))  # in float32: the final state and gamma, the last but one where it is kept
    return [v.new_empty(shape, dtype=torch.float32 if i in single else v.dtype) for i, shape in enumerate(shapes)]


@torch.library.custom_op("lightning_mixers::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, own: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, ranks: int, kept: list[Tensor], do: Tensor, dfinal: Tensor,
) -> list[Tensor]:  # fmt: skip
    return _launch([q, k, v, g, b, w, own, cu_seqlens, *kept], scale, ranks, do, dfinal)


@_backward.register_fake
def _(q, k, v, g, b, w, own, scale, cu_seqlens, ranks, kept, do, dfinal):  # type: ignore[no-untyped-def]  # noqa: ARG001
    return [*(x.new_empty(x.shape) for x in (q, k, v, g, b, w, own) if x is not None), dfinal.new_empty(dfinal.shape)]


def _launch(tensors: list[Tensor | None], scale: float, ranks: int, do: Tensor, dfinal: Tensor) -> list[Tensor]:
    """The backward pass. `tensors`, in the order in which they are saved, is emptied, see `backward.launch`."""
    from kernels.delta import backward, scan

    inputs: dict[str, Any] = dict(zip(INPUTS, tensors, strict=False))
    q, cu_seqlens = inputs["q"], tensors[len(INPUTS)]
    kept: list[Any] = tensors[len(INPUTS) + 1 :]
    tensors.clear()
    names = _kept(q, inputs["v"], inputs["g"], inputs["b"])
    with torch.cuda.device_of(q):
        if names == ("S",):
            return scan.backward(inputs, kept, scale, cu_seqlens, ranks, do, dfinal)
        of = dict.fromkeys(KEPT, q) | dict(zip(names, kept, strict=True))
        kept.clear()
        del inputs["own"]
        return backward.launch(inputs, of, scale, cu_seqlens, do, dfinal)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, scale, state, cu_seqlens, ranks, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens, *output[2:])
    ctx.scale, ctx.ranks, ctx.has_state, ctx.final_shape = scale, ranks, state is not None, output[1].shape
    ctx.set_materialize_grads(False)  # there are gradients of o and of the final state, of one or of both; none of what is kept


def _gradients(ctx: Any, gradients: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    tensors = list(ctx.saved_tensors)  # and no other name for one of them: it would keep it alive
    there = [x is not None for x in tensors[: len(INPUTS)]]
    do, dfinal = gradients[:2]
    if do is None:
        do = torch.zeros_like(tensors[2])
    if dfinal is None:
        dfinal = do.new_zeros(ctx.final_shape, dtype=torch.float32)
    if is_direct(do):
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        done = _launch(tensors, ctx.scale, ctx.ranks, do, dfinal)
    else:
        q, k, v, g, b, w, own, cu_seqlens, *kept = tensors
        done = torch.ops.lightning_mixers.delta_rule_backward(q, k, v, g, b, w, own, ctx.scale, cu_seqlens, ctx.ranks, kept, do, dfinal)
    *by_input, dstate = done
    left = iter(by_input)
    dq, dk, dv, dg, db, dw, down = [next(left) if x else None for x in there]
    return dq, dk, dv, dg, db, dw, down, None, dstate if ctx.has_state else None, None, None, None


_run = differentiable(_forward, _setup_context, _gradients, outputs=2)
