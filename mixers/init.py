"""Initial values as a function of (seed, parameter name): module order, device, dtype and sharding cannot change them."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


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
    reset = getattr(type(module), "reset_parameters", None)
    if reset is None:
        raise TypeError(f"{full_name}: {type(module).__name__} owns it but has no reset_parameters() to draw its initial value")
    shadow = copy.copy(module)  # shares submodules and settings, owns new tensors
    for kind in ("_parameters", "_buffers"):
        shadow.__dict__[kind] = {n: _unset(t) for n, t in module.__dict__[kind].items()}
    digest = hashlib.sha256(f"{seed}:{full_name}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        reset(shadow)
    value = getattr(shadow, name).detach()
    if value.is_floating_point() and bool(value.isnan().any()):
        raise ValueError(f"{full_name}: {type(module).__name__}.reset_parameters() leaves it unset")
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def _unset(t: Tensor | None) -> Tensor | None:
    """A CPU tensor of the same (global) shape: NaN in float32, or zero in an integer dtype."""
    if t is None:
        return None
    floating = t.is_floating_point()
    empty = torch.full(t.shape, float("nan") if floating else 0, dtype=torch.float32 if floating else t.dtype, device="cpu")
    return nn.Parameter(empty, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else empty
