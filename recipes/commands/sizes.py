"""What a model costs: parameters, state, operations, memory. Pure functions of a model on the meta device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from kernels.backend import as_on_gpu
from lit_modules.decoder_lm import Block, DecoderLM

ASSUMED_MFU = 0.4  # what a cost in GPU-hours is told for; a run logs its own


class Precision(NamedTuple):
    """Bytes of a number in a Lightning precision."""

    stored: int  # weights, gradients and each of the optimizer's two moments
    computed: int  # activations, and copies of the matrices where they differ from `stored`


PRECISIONS = {
    "16-mixed": Precision(4, 2),
    "bf16-mixed": Precision(4, 2),
    "16-true": Precision(2, 2),
    "bf16-true": Precision(2, 2),
    "32-true": Precision(4, 4),
    "64-true": Precision(8, 8),
}
_SHORT = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true", "None": "32-true"}


def precision_of(name: str | int | None) -> Precision:
    """The sizes of a `trainer.precision`; those of 32-true for one that is not known."""
    return PRECISIONS.get(_SHORT.get(str(name), str(name)), PRECISIONS["32-true"])


def count(module: nn.Module) -> int:
    """Numbers in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameters_by_part(lm: DecoderLM) -> dict[str, int]:
    """Numbers of parameters in each part of the model."""
    blocks = cast(list[Block], list(lm.layers))
    return {
        "embedding": count(lm.embedding),
        "mixers": sum(map(count, lm.mixers())),
        "MLPs": sum(count(block.mlp) for block in blocks),
        "norms": count(lm.norm) + sum(count(block.mixer_norm) + count(block.mlp_norm) for block in blocks),
        "head": count(lm.head),
    }


def parameters_in_blocks(lm: DecoderLM) -> int:
    """What papers give as the size of a model: without embedding, final norm and head."""
    return count(lm.layers)


def state_bytes(lm: DecoderLM, tokens: int, computed: int) -> list[int]:
    """Bytes of each layer's state for one sequence of so many tokens, caches in numbers of `computed` bytes."""
    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[computed]
    state = lm.init_state(1, max_tokens=tokens, device="meta", dtype=dtype)
    return [sum(tensor.numel() * tensor.element_size() for tensor in layer) for layer in state]


class Memory(NamedTuple):
    """Bytes on one device that holds the whole model."""

    weights: int
    gradients: int
    optimizer: int
    copies: int  # of the matrices in the precision of the computation, under *-mixed
    activations: int  # what the layers keep for the backward pass
    logits: int  # with their softmax and its gradient
    guessed: tuple[str, ...] = ()  # mixers whose activations could not be counted: likely more than stands here

    def parts(self) -> dict[str, int]:
        return {what: number for what, number in self._asdict().items() if what != "guessed"}

    @property
    def total(self) -> int:
        return sum(self.parts().values())


def training_memory(lm: DecoderLM, shape: tuple[int, int], precision: Precision) -> Memory:
    """An estimate for micro-batches of `shape` (sequences, tokens of each) on a GPU under AdamW, without what kernels need in between."""
    tokens = shape[0] * shape[1]
    fp32 = lm.parameter_groups().fp32
    stored = sum(p.numel() * (max(4, precision.stored) if name in fp32 else precision.stored) for name, p in lm.named_parameters())
    matrices = sum(count(m) for m in lm.modules() if isinstance(m, nn.Linear))
    logits = lm.settings["vocab_size"] * (precision.computed + 2 * max(4, precision.computed))  # logits, softmax, its gradient
    kept, guessed = kept_by_layers(lm, shape, precision)
    return Memory(
        weights=stored,
        gradients=stored,
        optimizer=2 * stored,
        copies=matrices * precision.computed if precision.computed < precision.stored else 0,
        activations=kept,
        logits=tokens * logits,
        guessed=guessed,
    )


def kept_by_layers(lm: DecoderLM, shape: tuple[int, int], precision: Precision) -> tuple[int, tuple[str, ...]]:
    """Bytes that the layers keep for the backward pass of a micro-batch, counted for one layer of each mixer; and which mixers had to be guessed."""
    of_mixer: dict[str, int] = {}
    guessed: list[str] = []
    for name, block in zip(lm.layer_names, cast(list[Block], list(lm.layers)), strict=True):
        if name not in of_mixer:
            try:
                # what does not grow with the batch are the weights' copies in another precision
                of_mixer[name] = saved_bytes(block, lm, (2 * shape[0], shape[1]), precision) - saved_bytes(block, lm, shape, precision)
            except Exception:  # the reference (of more ranks than the kernels take, say), or somebody's mixer, looks at values
                # what products give, and both norms' inputs and outputs and both sums
                features = sum(m.out_features for m in block.modules() if isinstance(m, nn.Linear)) + 6 * lm.settings["d_model"]
                of_mixer[name] = shape[0] * shape[1] * features * precision.computed
                guessed.append(name)
    return sum(of_mixer[name] for name in lm.layer_names), tuple(guessed)


def saved_bytes(block: Block, lm: DecoderLM, shape: tuple[int, int], precision: Precision) -> int:
    """Bytes of all that autograd saves in the forward pass of a block, its parameters apart, on tensors that hold nothing."""
    stored = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[precision.stored]
    mixed = precision.computed < precision.stored
    fp32, of_block = lm.parameter_groups().fp32, next(name for name, module in lm.named_modules() if module is block)
    kept: dict[int, Tensor] = {}  # one of each storage, alive so that no other takes its place

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), as_on_gpu():
        own = {}
        for name, x in [*block.named_parameters(), *block.named_buffers()]:
            dtype = torch.float32 if f"{of_block}.{name}" in fp32 and precision.stored < 4 else stored if x.is_floating_point() else x.dtype
            own[name] = torch.empty(x.shape, dtype=dtype, requires_grad=x.requires_grad)
        x = torch.empty(*shape, lm.settings["d_model"], dtype=stored, requires_grad=True)
        with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", dtype=torch.bfloat16) if mixed else nullcontext():
            functional_call(block, own, (x, None, None))
        for parameter in own.values():
            kept.pop(parameter.untyped_storage()._cdata, None)
        return sum(x.untyped_storage().nbytes() for x in kept.values())


def gpu_hours(flops: float, peak: float, mfu: float = ASSUMED_MFU) -> float:
    """Hours of one GPU with a peak in FLOP/s."""
    return flops / (mfu * peak) / 3600


def bytes_text(number: float) -> str:
    """1536 as '1.5 KiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit == "bytes" else f"{number:,.1f} {unit}"
        number /= 1024
    raise AssertionError("GiB ends the loop")
