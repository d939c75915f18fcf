"""Inputs for the tests of the delta rule: a list of cases that covers every pair of settings, and how two runs are compared.

Shapes: B batch, T tokens, H key heads, HV value heads, K key size, V value size, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

# of the largest entry of each tensor; reasons in docs/numerics.md
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
HALF = (torch.float16, torch.bfloat16)
MIXED_DECAYS = (0.0, -1e-6, -0.1, -5.0, -50.0, -1000.0)
HEADS = 2


class Case(NamedTuple):
    """One setting of everything that the op's arguments can vary in."""

    g: str  # width: absent, scalar, channel
    b: str
    w: str
    g_heads: str  # key: H heads, value: HV heads
    b_heads: str
    groups: int  # HV / H
    tokens: int
    sizes: tuple[int, int]  # K, V
    layout: str  # dense: a batch; packed: one row of documents
    state: bool
    scale: float | None
    storage: str  # contiguous, expanded (stride 0), strided
    decay: str  # mild, slow, mixed, or one value of MIXED_DECAYS for every entry
    erase: str = "random"  # random in [0, 2], or one value for every entry
    documents: tuple[int, ...] = ()  # lengths; empty: `document_lengths`
    heads: int = HEADS
    batch: int = 2  # of dense inputs
    write: float = 1.0  # w is random between 0 and this

    def __str__(self) -> str:
        shown = [x for name, x in self._asdict().items() if name not in self._field_defaults or x != self._field_defaults[name]]
        return "-".join(str(x).replace(" ", "") for x in shown)


FACTORS: dict[str, tuple[Any, ...]] = {
    "g": ("channel", "scalar", "absent"),
    "b": ("channel", "scalar", "absent"),
    "w": ("channel", "scalar", "absent"),
    "g_heads": ("key", "value"),
    "b_heads": ("key", "value"),
    "groups": (1, 2, 4),
    "tokens": (1, 2, 15, 16, 17, 63, 64, 65, 200),
    "sizes": ((8, 12), (12, 8), (16, 16)),
    "layout": ("dense", "packed"),
    "state": (False, True),
    "scale": (None, 0.3),
    "storage": ("contiguous", "expanded", "strided"),
    "decay": ("mixed", "mild"),
}


def pairs_of(row: Sequence[Any]) -> set[tuple[int, Any, int, Any]]:
    """Every two settings of a row, as (factor, value, factor, value)."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def all_pairs(factors: dict[str, tuple[Any, ...]]) -> list[tuple[int, Any, int, Any]]:
    """Every pair of values of every two factors, in a fixed order."""
    values = list(factors.values())
    return [(i, x, j, y) for i, j in combinations(range(len(values)), 2) for x, y in product(values[i], values[j])]


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A short list of rows that covers `all_pairs`: each row starts from the first pair still open, then takes for one factor after the other the
    value that closes most pairs with what is already chosen (the first of equals)."""
    values = list(factors.values())
    still_open = dict.fromkeys(all_pairs(factors))  # a set that keeps its order
    rows = []
    while still_open:
        i, x, j, y = next(iter(still_open))
        chosen = {i: x, j: y}

        def closes(factor: int, value: Any, chosen: dict[int, Any] = chosen) -> int:
            known = ((f, v, factor, value) if f < factor else (factor, value, f, v) for f, v in chosen.items())
            return sum(pair in still_open for pair in known)

        for factor in range(len(values)):
            if factor not in chosen:
                chosen[factor] = max(values[factor], key=lambda value, f=factor: closes(f, value))
        row = tuple(chosen[f] for f in range(len(values)))
        for pair in pairs_of(row):
            still_open.pop(pair, None)
        rows.append(row)
    return rows


_TYPICAL = Case("channel", "channel", "channel", "key", "key", 2, 130, (8, 12), "dense", True, None, "contiguous", "mixed")
_PACKED = _TYPICAL._replace(layout="packed")
EXTREMES = [
    *(_TYPICAL._replace(decay=str(d)) for d in MIXED_DECAYS),
    *(_TYPICAL._replace(g="scalar", decay=str(d)) for d in MIXED_DECAYS),
    *(_TYPICAL._replace(erase=e) for e in ("0.0", "1.0", "2.0")),
    _TYPICAL._replace(b="scalar", erase="2.0", g="absent"),
    _TYPICAL._replace(sizes=(1, 1)),
    _TYPICAL._replace(sizes=(64, 32), tokens=70),
    _TYPICAL._replace(groups=4, tokens=200, g_heads="value", b_heads="value"),
    _PACKED._replace(tokens=12, documents=(1,) * 12),
    _PACKED._replace(tokens=192, documents=(64, 128)),
    _PACKED._replace(tokens=259, documents=(63, 1, 65, 1, 129)),
    _PACKED._replace(tokens=200, documents=(200,)),
]
CASES = [Case(*row) for row in pairwise(FACTORS)] + EXTREMES


def document_lengths(tokens: int) -> tuple[int, ...]:
    """Documents of 1 to 3 tokens between long ones, `tokens` in all."""
    lengths: list[int] = []
    for length in (1, 3, 2, 70, 1, 64, 2, tokens):
        left = tokens - sum(lengths)
        if left:
            lengths.append(min(length, left))
    return tuple(lengths)


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


