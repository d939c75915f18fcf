"""What `delta_rule` and `delta_rule_step` refuse, and with which words. Every message of `kernels/delta/api.py` is met once."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import backend, delta_rule, delta_rule_step
from kernels.delta import api
from kernels.delta.forward import as_rows

B, T, H, HV, K, V = 2, 6, 2, 4, 3, 5
Arguments = dict[str, Any]


def legal(**changes: Any) -> Arguments:
    """A call that is accepted, with `changes`."""
    arguments = {
        "q": torch.ones(B, T, H, K),
        "k": torch.ones(B, T, H, K),
        "v": torch.ones(B, T, HV, V),
        "g": torch.full((B, T, H, K), -1.0),
        "b": torch.ones(B, T, H, K),
        "w": torch.ones(B, T, HV, V),
        "state": torch.zeros(B, HV, K, V),
    }
    return arguments | changes


def packed(cu_seqlens: Any, sequences: int = 2, **changes: Any) -> Arguments:
    row = {name: x[:1] for name, x in legal().items() if name != "state"}
    return row | {"state": torch.zeros(sequences, HV, K, V), "cu_seqlens": cu_seqlens} | changes


def one_token(**changes: Any) -> Arguments:
    return {name: x if name == "state" else x[:, 0] for name, x in legal().items()} | changes


def test_legal_calls_are_accepted() -> None:
    for arguments in (legal(), packed(torch.tensor([0, 1, T])), packed(torch.tensor([0, 1, T], dtype=torch.int32))):
        o, state = delta_rule(**arguments)
        assert o.shape == arguments["v"].shape
        assert state.shape == arguments["state"].shape
    o, state = delta_rule_step(**one_token())
    assert o.shape == (B, HV, V)
    assert state.shape == (B, HV, K, V)
    for heads in (H, HV):  # gates may stand on key heads or on value heads
        for width in (1, K):
            gate = torch.full((B, T, heads, width), -1.0)
            delta_rule(**legal(g=gate, b=-gate))
    delta_rule(**legal(w=torch.ones(B, T, HV, 1)))
    delta_rule(**legal(b=None, w=None, g=None, state=None))


def ranked(ranks: int | None = 3, **changes: Any) -> Arguments:
    """A call with what only tokens without an erase gate can have; with `ranks` None, own alone."""
    lead = (B, T) if ranks is None else (B, T, ranks)
    qkv = {"q": torch.ones(*lead, H, K), "k": torch.ones(*lead, H, K), "v": torch.ones(*lead, HV, V)}
    gates = {"g": torch.full((B, T, H, 1), -1.0), "b": None, "w": torch.ones(B, T, HV, 1), "own": torch.ones(B, T, HV, 1)}
    return legal(**qkv, **gates) | changes


def test_legal_calls_with_ranks_are_accepted() -> None:
    for arguments in (ranked(), ranked(None), ranked(1), ranked(own=None), ranked(g=None, w=None), ranked(g=torch.full((B, T, HV, 1), -1.0))):
        o, state = delta_rule(**arguments)
        assert o.shape == arguments["v"].shape
        assert state.shape == arguments["state"].shape


SHAPES: dict[str, tuple[Arguments, str]] = {
    "q without batch": (legal(q=torch.ones(T, H, K)), r"q must have axes \[B, T, H, channels\].*\[6, 2, 3\]"),
    "k without heads": (legal(k=torch.ones(B, T, K)), r"k must have axes \[B, T, H, channels\]"),
    "v without heads": (legal(v=torch.ones(B, T, V)), r"v must have axes \[B, T, H, channels\]"),
    "k of other channels": (legal(k=torch.ones(B, T, H, K + 1)), r"k must have q's shape \[2, 6, 2, 3\], got \[2, 6, 2, 4\]"),
    "k of one head": (legal(k=torch.ones(B, T, 1, K)), r"k must have q's shape"),
    "k of other tokens": (legal(k=torch.ones(B, 1, H, K)), r"k must have q's shape"),
    "v of other tokens": (legal(v=torch.ones(B, T + 1, HV, V)), r"v must share q's leading axes \[2, 6\]"),
    "v of another batch": (legal(v=torch.ones(1, T, HV, V)), r"v must share q's leading axes"),
    "v heads no multiple": (legal(v=torch.ones(B, T, 3, V)), r"v's heads must be a multiple of q's 2, got 3"),
    "v heads fewer": (legal(v=torch.ones(B, T, 1, V)), r"v's heads must be a multiple of q's 2, got 1"),
    "no heads": (legal(q=torch.ones(B, T, 0, K), k=torch.ones(B, T, 0, K)), r"v's heads must be a multiple of q's 0"),
    "no v heads": (legal(v=torch.ones(B, T, 0, V)), r"v's heads must be a multiple of q's 2, got 0"),
    "no channels": (legal(v=torch.ones(B, T, HV, 0)), r"every axis must be at least 1.*v \[2, 6, 4, 0\]"),
    "no tokens": (
        legal(q=torch.ones(B, 0, H, K), k=torch.ones(B, 0, H, K), v=torch.ones(B, 0, HV, V)),
        r"every axis must be at least 1.*q \[2, 0, 2, 3\]",
    ),
    "g of one head": (legal(g=torch.full((B, T, 1, K), -1.0)), r"g must have shape \[2, 6, 2 or 4 heads, 3 or 1\], got \[2, 6, 1, 3\]"),
    "g of other channels": (legal(g=torch.full((B, T, H, K - 1), -1.0)), r"g must have shape \[2, 6, 2 or 4 heads, 3 or 1\]"),
    "g of one token": (legal(g=torch.full((B, 1, H, K), -1.0)), r"g must have shape"),
    "g without channels": (legal(g=torch.full((B, T, H), -1.0)), r"g must have shape"),
    "b of one head": (legal(b=torch.ones(B, T, 1, K)), r"b must have shape \[2, 6, 2 or 4 heads, 3 or 1\], got \[2, 6, 1, 3\]"),
    "b of other channels": (legal(b=torch.ones(B, T, H, V)), r"b must have shape"),
    "b of another batch": (legal(b=torch.ones(1, T, H, K)), r"b must have shape"),
    "w on key heads": (legal(w=torch.ones(B, T, H, V)), r"w must have shape \[2, 6, 4 heads, 5 or 1\], got \[2, 6, 2, 5\]"),
    "w of key channels": (legal(w=torch.ones(B, T, HV, K)), r"w must have shape"),
    "state without sequences": (legal(state=torch.zeros(HV, K, V)), r"state must have shape \[N, HV, K, V\] = \[2, 4, 3, 5\], got \[4, 3, 5\]"),
    "state of key heads": (legal(state=torch.zeros(B, H, K, V)), r"state must have shape"),
    "state of one sequence": (legal(state=torch.zeros(1, HV, K, V)), r"state must have shape"),
    "state transposed": (legal(state=torch.zeros(B, HV, V, K)), r"state must have shape"),
    "state per row, not document": (packed(torch.tensor([0, 1, T]), sequences=1), r"state must have shape .* \[2, 4, 3, 5\], got \[1, 4, 3, 5\]"),
    "positive decay": (legal(g=torch.full((B, T, H, K), 0.25)), r"g is a log-decay and must be <= 0 everywhere, its largest entry is 0.25"),
    "one positive decay": (legal(g=torch.zeros(B, T, H, K).index_fill(1, torch.tensor(3), 1e-6)), r"must be <= 0 everywhere.*1e-06"),
    "k on another device": (legal(k=torch.ones(B, T, H, K, device="meta")), r"k is on meta, q on cpu"),
    "v on another device": (legal(v=torch.ones(B, T, HV, V, device="meta")), r"v is on meta, q on cpu"),
    "g on another device": (legal(g=torch.ones(B, T, H, K, device="meta")), r"g is on meta, q on cpu"),
    "b on another device": (legal(b=torch.ones(B, T, H, K, device="meta")), r"b is on meta, q on cpu"),
    "w on another device": (legal(w=torch.ones(B, T, HV, V, device="meta")), r"w is on meta, q on cpu"),
    "state on another device": (legal(state=torch.zeros(B, HV, K, V, device="meta")), r"state is on meta, v on cpu"),
    "cu_seqlens with a batch": (legal(cu_seqlens=torch.tensor([0, T])), r"packed sequences \(cu_seqlens\) need B = 1, got B = 2"),
    "cu_seqlens not from 0": (packed(torch.tensor([1, 2, T])), r"cu_seqlens must start at 0 and end at T = 6, got 1 and 6"),
    "cu_seqlens not to T": (packed(torch.tensor([0, 2, T - 1])), r"cu_seqlens must start at 0 and end at T = 6, got 0 and 5"),
    "cu_seqlens past T": (packed(torch.tensor([0, 2, T + 1])), r"cu_seqlens must start at 0 and end at T = 6, got 0 and 7"),
    "cu_seqlens with an empty document": (packed(torch.tensor([0, 2, 2, T]), 3), r"cu_seqlens must be strictly increasing"),
    "cu_seqlens decreasing": (packed(torch.tensor([0, 4, 2, T]), 3), r"cu_seqlens must be strictly increasing"),
    "cu_seqlens of one number": (packed(torch.tensor([0])), r"cu_seqlens must have shape \[N\+1\] with N >= 1, got \[1\]"),
    "cu_seqlens of two axes": (packed(torch.tensor([[0, 2, T]])), r"cu_seqlens must have shape \[N\+1\] with N >= 1, got \[1, 3\]"),
    "own with an erase gate": (ranked(b=torch.ones(B, T, H, 1)), r"own needs b = None: with an erase gate a token has one key"),
    "ranks with an erase gate": (ranked(own=None, b=torch.ones(B, T, H, 1)), r"q with ranks \[B, T, R, H, K\] needs b = None"),
    "ranks with a decay a channel": (ranked(g=torch.full((B, T, H, K), -1.0)), r"own needs at most one number a head in g, got shape \[2, 6, 2, 3\]"),
    "own with a write gate a channel": (ranked(None, w=torch.ones(B, T, HV, V)), r"own needs at most one number a head in w"),
    "own on key heads": (ranked(own=torch.ones(B, T, H, 1)), r"own must have shape \[B, T, HV, 1\] = \[2, 6, 4, 1\], got \[2, 6, 2, 1\]"),
    "own for every rank": (ranked(own=torch.ones(B, T, 3, HV, 1)), r"own must have shape \[B, T, HV, 1\]"),
    "w for every rank": (ranked(w=torch.ones(B, T, 3, HV, 1)), r"w must have shape \[2, 6, 4 heads, 5 or 1\], got \[2, 6, 3, 4, 1\]"),
    "v without ranks": (ranked(v=torch.ones(B, T, HV, V)), r"v must have axes \[B, T, R, H, channels\]"),
    "v of other ranks": (ranked(v=torch.ones(B, T, 2, HV, V)), r"v must share q's leading axes \[2, 6, 3\]"),
    "own on another device": (ranked(own=torch.ones(B, T, HV, 1, device="meta")), r"own is on meta, q on cpu"),
    "unknown backend": (legal(backend="cuda"), r"backend must be one of auto, triton, reference, got 'cuda'"),
}
DTYPES: dict[str, tuple[Arguments, str]] = {
    "g is a number": (legal(g=-1.0), r"g must be a tensor, got float"),
    "no values": (legal(v=None), r"v must be a tensor, got NoneType"),
    "cu_seqlens is a list": (packed([0, T]), r"cu_seqlens must be a tensor, got list"),
    "own of another dtype": (ranked(own=torch.ones(B, T, HV, 1).double()), r"own must be torch.float32, got torch.float64"),
    "q of another dtype": (legal(q=torch.ones(B, T, H, K).bfloat16()), r"q, k and v must share one floating dtype, got torch.bfloat16"),
    "v of another dtype": (legal(v=torch.ones(B, T, HV, V).double()), r"q, k and v must share one floating dtype"),
    "integers": ({n: x.long() for n, x in legal().items()}, r"q, k and v must share one floating dtype, got torch.int64"),
    "8 bits": (
        {n: x if n in ("g", "state") else x.to(torch.float8_e4m3fn) for n, x in legal().items()},
        r"q, k and v must share one floating dtype, got torch.float8_e4m3fn, .*\(legal: float64, float32, float16, bfloat16\)",
    ),
    "g in half precision": (
        {n: x if n == "state" else x.bfloat16() for n, x in legal().items()},
        r"g must be torch.float32 for torch.bfloat16 values, got torch.bfloat16",
    ),
    "g float64 for float32": (legal(g=torch.full((B, T, H, K), -1.0).double()), r"g must be torch.float32 for torch.float32 values"),
    "g float32 for float64": (
        {n: x if n == "g" else x.double() for n, x in legal().items()},
        r"g must be torch.float64 for torch.float64 values, got torch.float32",
    ),
    "b of another dtype": (legal(b=torch.ones(B, T, H, K).bfloat16()), r"b must be torch.float32, got torch.bfloat16"),
    "w of integers": (legal(w=torch.ones(B, T, HV, V).long()), r"w must be torch.float32, got torch.int64"),
    "state in half precision": (
        {n: x if n == "g" else x.half() for n, x in legal().items()},
        r"state must be torch.float32 for torch.float16 values, got torch.float16",
    ),
    "cu_seqlens floating": (packed(torch.tensor([0.0, 1.0, T])), r"cu_seqlens must be int32 or int64, got torch.float32"),
}


@pytest.mark.parametrize(("arguments", "message"), SHAPES.values(), ids=SHAPES.keys())
def test_shapes_values_and_devices(arguments: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=f"^delta_rule: .*{message}"):
        delta_rule(**arguments)


@pytest.mark.parametrize(("arguments", "message"), DTYPES.values(), ids=DTYPES.keys())
def test_dtypes(arguments: Arguments, message: str) -> None:
    with pytest.raises(TypeError, match=f"^delta_rule: .*{message}"):
        delta_rule(**arguments)


STEP: dict[str, tuple[Arguments, type[Exception], str]] = {
    "a token axis": (legal(), ValueError, r"q must have axes \[B, H, channels\], got shape \[2, 6, 2, 3\]"),
    "b of one head": (one_token(b=torch.ones(B, 1, K)), ValueError, r"b must have shape \[2, 2 or 4 heads, 3 or 1\], got \[2, 1, 3\]"),
    "another batch": (one_token(state=torch.zeros(1, HV, K, V)), ValueError, r"state must have shape"),
    "state in half precision": (one_token(state=torch.zeros(B, HV, K, V).half()), TypeError, r"state must be torch.float32"),
    "positive decay": (one_token(g=torch.ones(B, H, K)), ValueError, r"g is a log-decay"),
    "unknown backend": (one_token(backend="eager"), ValueError, r"backend must be one of"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), STEP.values(), ids=STEP.keys())
def test_step(arguments: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^delta_rule_step: {message}"):
        delta_rule_step(**arguments)


@pytest.mark.parametrize(("function", "arguments"), [(delta_rule, legal()), (delta_rule_step, one_token())], ids=["delta_rule", "step"])
def test_triton_by_name_where_it_cannot_run(function: Callable[..., Any], arguments: Arguments) -> None:
    with pytest.raises(NotImplementedError, match=r"backend='triton' cannot run: .*; use backend='auto' or 'reference'"):
        function(**arguments, backend="triton")
    for name in ("auto", "reference"):
        assert torch.equal(function(**arguments, backend=name)[0], function(**arguments)[0])


def test_backend_is_a_constant_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "TRITON_OPS", frozenset({"some_op"}))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [backend.resolve("some_op", name, cuda) for name in ("auto", "triton", "reference")] == ["triton", "triton", "reference"]
    assert [backend.resolve("some_op", name, cpu) for name in ("auto", "reference")] == ["reference", "reference"]
    assert backend.resolve("another_op", "auto", cuda) == "reference"
    with pytest.raises(NotImplementedError, match="tensors are on cpu"):
        backend.resolve("some_op", "triton", cpu)
    with pytest.raises(NotImplementedError, match="this version has no Triton kernel for it"):
        backend.resolve("another_op", "triton", cuda)
    with backend.as_on_gpu():
        assert [backend.resolve("some_op", name, cpu) for name in ("auto", "triton", "reference")] == ["triton", "triton", "reference"]
        assert backend.resolve("some_op", "auto", cpu, "float64 has no kernel") == "reference"
        assert backend.resolve("another_op", "auto", cpu) == "reference"
    assert backend.resolve("some_op", "auto", cpu) == "reference"


def test_every_message_is_met() -> None:
    """Each `raise` of the module has a line in the tables above: its fixed words stand in one of the messages that were matched."""
    met: list[str] = []
    for function, arguments in [(delta_rule, a) for a, _ in (*SHAPES.values(), *DTYPES.values())] + [
        (delta_rule_step, a) for a, _, _ in STEP.values()
    ]:
        with pytest.raises((ValueError, TypeError)) as caught:
            function(**arguments)
        met.append(str(caught.value))
    raised = re.findall(r"raise \w+\(\s*f\"(.*?)\"\s*\)", inspect.getsource(api))
    assert len(raised) == inspect.getsource(api).count("raise ")
    for template in raised:
        pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape(re.sub(r"\{(?:[^{}\[\]]|\[[^\]]*\])*\}", "{}", template)))
        assert any(re.fullmatch(pattern, message) for message in met), template


def test_gates_are_not_range_checked() -> None:
    o, state = delta_rule(**legal(b=torch.full((B, T, H, K), -3.0), w=torch.full((B, T, HV, V), 7.0)))
    assert bool(o.isfinite().all())
    assert bool(state.isfinite().all())


def test_values_are_read_only_where_that_costs_nothing() -> None:
    """Tensors whose values are not at hand are checked by shape and dtype alone."""

    class Traced(Tensor):
        pass

    g = torch.full((B, T, H, K), 0.5)
    with pytest.raises(ValueError, match="log-decay"):
        delta_rule(**legal(g=g))
    delta_rule(**legal(g=g.as_subclass(Traced)))


@pytest.mark.parametrize(("offset", "width"), [(0, 0), (8, 0), (1, 0), (0, 1), (2, 2), (0, 8)])  # numbers of two bytes
def test_kernels_see_rows_that_begin_at_multiples_of_16_bytes(offset: int, width: int) -> None:
    """Asynchronous copies move 4 to 16 bytes: what lies elsewhere is copied, what does not is not."""
    row = 2 * 16 + width
    memory = torch.arange(2 * 5 * row + offset, dtype=torch.bfloat16)[offset:]
    x = memory.view(2, 5, row)[..., :32].unflatten(-1, (2, 16))
    rows = as_rows(x)
    assert torch.equal(rows.reshape(x.shape), x)
    assert rows.data_ptr() % 16 == 0
    assert rows.stride(1) % 8 == 0
    assert (rows.data_ptr() == x.data_ptr()) == (offset % 8 == 0 and width % 8 == 0)
