"""`bench layer`: a whole GDN-2 layer under bf16 autocast, beside fla's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mixers.gdn2 import GatedDeltaNet2
from recipes.commands import bench_rows, problems
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import add_common, dtype_of, numbers_of, prepare, shapes_of
from recipes.commands.bench_peers import check_baselines, fla_version
from recipes.commands.bench_rows import Row, number
from recipes.commands.bench_timing import CudaClock, Entry, time_entries

WHAT = "gdn2 layer"
TOLERANCE = 8e-2  # of the largest entry, for a layer of some ten bf16 operations


def run(argv: list[str]) -> int:
    """Times the layer at every shape; 1 if it was wrong."""
    given = _parser().parse_args(argv)
    shapes, dtype, baselines = shapes_of(given.shapes), dtype_of(given.dtype), check_baselines(given.baseline)
    numbers_of(d_model=given.d_model, heads=given.heads, dim=given.dim)
    machine = prepare(given)
    clock = CudaClock()
    for batch, tokens in shapes:
        x = torch.randn(batch, tokens, given.d_model, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        modules = build(given.d_model, given.heads, given.dim, "fla" in baselines)
        entries = [entry_of(name, module, x, dtype) for name, module in modules.items()]
        worst = error_of(entries[0], next(iter(modules.values())))
        if not worst <= TOLERANCE:
            print(f"{WHAT}, {batch} x {tokens:,} tokens: no figure: off by {worst:.1e} of the largest entry, {TOLERANCE:g} are allowed", flush=True)
            return 1
        timings = time_entries(entries, clock, given.budget_ms)
        rows = [
            Row(
                *(WHAT, entry.impl, batch, tokens, given.heads, given.dim, given.dim, given.dtype),
                *(number(t.fwd_ms, 4), number(t.fwd_bwd_ms, 4), number(t.extra_mib, 1), "", *machine),
            )
            for entry, t in zip(entries, timings, strict=True)
        ]
        bench_rows.show(
            f"{WHAT}, d_model {given.d_model}, {batch} x {tokens:,} tokens, {given.dtype} autocast", rows, [worst] + [None] * (len(rows) - 1)
        )
        bench_rows.append(given.out, "layer", rows)
    return 0


def build(d_model: int, heads: int, dim: int, fla: bool) -> dict[str, nn.Module]:
    """Our layer, and fla's of the same sizes."""
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"ours": GatedDeltaNet2(d_model, num_heads=heads, head_dim=dim).cuda()}
    if fla:
        modules[fla_version()] = import_module("fla.layers.gdn2").GatedDeltaNet2(hidden_size=d_model, head_dim=dim, num_heads=heads).cuda()
    return modules


def entry_of(name: str, module: nn.Module, x: Tensor, dtype: torch.dtype) -> Entry:
    """A layer on x; differentiated by x and by every parameter."""
    leaves = {"x": x.detach().requires_grad_(), **dict(module.named_parameters())}
    cotangent = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(1)).to(dtype)
    return Entry(WHAT, name, autocast(module, x.device.type, dtype), leaves, (cotangent,))


def autocast(module: nn.Module, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The layer's output under autocast; its parameters are read from the module."""

    def run(x: Tensor, **parameters: Tensor) -> Tensor:  # noqa: ARG001
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            output: Any = module(x)
        y: Tensor = output[0].to(dtype)
        return y

    return run


def error_of(entry: Entry, module: nn.Module) -> float:
    """The largest error of the output and the input's gradient, of the last batch row, against the layer in float64."""
    x = entry.leaves["x"]
    (y,) = entry.outputs()
    (dx,) = torch.autograd.grad(y, [x], list(entry.cotangents))
    exact = copy.deepcopy(module).double()
    row = x[-1:].detach().double().requires_grad_()
    y_exact = exact(row)[0]
    (dx_exact,) = torch.autograd.grad(y_exact, [row], [entry.cotangents[0][-1:].double()])
    found = problems.errors({"y": y[-1:].detach(), "dx": dx[-1:]}, {"y": y_exact.detach(), "dx": dx_exact})
    return max(found.values())


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench layer", "Times a whole GDN-2 layer under autocast, forward and backward.")
    add_common(parser, "4x4096")
    parser.add_argument("--d_model", type=int, default=2304, help="width of the model (%(default)s)")
    parser.add_argument("--heads", type=int, default=16, help="heads (%(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="size of a head (%(default)s)")
    return parser
