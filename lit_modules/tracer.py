"""A micro-batch run again with hooks on every module: the first tensor that is not finite, and the ranges of gates, activations and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import Node
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from kernels.delta import api as delta_api
from lit_modules.data.windows import Batch
from lit_modules.decoder_lm import DecoderLM
from mixers.layers import FP32Module

CHUNK = 2**24  # entries of which copies are made at a time

Range = dict[str, float]


class Span(NamedTuple):
    """The nodes of autograd's graph that a call of a module has made: autograd numbers them as they come."""

    module: str
    begin: int
    end: int


def run_again(lm: DecoderLM, batch: Batch, loss_of: Callable[[Batch], Tensor]) -> list[dict[str, Any]]:
    """What every rank finds in its micro-batch: forward, and backward if no rank has found anything; gradients are dropped."""
    lm.zero_grad(set_to_none=True)
    tracer = Tracer(lm)
    with tracer.attached():
        loss = loss_of(batch)
        if tracer.first is None and not bool(loss.isfinite()):
            tracer.first = {"kind": "loss", "tensor": "loss"}
        if not any(gathered(tracer.first)):
            mean = loss / batch.targets.numel()
            tracer.watch(mean)
            mean.backward()
            bad = bad_tensors((name, p.grad) for name, p in reversed(list(lm.named_parameters())) if p.grad is not None)
            if not any(gathered(tracer.first)) and bad:  # else it came from another rank, with the sum over all of them
                tracer.first = {"kind": "gradient", "tensor": bad[0]}
    lm.zero_grad(set_to_none=True)
    return gathered({"first": tracer.first, "gates": tracer.ranges(), "outputs": tracer.outputs})


class Tracer:
    """Hooks on every module and every step of the backward pass that note the first tensor that is not finite, and the ranges of gates and outputs.

    A gradient is blamed on the innermost module whose backward pass was given finite ones and returned it, not on those that it reaches.
    """

    def __init__(self, lm: DecoderLM) -> None:
        self.lm = lm
        self.first: dict[str, Any] | None = None
        self.gates: dict[str, dict[str, Range]] = {}  # layer -> gate -> range
        self.outputs: dict[str, Range] = {}  # layer, embedding, norm or head -> range
        self._parts = parts(lm)
        self._begun: list[int] = []  # of the modules under way
        self._spans: list[Span] = []  # of calls that are through, so inner ones before those around them
        self._forward = True  # a module that is run once more for its backward pass (activation checkpointing) is not looked at
        self._mixers = {f"layers.{i}.mixer": f"{i} ({name})" for i, name in enumerate(lm.layer_names)}
        self._layer = ""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are in place inside. Gates are seen where they enter the delta rule, and where a module in float32 returns them."""
        handles: list[RemovableHandle] = []
        for name, module in self.lm.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._behind(name)))
        check = delta_api._check

        def seen(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, b: Tensor | None, w: Tensor | None, *, axes: str) -> None:
            self._note({"g": g, "b": b, "w": w})
            check(q, k, v, g, b, w, axes=axes)

        delta_api._check = seen
        try:
            yield
        finally:
            delta_api._check = check
            for handle in handles:
                handle.remove()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._forward:
                return
            self._begun.append(_get_sequence_nr())  # of the next node
            self._layer = self._mixers.get(name, self._layer)
            self._look(f"input of {name or 'the model'}", [*_tensors(args), *_tensors(kwargs)])

        return hook

    def _behind(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not self._forward:
                return
            self._spans.append(Span(name or "the model", self._begun.pop(), _get_sequence_nr()))
            tensors = list(_tensors(output))
            self._look(f"output of {name or 'the model'}", tensors)
            if name in self._parts:
                self.outputs[self._parts[name]] = value_range(tensors[0])
            if isinstance(module, FP32Module) and ".mixer." in name:
                parts = output._asdict() if hasattr(output, "_asdict") else dict(enumerate(tensors))
                self._note({f"{name.partition('.mixer.')[2]}.{part}": x for part, x in parts.items()})

        return hook

    def watch(self, loss: Tensor) -> None:
        """The forward is through, and `loss` is about to go backward."""
        self._forward = False
        pending, seen = [loss.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is not None and node not in seen and node.next_functions:  # the last ones only add to a parameter's gradient
                seen.add(node)
                node.register_hook(self._behind_node(node))
                pending += [following for following, _ in node.next_functions]

    def _behind_node(self, node: Node) -> Callable[..., None]:
        number, op = node._sequence_nr(), node.name()  # not the node itself, which would hold itself
        module = next((span.module for span in self._spans if span.begin <= number < span.end), "the loss")

        def hook(returned: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> None:
            if self.first is None:
                self._look(f"sum of gradients in {module}", [x for x in given if x is not None], "gradient", op)  # of finite ones
                self._look(f"backward of {module}", [x for x in returned if x is not None], "gradient", op)

        return hook

    def _look(self, tensor: str, values: list[Tensor], kind: str = "activation", op: str | None = None) -> None:
        bad = None if self.first else next((x for x in values if not _is_finite(x)), None)
        if bad is not None:
            local = _local(bad)
            count = int((~local.isfinite()).sum())
            self.first = {"kind": kind, "tensor": tensor, "not_finite": count, "of": local.numel(), "shape": list(bad.shape)}
            self.first |= {} if op is None else {"op": op}

    def ranges(self) -> dict[str, dict[str, Range]]:
        """Of each layer's gates by name. Unnamed outputs of modules in float32 are left out where the delta rule has seen the gates that they are."""
        return {
            layer: {name: value for name, value in gates.items() if not (name[-1].isdigit() and gates.keys() & {"g", "b", "w"})}
            for layer, gates in self.gates.items()
        }

    def _note(self, gates: dict[str, Tensor | None]) -> None:
        for name, gate in gates.items():
            if gate is not None and gate.is_floating_point():
                self.gates.setdefault(self._layer, {})[name] = value_range(gate)


