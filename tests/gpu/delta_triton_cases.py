"""The delta rule on Triton against float64: what is compared, how, and the lists of cases.

A variant is what Triton compiles for: gate widths, dtypes, K, V. On a GPU compiling one costs far more than running it, so cases are listed by
variant, and the tests beside the pairwise list share few of them.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from delta_cases import MIXED_DECAYS, Case, Inputs, errors, make, pairwise, run
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor

from kernels import delta_rule
from kernels.delta.reference import chunkwise, recurrent
from recipes.commands import problems
from recipes.commands.problems import Problem

BACKEND = "triton"
kernel: Callable[..., tuple[Tensor, Tensor]] = partial(delta_rule, backend=BACKEND)

# of the largest entry of each tensor; bfloat16 is held to a peer's error as well
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LOW = torch.bfloat16 if ON_GPU else torch.float16  # the half precision that runs here
WIDTHS = problems.WIDTHS | {
    "gdn2_scalar_erase": ("channel", "scalar", "channel"),
    "gdn2_scalar_write": ("channel", "channel", "scalar"),
    "mamba2_channel_write": ("scalar", "absent", "channel"),
    "retnet": ("scalar", "absent", "absent"),
    "linear_attention": ("absent", "absent", "absent"),
}
RECURRENT_UP_TO = 200  # tokens; longer inputs are compared with the chunkwise form
LONG = 1000  # tokens; float64 takes gigabytes of longer inputs: on the GPU, one at a time


class Variant(NamedTuple):
    """Cases with one compiled variant."""

    name: str
    dtype: torch.dtype
    cases: list[Case]
    wide: tuple[str, ...] = ("g", "state")  # arguments in float32

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}".replace("torch.", "")


def case_of(model: str, k_dim: int, v_dim: int, **settings: Any) -> Case:
    """A case with the gates of `model`; everything that `settings` does not name is as simple as it can be."""
    g, b, w = WIDTHS[model]
    plain: dict[str, Any] = {"g_heads": "key", "b_heads": "key", "groups": 1, "tokens": 130, "layout": "dense", "state": True, "scale": None}
    plain |= {"storage": "contiguous", "decay": "mixed", "heads": 2 if ON_GPU else 1, "batch": 1}
    return Case(g=g, b=b, w=w, sizes=(k_dim, v_dim), **(plain | settings))


# --- problems of `doctor`'s kind ---


def run_problem(problem: Problem, function: Callable[..., Any] = kernel, dtype: torch.dtype | None = None, device: Any = DEVICE) -> dict[str, Tensor]:
    """Results and gradients, in the dtype of its queries if in no other."""
    there = problem.to(dtype or problem.leaves["q"].dtype, device)
    return problems.run(there, partial(function, **there.options))


def other_after(problem: Problem, position: int) -> tuple[Problem, Problem]:
    """A problem whose outputs from `position` on have no gradient, and the same with inputs a thousand times as large from there on."""
    cotangents = {"o": problem.cotangents["o"].clone(), "final": torch.zeros_like(problem.cotangents["final"])}
    cotangents["o"][:, position:] = 0
    leaves = {name: x.clone() for name, x in problem.leaves.items()}
    for x in leaves.values():
        x[:, position:] *= 1000
    return problem._replace(cotangents=cotangents), problem._replace(leaves=leaves, cotangents=cotangents)


# --- comparison ---


def expected(inputs: Inputs) -> dict[str, Tensor]:
    """Results and gradients in float64. Up to LONG tokens on the CPU: thousands of small operations would keep the GPU from other test processes."""
    tokens = inputs.arguments()["q"].shape[1]
    there = inputs if tokens > LONG else inputs.on("cpu")
    return run(recurrent if tokens <= RECURRENT_UP_TO else chunkwise, there.to(torch.float64))


def wrong(case: Case, dtype: torch.dtype, wide: tuple[str, ...] = ("g", "state")) -> dict[str, float]:
    """The tensors of a case whose errors are above the tolerance of `dtype`, or whose dtypes are wrong, with their errors."""
    inputs = make(case).rounded(dtype, DEVICE, wide=wide)
    got = run(kernel, inputs)
    dtypes = {"o": dtype, "final": torch.float32} | {f"d{name}": leaf.dtype for name, leaf in inputs.leaves.items()}
    wanted = expected(inputs)
    # a tensor that has decayed to less than the dtype can hold, as dstate may, is not to be measured by its own largest entry
    at_least = dict.fromkeys(wanted, torch.finfo(dtype).tiny) | {"dg": _terms_of_dg(inputs, wanted, summed=case.g == "scalar")}
    found = errors(got, wanted, at_least)
    return {name: error for name, error in found.items() if not error <= TOLERANCE[dtype] or got[name].dtype != dtypes[name]}


def _terms_of_dg(inputs: Inputs, wanted: dict[str, Tensor], *, summed: bool) -> float:
    """The size of what dg is a sum of (README.md, 4.9). The terms cancel where nothing is left of the past: dg of a first token is 0."""
    view = inputs.views
    products = [(view[x](inputs.leaves[x]).to(wanted["o"]) * view[x](wanted[f"d{x}"])).abs() for x in ("q", "k")]
    return sum(float((x.sum(-1) if summed else x).max()) for x in products)


def check(variant: Variant, folder: Path) -> None:
    """Runs every case before it fails with all that is wrong."""
    found = {}
    for case in variant.cases:
        with alone_in(folder) if case.tokens > LONG else nullcontext():
            found[str(case)] = wrong(case, variant.dtype, variant.wide)
    assert not any(found.values()), "\n".join(f"{case}: {tensors}" for case, tensors in found.items() if tensors)


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The Triton kernels that are met for the first time in this process, with what they are compiled for, as they come."""
    import triton

    compiled: list[str] = []

    def record(**details: Any) -> None:
        compiled.append(details["repr"])

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = record
        yield compiled


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other test process holds `folder`: for what takes much of the GPU's memory."""
    with (folder / "memory.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


# --- on a GPU: every pair of settings, and every extreme ---

TOKENS = (1, 15, 63, 64, 65, 1000)  # each row runs with all of them: lengths compile nothing
LONGEST = 16384  # seconds of float64, so with as few rows as have every value of every factor
FACTORS: dict[str, tuple[Any, ...]] = {
    "model": tuple(WIDTHS),
    "K": (32, 64, 96, 128, 256),
    "V": (32, 64, 128),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "gate_dtype": ("as v", "float32"),
    "g_heads": ("key", "value"),
    "b_heads": ("key", "value"),
    "groups": (1, 2, 4),
    "layout": ("dense", "packed"),
    "state": (False, True),
    "scale": (None, 1.0),
    "storage": ("contiguous", "expanded", "strided"),
    "decay": ("mixed", "mild", "slow"),
}


def _covering(rows: list[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    """A few of the rows in which every value stands, each chosen for the most values that were missing."""
    missing = {pair for row in rows for pair in enumerate(row)}
    chosen = set()
    while missing:
        best = max(rows, key=lambda row: len(missing & set(enumerate(row))))
        chosen.add(best)
        missing -= set(enumerate(best))
    return chosen


def _pairwise_variants() -> list[Variant]:
    variants, rows = [], list(pairwise(FACTORS))
    long = _covering(rows)
    for row in rows:
        tokens = (*TOKENS, LONGEST) if row in long else TOKENS
        settings = dict(zip(FACTORS, row, strict=True))
        model, dtype, narrow = settings.pop("model"), settings.pop("dtype"), settings.pop("gate_dtype") == "as v"
        k_dim, v_dim = settings.pop("K"), settings.pop("V")
        shapes = ({"tokens": t, "heads": 1 if t > LONG else 2, "batch": 1 if t > LONG else 2} for t in tokens)
        cases = [case_of(model, k_dim, v_dim, **settings, **shape) for shape in shapes]
        words = [k_dim, v_dim, *settings.values(), "narrow" if narrow else "wide"]
        name = "-".join([model, *map(str, words)])
        variants.append(Variant(name, dtype, cases, ("g", "state") if narrow else ("g", "b", "w", "state")))
    return variants


MAMBA = {"scale": 1.0, "write": 3.0, "decay": "slow"}
DOCUMENTS: dict[str, tuple[int, ...]] = {
    "one token": (1,) * 12,
    "1 to 3 tokens": (1, 2, 3) * 20,
    "1,000": (*(1 + n * n % 7 for n in range(999)), 64),
    "whole chunks": (64, 128),
    "around a chunk": (63, 1, 65, 1, 129),
    "one": (200,),
}


def _extreme_variants(dtype: torch.dtype) -> list[Variant]:
    """Each extreme once: with both widths of the decay, packed in every way, and the head counts of other models. K = V = 64."""
    gdn2, gdn = (partial(case_of, model, 64, 64) for model in ("gdn2", "gdn"))
    decays = [str(d) for d in MIXED_DECAYS]
    packed = [
        gdn2(layout="packed", documents=lengths, tokens=sum(lengths), groups=2, decay=decay)
        for lengths in DOCUMENTS.values()
        for decay in ("mixed", "slow")
    ]
    mamba2 = partial(case_of, "mamba2", 64, 64)
    mamba = partial(mamba2, **MAMBA)
    documents = [
        mamba2(layout="packed", documents=lengths, tokens=sum(lengths), groups=2, decay=decay)
        for lengths in DOCUMENTS.values()
        for decay in ("mixed", "slow")
    ]
    tokens = 1000 if dtype == torch.float32 else 130  # reflections: nothing decays, errors neither
    return [
        Variant(
            "gdn2-extremes",
            dtype,
            [
                *(gdn2(decay=d) for d in decays),
                *(gdn2(decay=d, erase=e) for d in ("mixed", "slow") for e in ("0.0", "1.0", "2.0")),
                gdn2(decay="mixed", groups=4, tokens=200, g_heads="value", b_heads="value"),
                gdn2(heads=1, groups=72, decay="slow"),
                gdn2(heads=72, decay="slow", tokens=1000),
                *packed,
            ],
        ),
        Variant("gdn-extremes", dtype, [*(gdn(decay=d) for d in decays), *(gdn(decay="slow", erase=e) for e in ("0.0", "1.0", "2.0"))]),
        Variant("mamba2-extremes", dtype, [*(mamba2(decay=d, tokens=200) for d in decays), *documents]),
        Variant("mamba2-heads", dtype, [mamba(heads=1, groups=72, tokens=t) for t in (65, 1000)] + [mamba(heads=72, tokens=t) for t in (65, 1000)]),
        Variant("mamba3-heads", dtype, [case_of("gla", 64, 64, heads=72, scale=1.0, tokens=300, decay="slow")]),
        Variant("deltanet-extremes", dtype, [case_of("deltanet", 64, 64, erase=e, tokens=tokens) for e in ("1.0", "2.0")]),
    ]


# --- in the interpreter: seconds a case, so few and small ones ---


def _tuned_variants() -> list[Variant]:
    """Sizes whose tiles were measured, with every decay; few programs and many have tiles of their own. Value sizes that are filled up, or wide."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        gdn2 = partial(case_of, "gdn2", 128, 128)
        few = [gdn2(decay=d, tokens=t) for d, t in (("mixed", 1000), ("mild", 200), ("slow", 200), *((str(d), 130) for d in MIXED_DECAYS))]
        many = [gdn2(batch=batch, heads=16, decay="mixed", tokens=70) for batch in (2, 4, 8)]  # 32, 64 columns a program, transposed
        packed = [gdn2(layout="packed", documents=lengths, tokens=sum(lengths), groups=2) for lengths in DOCUMENTS.values()]
        found.append(Variant("gdn2-tuned", dtype, [*few, *many, *packed]))
        for model in ("kda", "gdn", "deltanet", "gla"):
            tuned = partial(case_of, model, 128, 128)
            cases = [tuned(decay=decay) for decay in ("mixed", "slow")]
            cases += [tuned(batch=batch, heads=16, decay="slow", tokens=70) for batch in (2, 4, 8)]
            cases += [tuned(layout="packed", documents=DOCUMENTS["around a chunk"], tokens=259, groups=2, decay="slow")]
            found.append(Variant(f"{model}-tuned", dtype, cases))
    for k_dim, v_dim in ((64, 96), (128, 64), (128, 256)):
        other = partial(case_of, "gdn2", k_dim, v_dim)
        cases = [*(other(decay=decay) for decay in ("mixed", "slow")), other(batch=8, heads=8, decay="slow", tokens=130)]
        found.append(Variant(f"gdn2-{k_dim}-{v_dim}", torch.bfloat16, cases))
    return found


def _small_variants() -> list[Variant]:
    tiny, short = {"tokens": 70}, {"tokens": 66, "groups": 2}
    single = torch.float32
    listed: list[tuple[str, torch.dtype, int, int, dict[str, Any]]] = [
        ("gdn2", single, 32, 32, {"tokens": 130, "storage": "strided"}),
        ("gdn2", single, 16, 32, {"layout": "packed", "documents": (1, 3, 65, 2), "tokens": 71}),
        ("gdn2", single, 32, 16, {**short, "g_heads": "value", "b_heads": "value"}),
        ("gdn2", single, 16, 16, {**tiny, "erase": "2.0", "decay": "-1e-6"}),
        ("gdn2", single, 16, 16, {"tokens": 64, "decay": "-1000.0"}),
        ("gdn2", LOW, 32, 32, {**tiny, "state": False}),
        ("gdn2_scalar_erase", single, 16, 16, {**tiny, "decay": "mild"}),
        ("gdn2_scalar_write", single, 16, 32, {"tokens": 15, "scale": 1.0}),
        ("kda", single, 16, 16, {**short, "storage": "expanded"}),
        ("gdn", single, 16, 16, {"layout": "packed", "documents": (64, 1, 5), "tokens": 70, "decay": "mild"}),
        ("gdn", LOW, 16, 32, {**short, "g_heads": "value"}),
        ("deltanet", single, 32, 16, {**tiny, "erase": "2.0"}),
        ("gla", single, 16, 16, {**tiny, "state": False}),
        ("mamba2", single, 16, 16, {**short, **MAMBA}),
        (
            "mamba2",
            single,
            32,
            16,
            {"layout": "packed", "documents": (1, 3, 65, 2), "tokens": 71, "groups": 2, "g_heads": "value", "storage": "strided"},
        ),
        ("mamba2", single, 16, 128, {**short, "state": False}),  # two blocks of value columns
        ("mamba2", single, 16, 16, {"tokens": 130, "decay": "-1000.0"}),
        ("mamba2", single, 16, 16, {**tiny, "decay": "-1e-6"}),
        ("mamba2", LOW, 16, 16, {**short, "storage": "expanded", "batch": 2}),
        ("mamba2_channel_write", single, 16, 32, short),
        ("mamba2_channel_write", LOW, 16, 128, {**tiny, "decay": "mild"}),
        ("retnet", single, 16, 16, {**tiny, "decay": "mild"}),
        ("linear_attention", LOW, 16, 16, {"tokens": 1}),
        ("linear_attention", single, 16, 128, {"layout": "packed", "documents": (64, 1, 5), "tokens": 70, "groups": 2}),
    ]
    return [Variant(f"{n}-{model}", dtype, [case_of(model, k, v, **settings)]) for n, (model, dtype, k, v, settings) in enumerate(listed)]


def variants() -> list[Variant]:
    """The list for where the tests run."""
    if not ON_GPU:
        return _small_variants()
    extremes = [variant for dtype in (torch.float32, torch.bfloat16, torch.float16) for variant in _extreme_variants(dtype)]
    return extremes + _tuned_variants() + _pairwise_variants()  # long ones first: the processes that run them end together
