"""Initial values as a function of (seed, parameter name): module order, device, dtype and sharding cannot change them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_watchers: list[Callable[[str, Tensor], object]] = []


@contextmanager
def watched(see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Inside, `see` gets the full name and the value of all that is drawn: float32 on the CPU, whatever it becomes in the model."""
    _watchers.append(see)
    try:
        yield
    finally:
        _watchers.remove(see)


def initialize(root: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of `root` in place.

    Each module that owns some must have `reset_parameters` (torch's convention), which is run on a float32 copy on the CPU, once a parameter,
    with a generator seeded by (seed, the parameter's full name).

    Raises:
        TypeError: a module owns parameters and has no `reset_parameters`.
        ValueError: `reset_parameters` left one unset.
    """
    done: set[int] = set()
    for prefix, module in root.named_modules():
        owned = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, target in owned:
            if id(target) in done:  # tied parameters keep the value of their first name
                continue
            done.add(id(target))
            _fill(module, name, target, seed, f"{prefix}.{name}" if prefix else name)


def _fill(module: nn.Module, name: str, target: Tensor, seed: int, full_name: str) -> None:
    value = draw(module, name, seed, full_name)
    for see in _watchers:
        see(full_name, value)
    with torch.no_grad():
        if isinstance(target, DTensor):
            # Every rank has drawn the whole value, so each takes its part and nothing is sent.
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(value)


def draw(module: nn.Module, name: str, seed: int, full_name: str) -> Tensor:
    """The initial value of the tensor `name` of `module`, which is `full_name` in its model, before anything is cast or sharded."""
    reset = getattr(type(module), "reset_parameters", None)
    if reset is None:
        raise TypeError(f"{full_name}: {type(module).__name__} owns it but has no reset_parameters() to draw its initial value")
    shadow = object.__new__(type(module))  # not copy.copy: a sharded module (FSDP2) would run its constructor
    shadow.__dict__.update(module.__dict__)  # shares submodules and settings, owns new tensors
    for kind in ("_parameters", "_buffers"):
        shadow.__dict__[kind] = {n: _unset(t) for n, t in module.__dict__[kind].items()}
    digest = hashlib.sha256(f"{seed}:{full_name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        reset(shadow)
    value: Tensor = getattr(shadow, name).detach()
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError(f"{full_name}: {type(module).__name__}.reset_parameters() leaves it unset")
    return value


def _unset(t: Tensor | None) -> Tensor | None:
    """A CPU tensor of the same (global) shape: NaN in float32, or zero in an integer dtype."""
    if t is None:
        return None
    floating = t.is_floating_point()
    empty = torch.full(t.shape, float("nan") if floating else 0, dtype=torch.float32 if floating else t.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty
