"""The contract of `mixers.base`, as tests. They run over every registered mixer and over stacks of them, or over one's own:

    pytest --pyargs mixers.testing --mixer my_pkg.MyMixer [--mixer-settings '{"num_heads": 2}'] [--mixer-d-model 64]

Bitwise where the contract says bitwise; else errors are measured as max|a - b| / max|b|, against 1e-10 in float64 and 2e-4 in float32 (a recurrence
over 72 tokens at random weights; the bound leaves a margin over what the built-in mixers need).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mixers import registry
from mixers.contract import TOKENS, TOLERANCE, Case, Mixer, Stack, assert_close, assert_same, assert_states_close, cases, error, inputs, run
from mixers.init import initialize


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(metafunc.config), ids=lambda case: case.label)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("first_changed", [1, 16, 64, 71])
def test_causality(case: Case, dtype: torch.dtype, first_changed: int) -> None:
    """Future tokens change nothing before them: outputs and gradients bitwise equal."""
    mixer, x, weights = case.build(dtype), inputs(2, TOKENS, case.d_model, dtype=dtype), inputs(2, TOKENS, case.d_model, dtype=dtype, seed=2)
    weights[:, first_changed:] = 0
    changed = x.clone()
    changed[:, first_changed:] = 30 * inputs(2, TOKENS - first_changed, case.d_model, dtype=dtype, seed=3)
    y, gradients = run(mixer, x, weights)
    y_changed, gradients_changed = run(mixer, changed, weights)
    assert torch.equal(y[:, :first_changed], y_changed[:, :first_changed]), "an output depends on a later token"
    assert not torch.equal(y[:, first_changed:], y_changed[:, first_changed:]), "outputs do not depend on their own token"
    for g in (gradients, gradients_changed):
        assert not g["input"][:, first_changed:].any(), "an earlier output has a gradient to a later token"
    assert_same(gradients, gradients_changed, "future tokens perturbed")


def test_eval_gradients_equal_train_gradients_and_runs_repeat(case: Case, dtype: torch.dtype) -> None:
    mixer, x, weights = case.build(dtype), inputs(2, TOKENS, case.d_model, dtype=dtype), inputs(2, TOKENS, case.d_model, dtype=dtype, seed=2)
    y, gradients = run(mixer.train(), x, weights)
    assert gradients.keys() == {"input", *(name for name, _ in mixer.named_parameters())}, "a parameter takes no part in the output"
    for other in (mixer.train(), mixer.eval()):
        y_again, again = run(other, x, weights)
        assert torch.equal(y, y_again)
        assert_same(gradients, again, "eval against train" if not other.training else "a second run")


@pytest.mark.parametrize("parts", [[72], [1, 71], [71, 1], [7, -20, 45], [-72], [2, 2, -3, 1, 62, -2]], ids=str)
def test_any_split_equals_one_forward(case: Case, dtype: torch.dtype, parts: list[int]) -> None:
    """Positive parts are forwards of that many tokens, negative ones that many steps."""
    mixer, x = case.build(dtype), inputs(2, TOKENS, case.d_model, dtype=dtype)
    whole, none = mixer(x)
    assert none is None, "no state was given, none may come back"
    _, expected = mixer(x, mixer.init_state(2, max_tokens=TOKENS))
    state, outputs, start = mixer.init_state(2, max_tokens=TOKENS), [], 0
    for part in parts:
        before, kept = state, [t.clone() for t in state]
        if part > 0:
            y, state = mixer(x[:, start : start + part], state)
            outputs.append(y)
        for t in range(start, start - part):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y.unsqueeze(1))
        start += abs(part)
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "the state that was passed in was changed"
        assert [(t.dtype, t.shape) for t in state] == [(t.dtype, t.shape) for t in before], "the state changed its dtypes or shapes"
    assert_close(torch.cat(outputs, 1), whole, "outputs")
    assert_states_close(state, expected)


DOCUMENTS = [1, 2, 3, 70, 1, 16]


def packed(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_packed_equals_separate(case: Case, dtype: torch.dtype) -> None:
    """Outputs and gradients; documents of 1 to 3 tokens included."""
    mixer, total = case.build(dtype), sum(DOCUMENTS)
    x, weights = inputs(1, total, case.d_model, dtype=dtype), inputs(1, total, case.d_model, dtype=dtype, seed=2)
    y, gradients = run(mixer, x, weights, cu_seqlens=packed(DOCUMENTS))
    alone = [run(mixer, a, b) for a, b in zip(x.split(DOCUMENTS, 1), weights.split(DOCUMENTS, 1), strict=True)]
    assert_close(y, torch.cat([o for o, _ in alone], 1), "outputs")
    assert_close(gradients["input"], torch.cat([g["input"] for _, g in alone], 1), "gradient of the input")
    # a gradient that is zero in exact arithmetic (the keys of a window of one token) is measured against the others
    floor = 1e-3 * max(float(g.abs().max()) for g in gradients.values())
    for name in gradients.keys() - {"input"}:
        summed = torch.stack([g.get(name, torch.zeros_like(gradients[name])) for _, g in alone]).sum(0)
        assert_close(gradients[name], summed, f"gradient of {name}", floor)


def test_ragged_prompts(case: Case, dtype: torch.dtype) -> None:
    """One packed forward with N states, then batched steps, equals each sequence alone."""
    mixer, n, steps = case.build(dtype), len(DOCUMENTS), 4
    x, later = inputs(1, sum(DOCUMENTS), case.d_model, dtype=dtype), inputs(n, steps, case.d_model, dtype=dtype, seed=3)
    room = max(DOCUMENTS) + steps
    y, state = mixer(x, mixer.init_state(n, max_tokens=room), cu_seqlens=packed(DOCUMENTS))
    outputs = []
    for t in range(steps):
        o, state = mixer.step(later[:, t], state)
        outputs.append(o)
    for i, prompt in enumerate(x.split(DOCUMENTS, 1)):
        alone, after = mixer(torch.cat([prompt, later[i : i + 1]], 1), mixer.init_state(1, max_tokens=room))
        assert_close(y.split(DOCUMENTS, 1)[i], alone[:, :-steps], f"prompt {i}")
        assert_close(torch.stack([o[i] for o in outputs]), alone[0, -steps:], f"steps behind prompt {i}")
        assert_states_close(tuple(t[i : i + 1] for t in state), after)


def test_batch_size_changes_nothing(case: Case, dtype: torch.dtype) -> None:
    mixer, x = case.build(dtype), inputs(5, TOKENS, case.d_model, dtype=dtype)
    together, _ = mixer(x)
    for i in range(5):
        assert_close(together[i : i + 1], mixer(x[i : i + 1])[0], f"row {i}")


def test_one_token(case: Case, dtype: torch.dtype) -> None:
    mixer, x = case.build(dtype), inputs(3, 1, case.d_model, dtype=dtype)
    y, after = mixer(x, mixer.init_state(3, max_tokens=1))
    o, stepped = mixer.step(x[:, 0], mixer.init_state(3, max_tokens=1))
    assert_close(mixer(x)[0], y, "without a state")
    assert_close(o.unsqueeze(1), y, "step")
    assert_states_close(stepped, after)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_declared_fp32_parameters_stay(case: Case, low: torch.dtype) -> None:
    """Under every way a module is cast down their values are unchanged; `.double()` makes them float64."""
    reference = case.build(torch.float32)
    fp32 = reference.parameter_groups().fp32
    values = {name: p.detach().clone() for name, p in reference.named_parameters()}
    assert fp32 <= values.keys()
    casts: dict[str, Callable[[Mixer], Mixer]] = {
        ".to": lambda m: m.to(low),
        ".bfloat16/.half": lambda m: m.bfloat16() if low == torch.bfloat16 else m.half(),
    }
    for what, cast in casts.items():
        for name, p in cast(copy.deepcopy(reference)).named_parameters():
            assert p.dtype == (torch.float32 if name in fp32 else low), f"{name} is {p.dtype} after {what}"
            assert name not in fp32 or torch.equal(p, values[name]), f"{name} changed its value under {what}"
    assert all(p.dtype == torch.float64 for p in copy.deepcopy(reference).double().parameters())
    default = torch.get_default_dtype()
    torch.set_default_dtype(low)  # as Lightning's bf16-true does while it builds a model
    try:
        built = [registry.build(name, case.d_model, case.settings) for name in case.names]
    finally:
        torch.set_default_dtype(default)
    for mixer in built:
        names = mixer.parameter_groups().fp32
        assert all(p.dtype == torch.float32 for name, p in mixer.named_parameters() if name in names)


def test_low_precision_runs_and_keeps_state_dtypes(case: Case) -> None:
    """bf16: finite, in bf16, near float32; what the state accumulates stays float32."""
    mixer, x = case.build(torch.float32), inputs(2, TOKENS, case.d_model, dtype=torch.float32)
    expected, _ = mixer(x)
    mixer = mixer.bfloat16()
    state = mixer.init_state(2, max_tokens=TOKENS)
    y, after = mixer(x.bfloat16(), state)
    assert y.dtype == torch.bfloat16
    assert error(y, expected) < 0.2
    assert [t.dtype for t in after] == [t.dtype for t in state]
    o, after = mixer.step(x[:, 0].bfloat16(), state)
    assert o.dtype == torch.bfloat16
    assert [t.dtype for t in after] == [t.dtype for t in state]


@pytest.mark.parametrize("tokens", [1, 3, 72])
def test_state_numel(case: Case, tokens: int) -> None:
    state = case.build().init_state(1, max_tokens=tokens)
    assert case.build().state_numel(tokens) == sum(t.numel() for t in state if t.is_floating_point())


def test_flops(case: Case) -> None:
    """The projections as torch counts them, plus a count for the mixing: linear to quadratic in the tokens, and of the state's size per token."""
    mixer = case.build()
    linear = {name for name, module in mixer.named_modules() if isinstance(module, nn.Linear)}
    mixing = {}
    for tokens in (8, 16):
        with FlopCounterMode(display=False) as counter:
            mixer(inputs(1, tokens, case.d_model, dtype=torch.float64))
        root = type(mixer).__name__
        counts = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        mixing[tokens] = mixer.flops(tokens) - sum(count for name, count in counts.items() if name in linear)
    assert 0 <= 2 * mixing[8] <= mixing[16] <= 4 * mixing[8]
    assert mixing[16] <= 100 * 16 * (mixer.state_numel(16) + case.d_model), "more than 100 operations per token and number of the state"


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e4])
def test_gradients_are_finite_at_extremes(case: Case, dtype: torch.dtype, size: float) -> None:
    """Inputs of zero and inputs that drive every gate to its end."""
    mixer, x = case.build(dtype), size * inputs(2, TOKENS, case.d_model, dtype=dtype)
    y, gradients = run(mixer, x, inputs(2, TOKENS, case.d_model, dtype=dtype, seed=2))
    assert y.isfinite().all()
    for name, g in gradients.items():
        assert g.isfinite().all(), f"gradient of {name}"


