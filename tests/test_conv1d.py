"""The causal short convolution against torch's own convolution, document by document, and against loops written out.

Shapes: B batch, T tokens, D channels, W taps, N sequences.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from delta_cases import HALF, TOLERANCE, assert_close, assert_same, cu_seqlens_of, random_cotangent
from torch import Tensor

from kernels import causal_conv1d, causal_conv1d_step
from kernels.conv1d import api
from kernels.conv1d.api import causal_conv1d_parts
from kernels.conv1d.reference import NORM_EPS

pytestmark = pytest.mark.usefixtures("poison")

FLOAT64, FLOAT32 = TOLERANCE[torch.float64], TOLERANCE[torch.float32]
D = 12
LENGTHS = {"dense": (20, 20), "packed": (1, 2, 7, 1, 3, 6)}  # some documents are shorter than every width
EPILOGUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "silu": {"activation": "silu"},
    "norm": {"norm_size": 3},
    "silu, norm of the first channels": {"activation": "silu", "norm_size": 4, "norm_channels": 8},
}
by_epilogue = pytest.mark.parametrize("epilogue", EPILOGUES.values(), ids=EPILOGUES.keys())
by_layout = pytest.mark.parametrize("layout", LENGTHS)
by_width = pytest.mark.parametrize("width", [2, 3, 4, 5])


def make(layout: str, width: int, *, bias: bool = True, state: bool = True) -> dict[str, Tensor]:
    """Random float64 tensors of a call."""
    generator = torch.Generator().manual_seed(width)
    lengths = LENGTHS[layout]
    shape = (len(lengths), lengths[0], D) if layout == "dense" else (1, sum(lengths), D)
    shapes = {"x": shape, "weight": (D, width)}
    shapes |= {"bias": (D,)} if bias else {}
    shapes |= {"state": (len(lengths), width - 1, D)} if state else {}
    return {name: torch.randn(*s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}


def options_of(layout: str) -> dict[str, Tensor]:
    return {"cu_seqlens": cu_seqlens_of(LENGTHS["packed"])} if layout == "packed" else {}


def run(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output, state and every gradient under fixed random cotangents."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    y, state = function(**leaves, **options)
    cotangents = [random_cotangent(out, seed) for seed, out in enumerate((y, state))]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), cotangents)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "final": state.detach(), **named}


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    norm_size: int | None = None,
    norm_channels: int | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` from torch.nn.functional.conv1d, one document at a time, behind its history."""
    history = weight.shape[1] - 1
    documents = list(x) if cu_seqlens is None else list(x[0].split(cu_seqlens.diff().tolist()))
    outputs, states = [], []
    for n, document in enumerate(documents):
        past = document.new_zeros(history, D) if state is None else state[n]
        padded = torch.cat([past, document])
        y = F.conv1d(padded.T.unsqueeze(0), weight.unsqueeze(1), bias, groups=D)[0].T
        y = y * y.sigmoid() if activation == "silu" else y
        if norm_size is not None:
            split = D if norm_channels is None else norm_channels
            groups = [group / (group.square().sum(-1, keepdim=True) + NORM_EPS).sqrt() for group in y[:, :split].split(norm_size, -1)]
            y = torch.cat([*groups, y[:, split:]], -1)
        outputs.append(y)
        states.append(padded[len(document) :])
    y = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs).unsqueeze(0)
    return y, torch.stack(states)


@by_layout
@by_width
@by_epilogue
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_against_torch(layout: str, width: int, epilogue: dict[str, Any], state: bool, bias: bool) -> None:
    tensors, options = make(layout, width, bias=bias, state=state), options_of(layout) | epilogue
    expected = run(by_torch, tensors, **options)
    assert_close(run(causal_conv1d, tensors, **options), expected, FLOAT64)
    assert_close(run(causal_conv1d, {n: x.float() for n, x in tensors.items()}, **options), expected, FLOAT32)


def test_against_a_loop() -> None:
    """The sum in the docstring, entry by entry: the last tap meets the current token, the state holds the oldest input first."""
    tensors = make("packed", 4)
    x, weight, bias, state = (tensors[name] for name in ("x", "weight", "bias", "state"))
    y, final = causal_conv1d(**tensors, **options_of("packed"))
    start = 0
    for n, length in enumerate(LENGTHS["packed"]):
        for t in range(length):
            for d in range(D):
                total = bias[d].item()
                for j in range(4):
                    past = x[0, start + t - j, d] if j <= t else state[n, 3 + t - j, d]
                    total += weight[d, 3 - j].item() * past.item()
                assert abs(y[0, start + t, d].item() - total) < 1e-12
        for i in range(3):
            kept = length - 3 + i
            assert torch.equal(final[n, i], x[0, start + kept] if kept >= 0 else state[n, 3 + kept])
        start += length


@by_layout
def test_half_precision(layout: str) -> None:
    for dtype in HALF:
        low = {name: x.to(dtype) for name, x in make(layout, 4).items()}
        options = options_of(layout) | EPILOGUES["silu, norm of the first channels"]
        got = run(causal_conv1d, low, **options)
        assert all(x.dtype == dtype for x in got.values())
        assert_close(got, run(by_torch, {name: x.double() for name, x in low.items()}, **options), TOLERANCE[dtype])


