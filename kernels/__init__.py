"""Sequence-mixing ops: pure functions on tensors, with a plain-torch reference for every one.

Importing this package imports nothing else: the ops load on first use. The name `kernels` is also that of a package on the package index which
`transformers` probes for; a light `__init__` without that package's names lets the probe fail cleanly (tested).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.conv1d.api import causal_conv1d, causal_conv1d_step
    from kernels.delta.api import delta_rule, delta_rule_step
    from kernels.gated_norm.api import gated_rms_norm
    from kernels.gates.api import delta_gates
    from kernels.qk_norm.api import l2_norm
    from kernels.ranks.api import gated_skip, rank_values
    from kernels.rotary.api import rotary_keys

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "delta_gates",
    "delta_rule",
    "delta_rule_step",
    "gated_rms_norm",
    "gated_skip",
    "l2_norm",
    "rank_values",
    "rotary_keys",
]

_HOME = {
    "causal_conv1d": "kernels.conv1d.api",
    "causal_conv1d_step": "kernels.conv1d.api",
    "delta_gates": "kernels.gates.api",
    "delta_rule": "kernels.delta.api",
    "delta_rule_step": "kernels.delta.api",
    "gated_rms_norm": "kernels.gated_norm.api",
    "gated_skip": "kernels.ranks.api",
    "l2_norm": "kernels.qk_norm.api",
    "rank_values": "kernels.ranks.api",
    "rotary_keys": "kernels.rotary.api",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")