def test_initial_values_are_a_function_of_seed_and_name(case: Case) -> None:
    first = case.build(torch.float32)
    with torch.device("meta"):
        parts = [registry.build(name, case.d_model, case.settings) for name in case.names]
        later = parts[0] if len(parts) == 1 else Stack(parts)
    later = later.to_empty(device="cpu")
    initialize(later, 0)
    initialize(plain := copy.deepcopy(first), 0)
    for (name, a), (_, b) in zip(plain.named_parameters(), later.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    initialize(later, 1)
    changed = [name for (name, a), (_, b) in zip(plain.named_parameters(), later.named_parameters(), strict=True) if not torch.equal(a, b)]
    assert changed, "another seed gives the same values"


def test_parameter_groups_name_parameters(case: Case) -> None:
    mixer = case.build()
    names = {name for name, _ in mixer.named_parameters()}
    groups = mixer.parameter_groups()
    assert groups.no_decay <= names
    assert groups.fp32 <= names


def test_bad_input_raises(case: Case) -> None:
    mixer, x = case.build(), inputs(2, 6, case.d_model, dtype=torch.float64)
    bad: list[Callable[[], object]] = [
        lambda: mixer(x[..., :-1]),
        lambda: mixer(x[0]),
        lambda: mixer(x[:, :0]),
        lambda: mixer(x, cu_seqlens=torch.tensor([0, 6])),
        lambda: mixer(x[:1], cu_seqlens=torch.tensor([0, 3, 3, 6])),
        lambda: mixer(x[:1], cu_seqlens=torch.tensor([0, 5])),
        lambda: mixer(x, mixer.init_state(3, max_tokens=6)),
        lambda: mixer(x[:1], mixer.init_state(1, max_tokens=6), cu_seqlens=torch.tensor([0, 3, 6])),
        lambda: mixer.step(x[:, 0], mixer.init_state(3, max_tokens=6)),
    ]
    for call in bad:
        with pytest.raises(ValueError, match=r"\w"):
            call()


def test_second_derivatives_are_right_or_refused(case: Case) -> None:
    """Also by `torch.autograd.grad`, which passes over what `once_differentiable` raises: the change of a gradient along a direction."""
    mixer, x = case.build(), inputs(1, 20, case.d_model, dtype=torch.float64).requires_grad_()
    weights, along = inputs(1, 20, case.d_model, dtype=torch.float64, seed=2), inputs(1, 20, case.d_model, dtype=torch.float64, seed=3)
    parameters = [p for p in mixer.parameters() if p.ndim > 1]

    def slope(x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad((mixer(x)[0] * weights).sum(), x, create_graph=True)
        return (g * along).sum()

    first = slope(x)
    try:
        found = torch.autograd.grad(first, [x, *parameters], allow_unused=True)
    except RuntimeError as error:
        if any(word in str(error) for word in ("autograd formula", "differentiate", "derivative")):
            return  # refused
        raise
    h, directions = 1e-6, [inputs(*t.shape, dtype=torch.float64, seed=4) for t in (x, *parameters)]
    exact = sum(((g * d).sum() for g, d in zip(found, directions, strict=True) if g is not None), torch.zeros(()))

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for p, d in zip(parameters, directions[1:], strict=True):
                p.add_(d, alpha=by)
        value = slope((x + by * directions[0]).detach().requires_grad_()).detach()
        with torch.no_grad():
            for p, d in zip(parameters, directions[1:], strict=True):
                p.sub_(d, alpha=by)
        return value

    measured = (moved(h) - moved(-h)) / (2 * h)
    assert abs(float(exact - measured)) <= 1e-5 * max(abs(float(measured)), 1e-3), (float(exact), float(measured))


def test_caches_keep_their_dtype(case: Case) -> None:
    """What `init_state` was asked for, through forwards and steps of another dtype."""
    mixer, x = case.build(torch.float32), inputs(2, 9, case.d_model, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        before = mixer.init_state(2, max_tokens=12, dtype=dtype)
        _, after = mixer(x, before)
        _, after_step = mixer.step(x[:, 0], after)
        assert [t.dtype for t in after] == [t.dtype for t in after_step] == [t.dtype for t in before]