@by_width
@by_epilogue
def test_steps_equal_one_call(width: int, epilogue: dict[str, Any]) -> None:
    def stepwise(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for t in range(x.shape[1]):
            y, state = causal_conv1d_step(x[:, t], weight, bias, state=state, **epilogue)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    tensors = make("dense", width)
    assert_close(run(stepwise, tensors), run(causal_conv1d, tensors, **epilogue), FLOAT64)


@by_width
@pytest.mark.parametrize("cut", [1, 2, 3, 10, 19])
def test_split_anywhere(width: int, cut: int) -> None:
    def in_two(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        first, state = causal_conv1d(x[:, :cut], weight, bias, state=state)
        second, state = causal_conv1d(x[:, cut:], weight, bias, state=state)
        return torch.cat([first, second], 1), state

    tensors = make("dense", width)
    assert_close(run(in_two, tensors), run(causal_conv1d, tensors), FLOAT64)


@pytest.mark.parametrize("position", [1, 5, 19])
def test_causality_is_bitwise(position: int) -> None:
    tensors = make("dense", 4)
    changed = {name: x.clone() for name, x in tensors.items()}
    changed["x"][:, position:] *= 1000
    results = []
    for arguments in (tensors, changed):
        leaves = {name: x.detach().requires_grad_() for name, x in arguments.items()}
        y, _ = causal_conv1d(**leaves, activation="silu", norm_size=3)
        gradients = torch.autograd.grad(y[:, :position].sin().sum(), list(leaves.values()))
        results.append({"y": y[:, :position].detach(), **dict(zip(leaves, gradients, strict=True))})
    assert_same(results[1], results[0])
    assert not results[0]["x"][:, position:].any()


def test_two_runs_are_bitwise_equal() -> None:
    tensors, options = make("packed", 4), options_of("packed") | EPILOGUES["silu, norm of the first channels"]
    assert_same(run(causal_conv1d, tensors, **options), run(causal_conv1d, tensors, **options))


def test_documents_do_not_see_each_other() -> None:
    tensors, options = make("packed", 4), options_of("packed")
    changed = {name: x.clone() for name, x in tensors.items()}
    changed["x"][:, 3:10] = float("nan")  # the third document
    changed["state"][2] = float("inf")
    y, final = causal_conv1d(**tensors, **options)
    y_changed, final_changed = causal_conv1d(**changed, **options)
    assert torch.equal(y[:, :3], y_changed[:, :3])
    assert torch.equal(y[:, 10:], y_changed[:, 10:])
    others = [0, 1, 3, 4, 5]
    assert torch.equal(final[others], final_changed[others])


@by_layout
def test_inputs_are_not_modified(layout: str) -> None:
    tensors = make(layout, 4)
    copies = {name: x.clone() for name, x in tensors.items()}
    run(causal_conv1d, tensors, **options_of(layout), activation="silu", norm_size=3)
    if layout == "dense":
        _, state = causal_conv1d_step(tensors["x"][:, 0], tensors["weight"], tensors["bias"], state=tensors["state"])
        state.fill_(0.0)  # the new state may be written without touching the old one
    assert_same(tensors, copies)


def test_expanded_and_strided_inputs() -> None:
    tensors = make("dense", 4)
    tensors["x"] = tensors["x"][:, :1].expand(-1, 20, -1)
    expected = causal_conv1d(**{name: x.contiguous() for name, x in tensors.items()})
    got = causal_conv1d(**tensors)
    wide = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in tensors.items()}
    strided = causal_conv1d(**wide)
    for x, y, z in zip(got, expected, strided, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(z, y)


def test_autocast_changes_nothing() -> None:
    tensors = {name: x.float() for name, x in make("dense", 4).items()}
    token = tensors | {"x": tensors["x"][:, 0]}
    expected = (*causal_conv1d(**tensors, norm_size=3), *causal_conv1d_step(**token, norm_size=3))
    with torch.autocast("cpu", torch.bfloat16):
        got = (*causal_conv1d(**tensors, norm_size=3), *causal_conv1d_step(**token, norm_size=3))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(got, expected, strict=True))


@by_layout
def test_gradcheck(layout: str) -> None:
    tensors = {name: x[..., :4] if name in ("x", "state") else x[:4] for name, x in make(layout, 3).items()}
    options = options_of(layout) | {"activation": "silu", "norm_size": 2}
    leaves = [x.contiguous().requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *xs: causal_conv1d(**dict(zip(tensors, xs, strict=True)), **options), leaves)


X, WEIGHT = torch.ones(2, 6, D), torch.ones(D, 4)
BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "x without batch": (ValueError, {"x": X[0]}, r"x must have 3 axes of at least 1 each, got shape \[6, 12\]"),
    "x without tokens": (ValueError, {"x": X[:, :0]}, r"x must have 3 axes of at least 1 each, got shape \[2, 0, 12\]"),
    "weight of other channels": (ValueError, {"weight": WEIGHT[:5]}, r"weight must have shape \[D = 12, W >= 2\], got \[5, 4\]"),
    "weight of one channel": (ValueError, {"weight": WEIGHT[:1]}, r"weight must have shape"),
    "weight of one tap": (ValueError, {"weight": WEIGHT[:, :1]}, r"weight must have shape \[D = 12, W >= 2\], got \[12, 1\]"),
    "weight as Conv1d's": (ValueError, {"weight": WEIGHT.unsqueeze(1)}, r"weight must have shape"),
    "bias of one channel": (ValueError, {"bias": torch.ones(1)}, r"bias must have shape \[D = 12\], got \[1\]"),
    "unknown activation": (ValueError, {"activation": "gelu"}, r"activation must be 'silu' or None, got 'gelu'"),
    "norm_channels alone": (ValueError, {"norm_channels": 4}, r"norm_channels needs norm_size"),
    "groups do not divide": (ValueError, {"norm_size": 5}, r"12 of 12 channels cannot be normalised in groups of 5"),
    "groups of nothing": (ValueError, {"norm_size": 0}, r"cannot be normalised in groups of 0"),
    "too many norm_channels": (ValueError, {"norm_size": 4, "norm_channels": 16}, r"16 of 12 channels cannot be normalised"),
    "no norm_channels": (ValueError, {"norm_size": 4, "norm_channels": 0}, r"0 of 12 channels cannot be normalised"),
    "integer x": (TypeError, {"x": X.long()}, r"x must be floating, got torch.int64"),
    "integer weight": (TypeError, {"weight": WEIGHT.int()}, r"weight must be floating, got torch.int32"),
    "weight on another device": (ValueError, {"weight": WEIGHT.to("meta")}, r"weight is on meta, x on cpu"),
    "bias on another device": (ValueError, {"bias": torch.ones(D, device="meta")}, r"bias is on meta, x on cpu"),
    "state of one sequence": (ValueError, {"state": torch.zeros(1, 3, D)}, r"state must have shape \[N, W-1, D\] = \[2, 3, 12\], got \[1, 3, 12\]"),
    "state of W inputs": (ValueError, {"state": torch.zeros(2, 4, D)}, r"state must have shape"),
    "state of integers": (TypeError, {"state": torch.zeros(2, 3, D, dtype=torch.int32)}, r"state must be floating, got torch.int32"),
    "state on another device": (ValueError, {"state": torch.zeros(2, 3, D, device="meta")}, r"state is on meta, x on cpu"),
    "integer state": (TypeError, {"state": torch.zeros(2, 3, D, dtype=torch.int64)}, r"state must be floating, got torch.int64"),
    "cu_seqlens with a batch": (ValueError, {"cu_seqlens": torch.tensor([0, 6])}, r"packed sequences \(cu_seqlens\) need B = 1, got B = 2"),
    "cu_seqlens not to T": (ValueError, {"x": X[:1], "cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens must start at 0 and end at T = 6"),
    "cu_seqlens floating": (TypeError, {"x": X[:1], "cu_seqlens": torch.tensor([0.0, 6.0])}, r"cu_seqlens must be int32 or int64"),
    "unknown backend": (ValueError, {"backend": "cuda"}, r"backend must be one of auto, triton, reference"),
    "triton by name": (NotImplementedError, {"backend": "triton"}, r"backend='triton' cannot run"),
}


@pytest.mark.parametrize(("error", "changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(error: type[Exception], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(error, match=f"^causal_conv1d: .*{message}"):
        causal_conv1d(**({"x": X, "weight": WEIGHT} | changes))


def test_bad_input_of_a_step() -> None:
    state = torch.zeros(2, 3, D)
    for error, changes, message in (
        (ValueError, {"x": X}, r"causal_conv1d_step: x must have 2 axes of at least 1 each, got shape \[2, 6, 12\]"),
        (ValueError, {"state": state[:1]}, r"causal_conv1d_step: state must have shape \[N, W-1, D\] = \[2, 3, 12\]"),
        (NotImplementedError, {"backend": "triton"}, r"causal_conv1d_step: backend='triton' cannot run"),
    ):
        with pytest.raises(error, match=message):
            causal_conv1d_step(**({"x": X[:, 0], "weight": WEIGHT, "state": state} | changes))


@pytest.mark.parametrize("parts", [[], [6, 5], [0, 12], [13, -1]])
def test_parts_that_do_not_fit(parts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"causal_conv1d: parts must be positive widths with the sum D = 12, got"):
        causal_conv1d_parts(X, WEIGHT, parts=parts)


def test_every_message_is_met() -> None:
    """Each `raise` of the module has a line in the table above, or the test above."""
    met = ["causal_conv1d: parts must be positive widths with the sum D = 12, got"]
    for error, changes, _ in BAD.values():
        with pytest.raises(error) as caught:
            causal_conv1d(**({"x": X, "weight": WEIGHT} | changes))
        met.append(str(caught.value))
    source = inspect.getsource(api)
    raised = re.findall(r"raise \w+\(f\"(.*?)\"\)", source)
    assert len(raised) == source.count("raise ")
    for template in raised:
        words = max(re.split(r"\{.*?\}", template), key=len)
        assert any(words in message for message in met), template
