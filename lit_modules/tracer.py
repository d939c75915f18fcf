"""A micro-batch run again with hooks on every module: the first tensor that is not finite, and the ranges of the gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from kernels.delta import api as delta_api
from lit_modules.data.windows import Batch
from lit_modules.decoder_lm import DecoderLM
from mixers.layers import FP32Module


def run_again(lm: DecoderLM, batch: Batch, loss_of: Callable[[Batch], Tensor]) -> list[dict[str, Any]]:
    """What every rank finds in its micro-batch: forward, and backward if no rank has found anything; gradients are dropped."""
    lm.zero_grad(set_to_none=True)
    tracer = Tracer(lm)
    with tracer.attached():
        loss = loss_of(batch)
        if tracer.first is None and not bool(loss.isfinite()):
            tracer.first = {"kind": "loss", "tensor": "loss"}
        if not any(gathered(tracer.first)):
            (loss / batch.targets.numel()).backward()
            bad = bad_tensors((name, p.grad) for name, p in reversed(list(lm.named_parameters())) if p.grad is not None)
            if tracer.first is None and bad:
                tracer.first = {"kind": "gradient", "tensor": bad[0]}
    lm.zero_grad(set_to_none=True)
    return gathered({"first": tracer.first, "gates": tracer.ranges()})


class Tracer:
    """Hooks on every module of a model that note the first tensor that is not finite, and the ranges of each mixer's gates."""

    def __init__(self, lm: DecoderLM) -> None:
        self.lm = lm
        self.first: dict[str, Any] | None = None
        self.gates: dict[str, dict[str, dict[str, float]]] = {}  # layer -> gate -> range
        self._mixers = {f"layers.{i}.mixer": f"{i} ({name})" for i, name in enumerate(lm.layer_names)}
        self._layer = ""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are in place inside. Gates are seen where they enter the delta rule, and where a module in float32 returns them."""
        handles: list[RemovableHandle] = []
        for name, module in self.lm.named_modules():
            handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
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
            self._layer = self._mixers.get(name, self._layer)
            self._look(f"input of {name or 'the model'}", [*_tensors(args), *_tensors(kwargs)])

        return hook

    def _behind(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            tensors = list(_tensors(output))
            self._look(f"output of {name or 'the model'}", tensors)
            if isinstance(module, FP32Module) and ".mixer." in name:
                parts = output._asdict() if hasattr(output, "_asdict") else dict(enumerate(tensors))
                self._note({f"{name.partition('.mixer.')[2]}.{part}": x for part, x in parts.items()})
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(self._on_gradient(name))

        return hook

    def _on_gradient(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self._look(f"gradient of the output of {name or 'the model'}", [gradient], "gradient")

    def _look(self, tensor: str, values: list[Tensor], kind: str = "activation") -> None:
        bad = None if self.first else next((x for x in values if not _is_finite(x)), None)
        if bad is not None:
            local = _local(bad)
            count = int((~local.isfinite()).sum())
            self.first = {"kind": kind, "tensor": tensor, "not_finite": count, "of": local.numel(), "shape": list(bad.shape)}

    def ranges(self) -> dict[str, dict[str, dict[str, float]]]:
        """Of each layer's gates by name. Unnamed outputs of modules in float32 are left out where the delta rule has seen the gates that they are."""
        return {
            layer: {name: value for name, value in gates.items() if not (name[-1].isdigit() and gates.keys() & {"g", "b", "w"})}
            for layer, gates in self.gates.items()
        }

    def _note(self, gates: dict[str, Tensor | None]) -> None:
        for name, gate in gates.items():
            if gate is not None and gate.is_floating_point():
                self.gates.setdefault(self._layer, {})[name] = value_range(gate)


def value_range(x: Tensor) -> dict[str, float]:
    """Least and largest of the finite entries, and how many others there are."""
    x = _local(x).detach()
    finite = x[x.isfinite()]
    least, most = (float(finite.min()), float(finite.max())) if finite.numel() else (math.nan, math.nan)
    return {"min": least, "max": most, "not_finite": x.numel() - finite.numel()}


def bad_tensors(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that are not finite, in their order; of sharded ones this rank's part is looked at."""
    return [name for name, x in tensors if not _is_finite(x)]


def _is_finite(x: Tensor) -> bool:
    return bool(_local(x).isfinite().all())


def _local(x: Tensor) -> Tensor:
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