def parts(lm: DecoderLM) -> dict[str, str]:
    """The modules that a model is a chain of, and what a reader calls them."""
    layers = {f"layers.{i}": f"{i} ({name})" for i, name in enumerate(lm.layer_names)}
    return {"embedding": "embedding", **layers, "norm": "norm", "head": "head"}


def parameter_ranges(lm: DecoderLM) -> dict[str, Range]:
    """Least and largest entry of every parameter; of sharded ones all ranks' parts count. All ranks call it."""
    own = {name: value_range(p) for name, p in lm.named_parameters()}
    every = gathered(own)
    return {name: {"min": _extreme(min, name, "min", every), "max": _extreme(max, name, "max", every)} for name in own}


def _extreme(of: Callable[..., float], name: str, key: str, every: list[dict[str, Range]]) -> float:
    """Without what is NaN: a shard may be empty."""
    return of((ranges[name][key] for ranges in every if not math.isnan(ranges[name][key])), default=math.nan)


def value_range(x: Tensor) -> Range:
    """Least and largest of the finite entries (NaN if there is none), and how many others there are."""
    least, most, others = math.inf, -math.inf, 0
    for part in _local(x).reshape(-1).split(CHUNK):
        finite = part[part.isfinite()]
        others += part.numel() - finite.numel()
        if finite.numel():
            low, high = finite.aminmax()
            least, most = min(least, float(low)), max(most, float(high))
    return {"min": least, "max": most, "not_finite": others} if least <= most else {"min": math.nan, "max": math.nan, "not_finite": others}


def bad_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that are not finite, in their order; of sharded ones this rank's part is looked at."""
    return [name for name, x in tensors if not _is_finite(x)]


def _is_finite(x: Tensor) -> bool:
    return bool(_local(x).isfinite().all())


def _local(x: Tensor) -> Tensor:
    """This rank's part; out of the graph, into which `isfinite` would bring nodes of its own."""
    x = x.detach()
    return x.to_local() if isinstance(x, DTensor) else x


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The floating tensors in nested arguments."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point():
            yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
