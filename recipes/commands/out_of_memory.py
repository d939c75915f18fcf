"""What to say when a training runs out of memory: what takes most of it, and which setting to lower first."""

from __future__ import annotations

import re

from torch import OutOfMemoryError

from recipes.commands import sizes
from recipes.commands.plan import Plan

HOST = ("can't allocate memory", "not enough memory")  # how torch's allocator for the CPU says it
CONSUMERS = 3  # that are named


def explain(plan: Plan, error: BaseException, *, sharded: bool) -> str | None:
    """One line for an error that means that memory has run out; None for another. `sharded`: each device holds a share of the model (fsdp2)."""
    text = " ".join(str(error).split())
    if not isinstance(error, (OutOfMemoryError, MemoryError)) and not any(words in text for words in HOST):
        return None
    memory = memory_of(plan, sharded=sharded)
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {sizes.bytes_text(size)}" for name, size in parts[:CONSUMERS] if size)
    wanted = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
    how = f": {wanted[0][0].lower()}{wanted[0][1:]}" if wanted else ""
    return f"out of memory{how}; largest on a device, roughly: {largest}; {advice(plan, memory, sharded=sharded)}"


def memory_of(plan: Plan, *, sharded: bool) -> sizes.Memory:
    """The estimate for one device."""
    memory = sizes.training_memory(plan.model.lm, (plan.data.batch_size, plan.data.seq_len), sizes.precision_of(plan.precision))
    shares = plan.replicas if sharded else 1
    return memory._replace(**{part: getattr(memory, part) // shares for part in ("weights", "gradients", "optimizer", "copies")})


def advice(plan: Plan, memory: sizes.Memory, *, sharded: bool) -> str:
    """The setting that lowers what takes most, at the least cost in what is trained."""
    by_tokens = memory.activations + memory.logits
    if by_tokens >= memory.total - by_tokens and plan.data.batch_size > 1:
        half, samples = plan.data.batch_size // 2, plan.data.batch_size * plan.accumulate
        same = "as many tokens a step" if samples % half == 0 else "nearly as many tokens a step"
        return f"lower data.batch_size first: {half}, with trainer.accumulate_grad_batches {-(-samples // half)} ({same})"
    if by_tokens >= memory.total - by_tokens:
        return f"lower data.seq_len first (now {plan.data.seq_len:,}; data.batch_size is 1)"
    if not sharded:
        return "lower what a device holds of the model first: trainer.strategy fsdp2 on more devices, or trainer.precision bf16-true"
    return "lower trainer.precision first: bf16-true; or share the model between more devices"
