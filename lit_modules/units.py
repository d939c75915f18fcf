"""What FSDP2 gathers together of a model, in which dtype, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lit_modules.decoder_lm import DecoderLM


class Unit(NamedTuple):
    """Parameters that are gathered when a module's forward begins, in one collective."""

    module: nn.Module
    names: frozenset[str]  # in the model
    matrices: bool  # weights of linear layers, which autocast would round anyway
    keep: bool  # gathered until the backward pass is through, not anew for it


def plan(lm: DecoderLM) -> list[Unit]:
    """The units of a model, every parameter in exactly one.

    - A block: the linear layers in it.
    - Its mixer: the parameters that stay float32, in a unit of their own since they are never cast, whatever the precision.
    - The embedding, and the head.
    - The model: what is left. Norms, convolutions and what several blocks share is small, and read where no forward of its own gathers it.

    Raises:
        TypeError: a parameter that stays float32 is shared by several mixers.
    """
    first = {parameter: name for name, parameter in lm.named_parameters()}  # a shared one has several names
    every = list(lm.named_parameters(remove_duplicate=False))
    fp32 = {first[parameter] for name, parameter in every if name in lm.parameter_groups().fp32}
    linear = {first[p] for module in lm.modules() if isinstance(module, nn.Linear) for p in module.parameters(recurse=False)} - fp32
    owners: dict[str, set[str]] = {name: set() for name in first.values()}  # blocks, embedding, head or norm
    for name, parameter in every:
        owners[first[parameter]].add(".".join(name.split(".")[: 2 if name.startswith("layers.") else 1]))
    if shared := sorted(name for name in fp32 if len(owners[name]) > 1):
        raise TypeError(f"{shared[0]}: stays float32 and is in several mixers; fsdp2 takes it in one")
    units = []
    for i, block in enumerate(lm.layers):
        own = {name for name, where in owners.items() if where == {f"layers.{i}"}}
        units.append(Unit(block, frozenset(own & linear), matrices=True, keep=False))
        units.append(Unit(cast(nn.Module, block.mixer), frozenset(own & fp32), matrices=False, keep=True))
    units.append(Unit(lm.embedding, frozenset(name for name, where in owners.items() if where == {"embedding"}), matrices=False, keep=False))
    units.append(Unit(lm.head, frozenset(name for name, where in owners.items() if where == {"head"}), matrices=True, keep=True))
    rest = frozenset(owners).difference(*(unit.names for unit in units))
    return [Unit(lm, rest, matrices=False, keep=True), *(unit for unit in units if unit.names)]


def shard(lm: DecoderLM, mesh: DeviceMesh, precision: str, *, reshard_after_forward: bool = True) -> None:
    """Applies FSDP2 to a model, in place.

    The result is that of one device in the same precision. Under bf16-mixed, matrices are gathered in bfloat16, to which autocast would round them
    on one device too: half the bytes to send, and no second copy. All else stays in its own dtype, inputs included: autocast does the rest.
    Gradients are summed over processes in at least float32, since a sum in bfloat16 would lose more the more there are.

    Args:
        lm: on the meta device or not.
        mesh: one dimension, over which data and parameters are divided.
        precision: one of `parallel.PRECISIONS`.
        reshard_after_forward: whether units are gathered anew for the backward pass; those with `keep` are not.
    """
    half = precision.startswith("bf16")
    for unit in plan(lm):
        fully_shard(
            unit.module,
            mesh=mesh,
            reshard_after_forward=reshard_after_forward and not unit.keep,
            mp_policy=MixedPrecisionPolicy(
                param_dtype=torch.bfloat16 if unit.matrices and precision == "bf16-mixed" else None,
                reduce_dtype=torch.float32 if half else None,
                cast_forward_inputs=False,
            ),
            ignored_params={parameter for name, parameter in lm.named_parameters() if name not in unit.names},
        )


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward pass has left gathered, which stands in the place of the parameters. Changes no other model."""
    for module in _sharded(model):
        module.reshard()


@contextmanager
def unsummed_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients of backward passes inside are added up on each process; the next one outside sums them over all. Changes no other model."""
    _sum_gradients(model, now=False)
    try:
        yield
    finally:
        _sum_gradients(model, now=True)


def _sum_gradients(model: nn.Module, *, now: bool) -> None:
    for module in _sharded(model):
        module.set_requires_gradient_sync(now, recurse=False)


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
