"""`bench layer`: a whole mixer under bf16 autocast; GDN-2 beside fla's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from mixers import registry
from mixers.base import at_least
from mixers.errors import ConfigError
from recipes.commands import bench_rows, problems
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import add_common, dtype_of, prepare, shapes_of
from recipes.commands.bench_peers import check_baselines, fla_version
from recipes.commands.bench_rows import Machine, Row, number
from recipes.commands.bench_timing import Clock, CudaClock, Entry, time_entries

TOLERANCE = 8e-2  # of the largest entry, for a layer of some ten bf16 operations


def run(argv: list[str]) -> int:
    """Times every layer at every shape; 1 if one was wrong, and so got no figure."""
    given = _parser().parse_args(argv)
    shapes, dtype, baselines = shapes_of(given.shapes), dtype_of(given.dtype), check_baselines(given.baseline)
    at_least(1, d_model=given.d_model)
    layers = {name: build(name, given.d_model, settings_of(given.mixers)) for name in given.layout.split(",") if name}
    if not layers:
        raise ConfigError("layout: must name at least one mixer")
    machine = prepare(given, "layer")
    clock, wrong = CudaClock(), 0
    for batch, tokens in shapes:
        x = torch.randn(batch, tokens, given.d_model, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        for name, module in layers.items():
            modules: dict[str, nn.Module] = {"ours": copy.deepcopy(module).cuda()}
            if name == "gdn2" and "fla" in baselines:
                modules[fla_version()] = theirs(module).cuda()
            wrong += not measure(name, modules, x, dtype, clock, machine, given)
            torch.cuda.empty_cache()
    return int(wrong > 0)


def settings_of(text: str) -> dict[str, Any]:
    """`model.lm.mixers` as a command line gives it."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"mixers: must be a mapping such as {{gdn2: {{head_dim: 64}}}}, got {text!r}")
    return found


def build(name: str, d_model: int, settings: dict[str, Any]) -> nn.Module:
    """A mixer of a layout, with the weights of seed 0."""
    torch.manual_seed(0)
    return registry.build(name, d_model, settings)


def theirs(module: Any) -> nn.Module:
    """fla's GDN-2 of the sizes of ours."""
    layer = import_module("fla.layers.gdn2").GatedDeltaNet2
    made: nn.Module = layer(hidden_size=module.d_model, head_dim=module.head_dim, num_heads=module.num_heads)
    return made


def measure(name: str, modules: dict[str, nn.Module], x: Tensor, dtype: torch.dtype, clock: Clock, machine: Machine, given: Any) -> bool:
    """Proves, times and writes down a layer, ours first. False if ours is wrong: then there is no figure."""
    ours, (batch, tokens, d_model) = modules["ours"], x.shape
    ranks = vars(ours).get("mimo_rank", 1)
    what = f"{name} layer, rank {ranks}" if ranks > 1 else f"{name} layer"
    entries = [entry_of(what, impl, module, x, dtype) for impl, module in modules.items()]
    title = f"{what}, d_model {d_model}, {batch} x {tokens:,} tokens, {given.dtype} autocast"
    worst = error_of(entries[0], ours)
    if not worst <= TOLERANCE:
        print(f"{title}: no figure: off by {worst:.1e} of the largest entry, {TOLERANCE:g} are allowed", flush=True)
        return False
    timings = time_entries(entries, clock, given.budget_ms)
    rows = [
        Row(
            *(what, entry.impl, batch, tokens, *sizes_of(ours), given.dtype),
            *(number(t.fwd_ms, 4), number(t.fwd_bwd_ms, 4), number(t.extra_mib, 1), "", *machine),
        )
        for entry, t in zip(entries, timings, strict=True)
    ]
    bench_rows.show(title, rows, [worst] + [None] * (len(rows) - 1))
    bench_rows.append(given.out, "layer", rows)
    return True


def sizes_of(module: nn.Module) -> tuple[int, int, int]:
    """Heads, and the sizes of keys and values of each; 0 where a mixer has no such thing."""
    own = vars(module)
    head_dim = own.get("head_dim", 0)
    return own.get("num_heads", 0), own.get("d_state", head_dim), own.get("v_head_dim", head_dim)


def entry_of(what: str, impl: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Entry:
    """A layer on x; differentiated by x and by every parameter."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    cotangent = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(1)).to(dtype)
    return Entry(what, impl, autocast(module, x.device.type, dtype), leaves, (cotangent,))


def autocast(module: nn.Module, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The layer's output under autocast; its parameters are read from the module."""

    def run(x: Tensor, **parameters: Tensor) -> Tensor:  # noqa: ARG001
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output: Any = module(x)
        y: Tensor = output[0].to(dtype)
        return y

    return run


def error_of(entry: Entry, module: nn.Module) -> float:
    """The largest error of the output and of the gradients of input and parameters against the layer in float64, of a loss on the last batch row."""
    x, names = entry.leaves["x"], [name for name in entry.leaves if name != "x"]
    (y,) = entry.outputs()
    cotangent = torch.zeros_like(entry.cotangents[0])
    cotangent[-1:] = entry.cotangents[0][-1:]
    dx, *others = torch.autograd.grad(y, list(entry.leaves.values()), [cotangent])
    exact = copy.deepcopy(module).double()
    row = x[-1:].detach().double().requires_grad_()
    y_exact = exact(row)[0]
    parameters = dict(exact.named_parameters())
    dx_exact, *others_exact = torch.autograd.grad(y_exact, [row, *(parameters[name] for name in names)], [cotangent[-1:].double()])
    got = {"y": y[-1:].detach(), "dx": dx[-1:], **dict(zip(names, others, strict=True))}
    wanted = {"y": y_exact.detach(), "dx": dx_exact, **dict(zip(names, others_exact, strict=True))}
    return max(problems.errors(got, wanted).values())


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench layer", "Times whole mixers under autocast, forward and backward.")
    add_common(parser, "4x4096")
    parser.add_argument("--d_model", type=int, default=2304, help="width of the model (%(default)s)")
    parser.add_argument("--layout", default="gdn2", help="the mixers to time, with commas between them (%(default)s)")
    parser.add_argument("--mixers", default="{}", help="their settings, as model.lm.mixers of a recipe holds them (%(default)s)")
    return parser
