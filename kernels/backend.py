"""The only place that decides which implementation of an op runs."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Requested = Literal["auto", "triton", "reference"]
Resolved = Literal["triton", "reference"]

# Ops that have Triton kernels. An op that is missing here runs on its plain-torch reference on every device.
TRITON_OPS: frozenset[str] = frozenset()


def resolve(op: str, requested: str, device: torch.device) -> Resolved:
    """The implementation that `op` uses for tensors on `device`; a constant of its arguments, never of the environment.

    Raises:
        ValueError: `requested` is not one of "auto", "triton", "reference".
        NotImplementedError: "triton" was asked for by name and cannot run there.
    """
    if requested not in get_args(Requested):
        raise ValueError(f"{op}: backend must be one of {', '.join(get_args(Requested))}, got {requested!r}")
    has_kernel = op in TRITON_OPS and device.type == "cuda"
    if requested == "triton" and not has_kernel:
        why = f"tensors are on {device.type}" if op in TRITON_OPS else "this version has no Triton kernel for it"
        raise NotImplementedError(f"{op}: backend='triton' cannot run: {why}; use backend='auto' or 'reference'")
    return "triton" if has_kernel and requested != "reference" else "reference"
