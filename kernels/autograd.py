"""Derivatives of custom ops, for tracing and for eager calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def is_direct(x: Tensor) -> bool:
    """Whether what is computed from `x` may run its kernels without the op around them.

    An op's arguments stay alive until it returns; without it a tensor can be freed behind its last reader, and the host has less to do. The op is
    needed where somebody sees it: a compiler, a dispatch mode, a tensor that only stands for one, autograd (of gradients too, if these are to be
    differentiated again).
    """
    watched = torch.compiler.is_compiling() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
    return not watched and type(x) is Tensor


class _Once(torch.autograd.Function):
    """The first `n` of some tensors, which hang on the others too: whoever differentiates them is told."""

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        return tuple(x.view_as(x) for x in tensors[:n])

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError("there is no autograd formula for second derivatives here: these gradients cannot be differentiated again")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For an `autograd.Function` whose backward pass is not made of differentiable operations.

    `once_differentiable` of torch leaves its error where `torch.autograd.grad` with named inputs never comes by: second derivatives lack a term then,
    without a word. Here the gradients hang on all that they were made from.
    """

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        made = [x for x in found if isinstance(x, Tensor)]
        marked = iter(_Once.apply(len(made), *made, *(x for x in (*gradients, *ctx.saved_tensors) if x is not None)))  # type: ignore[no-untyped-call]
        return tuple(next(marked) if isinstance(x, Tensor) else x for x in found)

    return run


def differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any], outputs: int | None = None) -> Callable[..., Any]:
    """Registers the derivative of a custom op and returns the function to call it by.

    Eager calls go through an `autograd.Function` of the same two functions: what `register_autograd` builds walks the schema, and trees of all
    arguments and results, at every call, which takes the host as long as several launches. Tracing goes by the registration.

    Args:
        op: from `torch.library.custom_op`.
        setup_context, backward: as `op.register_autograd` takes them.
        outputs: how many of the tensors of an op that returns a list are results; the rest is only kept for `backward`. None: it returns no list.
    """
    op.register_autograd(backward, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output if outputs is None else tuple(output[:outputs])

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients) if outputs is None else backward(ctx, list(gradients))

    def run(*inputs: Any) -> Any:
        traced = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        return op(*inputs) if traced else Eager.apply(*inputs)  # type: ignore[no-untyped-call]

    return run
