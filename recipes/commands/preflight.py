"""`preflight`: what a config would train and what is wrong with it, without a GPU and without data. `fit` begins with the same checks."""

from __future__ import annotations

import sys
from collections import defaultdict

import torch
from rich.console import Console
from rich.table import Table

from lit_modules.decoder_lm import DecoderLM
from lit_modules.loss_curve import short_number
from lit_modules.optim import describe_groups, group_table, optimizer_groups
from lit_modules.peaks import peak_flops
from lit_modules.throughput import flops_per_token
from recipes.commands import sizes
from recipes.commands.checkpoints import changeable, check_changes, check_model, check_resumable, is_finished, with_checkpoint
from recipes.commands.cli import MixersCLI
from recipes.commands.config_files import collect
from recipes.commands.plan import Plan, make_plan


def run(argv: list[str]) -> int:
    """Prints the plan of a config; the arguments are those of `fit`."""
    request, checkpoint = with_checkpoint(collect(argv))
    config = MixersCLI("preflight", request).config
    may_change = changeable(config.may_change)
    plan = make_plan(config, needs_tokenizer=False)
    if checkpoint is not None:
        check_model(checkpoint, plan.model.lm)
        if not is_finished(request, checkpoint, plan):
            check_resumable(checkpoint, plan)
        check_changes(checkpoint, plan, may_change)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    lm, groups = plan.model.lm, optimizer_groups(plan.model.lm, plan.model.weight_decay)
    console.print(layer_table(lm, plan), parts_table(lm), group_table(describe_groups(groups)), memory_table(plan), sep="\n\n")
    for name, value in facts(plan).items():
        console.print(f"{name:<16} {value}", soft_wrap=True, markup=False)
    return 0


def _table(title: str, text: list[str], numbers: list[str]) -> Table:
    """An empty table with columns of text and columns of numbers."""
    table = Table(title=title, title_justify="left")
    for column in text:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def layer_table(lm: DecoderLM, plan: Plan) -> Table:
    """Every mixer of the layout, the layers that it is in, and what one of them costs."""
    tokens = plan.data.seq_len
    states = sizes.state_bytes(lm, tokens, sizes.precision_of(plan.precision).computed)
    layers: dict[str, list[int]] = defaultdict(list)
    for i, name in enumerate(lm.layer_names):
        layers[name].append(i)
    table = _table("Layers", ["mixer", "layers"], ["parameters each", f"state each at {tokens:,} tokens", "FLOPs a token each"])
    for name, where in layers.items():
        mixer = lm.mixers()[where[0]]
        flops = short_number(mixer.flops(tokens) / tokens)
        table.add_row(name, ", ".join(map(str, where)), f"{sizes.count(mixer):,}", sizes.bytes_text(states[where[0]]), flops)
    return table


def parts_table(lm: DecoderLM) -> Table:
    """Parameters by part."""
    parts = sizes.parameters_by_part(lm)
    table = _table("Parameters", ["part"], ["parameters"])
    for part, number in parts.items():
        table.add_row(part, f"{number:,}")
    table.add_section()
    table.add_row("in the blocks", f"{sizes.parameters_in_blocks(lm):,}")
    table.add_row("total", f"{sum(parts.values()):,}")
    return table


def memory_table(plan: Plan) -> Table:
    """The estimate of a device's memory."""
    memory = sizes.training_memory(plan.model.lm, (plan.data.batch_size, plan.data.seq_len), sizes.precision_of(plan.precision))
    table = _table(f"Memory for training in {plan.precision}, roughly", ["what"], ["on one device, unsharded"])
    guessed = f" (of {', '.join(memory.guessed)} guessed from the projections: likely more)" if memory.guessed else ""
    for what, number in memory.parts().items():
        table.add_row(f"{what}{guessed}" if what == "activations" else what, sizes.bytes_text(number))
    table.add_section()
    table.add_row("total", sizes.bytes_text(memory.total))
    return table


def facts(plan: Plan) -> dict[str, str]:
    """The rest, a line each."""
    lm, tokens = plan.model.lm, plan.data.seq_len
    state = sum(sizes.state_bytes(lm, tokens, sizes.precision_of(plan.precision).computed))
    fp32 = lm.parameter_groups().fp32
    batch = f"{plan.data.batch_size} x {tokens:,} x {plan.accumulate} (accumulated) x {plan.replicas} (devices)"
    return {
        "layout": f"[{', '.join(lm.settings['layout'])}] over {lm.settings['n_layers']} layers",
        "state": f"{sizes.bytes_text(state)} a sequence at {tokens:,} tokens",
        "FLOPs a token": f"{short_number(lm.flops(tokens) / tokens)} forward, {short_number(flops_per_token(lm, tokens))} in training",
        "cost": cost(plan),
        "dtypes": f"{plan.precision}; {sum(p.numel() for n, p in lm.named_parameters() if n in fp32):,} parameters stay float32",
        "tokens a step": f"{plan.tokens_a_step:,} = {batch}",
        "steps": f"{plan.steps:,} to {plan.tokens:,} tokens, {plan.model.warmup_tokens // plan.tokens_a_step:,} of them warm-up",
        **{f"note {i}": note for i, note in enumerate(plan.notes, 1)},
    }


def cost(plan: Plan) -> str:
    """Model FLOPs of the whole training, and GPU-hours on this machine's GPU if its peak is known."""
    flops = flops_per_token(plan.model.lm, plan.data.seq_len) * plan.tokens
    text = f"{flops:.2g} FLOPs to {plan.tokens:,} tokens"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = None if gpu is None else peak_flops(gpu, plan.precision)
    if peak is None:
        why = "no GPU here" if gpu is None else f"the peak of {gpu} in {plan.precision} is not known"
        return f"{text} ({why}: GPU-hours are not known)"
    hours = sizes.gpu_hours(flops, peak)
    return f"{text}; {hours:,.1f} GPU-hours on {gpu} if the MFU is {sizes.ASSUMED_MFU:.0%} (assumed) of {peak / 1e12:,.1f} TFLOP/s"
