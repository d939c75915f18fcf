"""Several linear layers that read one input: their products, and the gradient of that input in one buffer.

Shapes: T tokens, D d_model, N outputs of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kernels.autograd import first_order
from mixers.layers import Linear, to_autocast

NARROW = 512  # outputs; layers of fewer share a product, for one of few columns leaves most of a GPU without work


def fan_out(x: Tensor, *readers: nn.Module | Sequence[nn.Module]) -> list[Tensor]:
    """The outputs of linear layers without bias on x [.., D]: of each reader [.., N], of several in a sequence side by side.

    With more tokens than D, weights whose outputs belong together are laid side by side, which moves fewer bytes than joining the outputs, and the
    gradient of x is one buffer that every product is added to, instead of a tensor a layer and their sums. If a layer is not just a weight
    (replaced, hooked, split over devices), all are called.
    """
    x = to_autocast(x)
    groups = [[reader] if isinstance(reader, nn.Module) else list(reader) for reader in readers]
    if x.shape[:-1].numel() <= x.shape[-1] or not all(_is_just_a_weight(layer) for group in groups for layer in group):
        return [_join([layer(x) for layer in group]) for group in groups]
    weights: list[list[Tensor]] = [[layer.weight for layer in group] for group in groups]  # type: ignore[misc]
    widths = [sum(len(weight) for weight in group) for group in weights]
    wide = [i for i, width in enumerate(widths) if width >= NARROW]
    narrow = [i for i, width in enumerate(widths) if width < NARROW]
    shared = [weight for i in narrow for weight in weights[i]]
    found = _products(x, [*(weights[i] for i in wide), *([shared] if shared else [])])
    # copied, which is little: a product of a slice with a weight takes its bias in a launch of its own
    parts = [part.contiguous() for part in found.pop().split([widths[i] for i in narrow], -1)] if shared else []
    outputs = {**dict(zip(wide, found, strict=True)), **dict(zip(narrow, parts, strict=True))}
    return [outputs[i] for i in range(len(groups))]


def _is_just_a_weight(layer: nn.Module) -> bool:
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is Linear and layer.bias is None and not isinstance(layer.weight, DTensor) and not any(hooks)


def _join(outputs: list[Tensor]) -> Tensor:
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _products(x: Tensor, groups: list[list[Tensor]]) -> list[Tensor]:
    """x [.., D] times the weights [N_i, D] of each group, side by side [.., sum N_i]."""
    if torch.compiler.is_compiling():  # the compiler sums gradients on its own
        return [F.linear(x, torch.cat([to_autocast(weight) for weight in group])) for group in groups]
    sizes = [[len(weight) for weight in group] for group in groups]
    found: tuple[Tensor, ...] = _Products.apply(x, sizes, *(weight for group in groups for weight in group))  # type: ignore[no-untyped-call]
    return list(found)


class _Products(torch.autograd.Function):
    """Of every group the product of x with its weights. Saves x and the weights as they were multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[list[int]], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.dtypes = sizes, [weight.dtype for weight in weights]
        rest = iter(weights)
        joined = [_rows([to_autocast(next(rest)) for _ in group]) for group in sizes]
        ctx.save_for_backward(x, *joined)
        return tuple(F.linear(x, weight) for weight in joined)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *joined = ctx.saved_tensors
        rows, dx = x.reshape(-1, x.shape[-1]), None
        of_x, _, *of_weights = ctx.needs_input_grad
        found: list[Tensor | None] = []
        for group, weight, dy in zip(ctx.sizes, joined, gradients, strict=True):
            first = len(found)
            if dy is None:
                found += [None] * len(group)
                continue
            dy = dy.reshape(-1, dy.shape[-1])
            if of_x:
                dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            if any(of_weights[first : first + len(group)]):
                found += _in_dtype(dy.T, rows, ctx.dtypes[first]).split(group)
            else:
                found += [None] * len(group)
        return None if dx is None else dx.view_as(x), None, *found


def _rows(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _in_dtype(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on a GPU 16-bit products leave their float32 sums unrounded."""
    if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