class Inputs(NamedTuple):
    """Arguments of `delta_rule`. `leaves` hold the storage: an argument may be a view of its leaf, with the leaf's gradient."""

    leaves: dict[str, Tensor]
    views: dict[str, Callable[[Tensor], Tensor]]
    options: dict[str, Any]  # scale, cu_seqlens

    def arguments(self) -> dict[str, Any]:
        return {name: self.views[name](leaf) for name, leaf in self.leaves.items()} | self.options

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._replace(leaves={name: leaf.to(dtype) for name, leaf in self.leaves.items()})

    def on(self, device: torch.device | str) -> Inputs:
        """On `device`, as they are."""
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return self._replace(leaves={name: leaf.to(device) for name, leaf in self.leaves.items()}, options=options)

    def rounded(self, dtype: torch.dtype, device: torch.device | str = "cpu", *, wide: Sequence[str] = ("g", "state")) -> Inputs:
        """On `device` and in `dtype`, but for the arguments `wide`, which are in float32."""
        leaves = {name: x.to(torch.float32 if name in wide else dtype) for name, x in self.leaves.items()}
        return self._replace(leaves=leaves).on(device)


def make(case: Case, seed: int = 0) -> Inputs:
    """Random float64 inputs; keys have length 1."""
    generator = torch.Generator().manual_seed(seed)
    k_dim, v_dim = case.sizes
    v_heads = case.heads * case.groups
    batch = case.batch if case.layout == "dense" else 1
    options: dict[str, Any] = {"scale": case.scale}
    sequences = batch
    if case.layout == "packed":
        lengths = case.documents or document_lengths(case.tokens)
        sequences, options["cu_seqlens"] = len(lengths), cu_seqlens_of(lengths)
    lead, heads = (batch, case.tokens), {"key": case.heads, "value": v_heads}
    shapes = {"q": (*lead, case.heads, k_dim), "k": (*lead, case.heads, k_dim), "v": (*lead, v_heads, v_dim)}
    for name, width, gate_heads, channels in (
        ("g", case.g, heads[case.g_heads], k_dim),
        ("b", case.b, heads[case.b_heads], k_dim),
        ("w", case.w, v_heads, v_dim),
    ):
        if width != "absent":
            shapes[name] = (*lead, gate_heads, channels if width == "channel" else 1)
    if case.state:
        shapes["state"] = (sequences, v_heads, k_dim, v_dim)

    # the axis along which an expanded argument has stride 0: q batch, v heads, g tokens, w channels, ...
    repeated = {"q": 0, "v": 2, "g": 1, "b": 2, "w": 3, "state": 0} if case.storage == "expanded" else {}
    leaves, views = {}, {}
    for name, shape in shapes.items():
        stored = tuple(1 if axis == repeated.get(name) else n for axis, n in enumerate(shape))
        leaf = _draw(name, stored, case, generator)
        views[name] = lambda x, shape=shape: x.expand(shape)
        if case.storage == "strided":  # axes in another order and every second entry of a wider tensor
            leaf = leaf.permute(2, 0, 3, 1).repeat_interleave(2, -1).contiguous()
            views[name] = lambda x: x[..., ::2].permute(1, 3, 0, 2)
        leaves[name] = leaf
    return Inputs(leaves, views, options)


def _draw(name: str, shape: tuple[int, ...], case: Case, generator: torch.Generator) -> Tensor:
    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if name == "g" and case.decay == "mixed":
        return torch.tensor(MIXED_DECAYS, dtype=torch.float64)[torch.randint(len(MIXED_DECAYS), shape, generator=generator)]
    if name == "g":
        most = {"mild": 1.0, "slow": 0.02}.get(case.decay)
        return torch.full(shape, float(case.decay), dtype=torch.float64) if most is None else -most * uniform()
    if name == "b":
        return 2 * uniform() if case.erase == "random" else torch.full(shape, float(case.erase), dtype=torch.float64)
    if name == "w":
        return case.write * uniform()
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1) if name == "k" else x


def random_cotangent(x: Tensor, seed: int) -> Tensor:
    """Random numbers of x's shape and dtype that every dtype holds exactly, so that runs in two dtypes differentiate the same loss."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16).to(x)


def run(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, final state and the gradient of every leaf under fixed random cotangents."""
    inputs = inputs._replace(leaves={name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()})
    o, state = function(**inputs.arguments())
    cotangents = [random_cotangent(x, seed) for seed, x in enumerate((o, state))]
    gradients = torch.autograd.grad([o, state], list(inputs.leaves.values()), cotangents)
    named = {f"d{name}": gradient for name, gradient in zip(inputs.leaves, gradients, strict=True)}
    return {"o": o.detach(), "final": state.detach(), **named}


def errors(got: dict[str, Tensor], expected: dict[str, Tensor], at_least: dict[str, float] | None = None) -> dict[str, float]:
    """max|got - expected| / max|expected| of each tensor; infinite where anything is not finite or the shapes differ.

    `at_least` names tensors that come out of sums in which larger terms cancel, and the size of those terms, which then counts if it is larger.
    """
    assert got.keys() == expected.keys()
    result = {}
    for name, reference in expected.items():
        value = got[name].to(reference.device, torch.float64)
        finite = value.shape == reference.shape and bool(value.isfinite().all()) and bool(reference.isfinite().all())
        difference = (value - reference).abs().max().item() if finite else float("inf")
        largest = max(reference.abs().max().item(), (at_least or {}).get(name, 0.0)) if finite else 1.0
        result[name] = 0.0 if difference == 0 else difference / largest if largest else float("inf")
    return result


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Fails with every tensor whose error is above `tolerance`."""
    wrong = {name: error for name, error in errors(got, expected).items() if not error <= tolerance}
    assert not wrong, f"errors above {tolerance:g} of the largest entry: {wrong}"


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fails unless all tensors are bitwise equal."""
    assert got.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(got[name], tensor)]
    assert not different, f"not bitwise equal: {different}"
