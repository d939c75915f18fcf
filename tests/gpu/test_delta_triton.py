"""The delta rule on Triton: agreement with float64, causality and repeatability to the bit, and what callers rely on.

The same tests run on a GPU and, with few small cases, in the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from delta_cases import Case, Inputs, assert_same, cu_seqlens_of, errors, make, random_cotangent, run
from delta_triton_cases import LOW, TOLERANCE, Variant, case_of, check, expected, kernel, variants
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor

from kernels import delta_rule
from kernels.delta.reference import recurrent

pytestmark = pytest.mark.usefixtures("poison")

SIZE = 64 if ON_GPU else 16
MANY = 10  # cases of a variant: tens of seconds
DTYPES = (torch.float32, LOW)
MODELS = ("gdn2", "kda", "gdn", "deltanet", "gla", "mamba2") if ON_GPU else ("gdn2", "gdn", "gla", "mamba2")
FULL = case_of("gdn2", SIZE, SIZE, groups=2 if ON_GPU else 1)
SCANNED = case_of("mamba2", SIZE, SIZE, groups=2)  # by the launches of scan.py
by_path = pytest.mark.parametrize("case", [FULL, SCANNED], ids=["stages", "scan"])
by_model = pytest.mark.parametrize("model", MODELS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES if ON_GPU else DTYPES[:1], ids=str)


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.long] * (len(v.cases) > MANY)) for v in variants()], ids=str)
def test_agrees_with_float64(variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> None:
    check(variant, tmp_path_factory.getbasetemp().parent)  # a folder that all test processes share


# --- to the bit ---


def perturbed_after(inputs: Inputs, case: Case, position: int) -> Inputs:
    """Other inputs from `position` on: values a hundred and queries a thousand times as large, and decays of -1000."""
    other = make(case._replace(decay="-1000"), seed=1)
    leaves = {name: leaf.clone() for name, leaf in inputs.leaves.items()}
    for name in leaves.keys() - {"state"}:
        leaves[name][:, position:] = other.leaves[name][:, position:].to(leaves[name]) * {"v": 100, "q": 1000}.get(name, 1)
    return inputs._replace(leaves=leaves)


def run_before(inputs: Inputs, position: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of a loss on the tokens before `position`: those before it, and the gradients from it on."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
    o, _ = kernel(**inputs._replace(leaves=leaves).arguments())
    before = o[:, :position]
    gradients = torch.autograd.grad(before, list(leaves.values()), random_cotangent(before, 0))
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    past = {"o": before.detach()} | {name: x if name == "dstate" else x[:, :position] for name, x in named.items()}
    return past, {name: x[:, position:] for name, x in named.items() if name != "dstate"}


@by_dtype
@by_model
def test_causality(model: str, dtype: torch.dtype) -> None:
    """The past's outputs and gradients do not depend on what follows: not on values, not on decays of -1000."""
    case = case_of(model, SIZE, SIZE, tokens=200 if ON_GPU else 100, groups=FULL.groups)
    inputs = make(case).rounded(dtype, DEVICE)
    for position in (1, 15, 16, 17, 31, 32, 63, 64, 65, 128, 150) if ON_GPU else (1, 16, 64, 77):
        expected_past, _ = run_before(inputs, position)
        past, later = run_before(perturbed_after(inputs, case, position), position)
        assert_same(past, expected_past)
        assert_same(later, {name: torch.zeros_like(x) for name, x in later.items()})


@by_dtype
@by_model
def test_documents_do_not_see_each_other(model: str, dtype: torch.dtype) -> None:
    lengths = (70, 3, 64, 1, 62) if ON_GPU else (66, 3, 1)
    case = case_of(model, SIZE, SIZE, layout="packed", documents=lengths, tokens=sum(lengths), groups=FULL.groups)
    inputs = make(case).rounded(dtype, DEVICE)
    changed = inputs._replace(leaves={name: x.clone() for name, x in inputs.leaves.items()})
    start, end = lengths[0], lengths[0] + lengths[1]
    for name, x in changed.leaves.items():
        part = x[1] if name == "state" else x[:, start:end]
        part.copy_(torch.full_like(part, -1000.0) if name == "g" else 5 * part)
    before, after = run(kernel, inputs), run(kernel, changed)
    for name in before:
        by_document = name in ("final", "dstate")
        others = [n for n in range(len(lengths)) if n != 1] if by_document else [*range(start), *range(end, sum(lengths))]
        rest, axis = torch.tensor(others, device=DEVICE), 0 if by_document else 1
        assert torch.equal(before[name].index_select(axis, rest), after[name].index_select(axis, rest)), name


@by_path
@by_dtype
def test_two_runs_are_bitwise_equal(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case._replace(layout="packed", tokens=1000 if ON_GPU else 75)).rounded(dtype, DEVICE)
    first = run(kernel, inputs)
    for _ in range(3 if ON_GPU else 1):
        assert_same(run(kernel, inputs), first)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "batch"), [(1, 1), (32, 1), (16, 8)])
@pytest.mark.parametrize("model", ["gdn2", "gdn", "mamba2"])
def test_tuned_sizes_are_causal_and_repeat_to_the_bit(model: str, heads: int, batch: int) -> None:
    """Head sizes and dtype of the benchmarks: tiles of their own, which depend on how many programs there are."""
    size = 64 if model == "mamba2" else 128
    case = case_of(model, size, size, tokens=200, heads=heads, batch=batch)
    inputs = make(case).rounded(LOW, DEVICE)
    first = run(kernel, inputs)
    assert_same(run(kernel, inputs), first)
    small = scaled(inputs, torch.tensor(2.0**-12, device=DEVICE))
    for start, position in product((inputs, small), (1, 64, 77, 150)):
        past, later = run_before(perturbed_after(start, case, position), position)
        assert_same(past, run_before(start, position)[0])
        assert_same(later, {name: torch.zeros_like(x) for name, x in later.items()})


def scaled(inputs: Inputs, by: Tensor) -> Inputs:
    """The same with queries and keys times a number, or one a token."""
    leaves = {name: leaf * by.to(leaf).view(-1, 1, 1) if name in ("q", "k") else leaf for name, leaf in inputs.leaves.items()}
    return inputs._replace(leaves=leaves)


@by_dtype
@by_model
def test_queries_and_keys_of_many_sizes(model: str, dtype: torch.dtype) -> None:
    """Side by side in a chunk, from 1 down to 2^-20: none costs another its digits."""
    inputs = make(case_of(model, SIZE, SIZE, tokens=130 if ON_GPU else 70, groups=FULL.groups)).rounded(dtype, DEVICE)
    tokens = inputs.leaves["q"].shape[1]
    inputs = scaled(inputs, 2.0 ** -(torch.arange(tokens, device=DEVICE) * 7 % 21))
    found = errors(run(kernel, inputs), expected(inputs))
    assert max(found.values()) <= TOLERANCE[dtype], found


def test_either_integer_type_of_cu_seqlens() -> None:
    inputs = make(FULL._replace(layout="packed", documents=(3, 5), tokens=8)).rounded(torch.float32, DEVICE)
    first = run(kernel, inputs)
    assert inputs.options["cu_seqlens"].dtype == torch.int32
    assert_same(run(kernel, inputs._replace(options=inputs.options | {"cu_seqlens": inputs.options["cu_seqlens"].long()})), first)


# --- what the caller's tensors and context may not change ---


@by_dtype
@by_path
def test_without_gradients(case: Case, dtype: torch.dtype) -> None:
    """Nothing is kept then: kernels of their own. With few programs in the serial passes and with many."""
    for heads in (1, 36) if ON_GPU else (1,):
        inputs = make(case._replace(tokens=70, heads=heads)).rounded(dtype, DEVICE)
        with torch.no_grad():
            o, final = kernel(**inputs.arguments())
        wanted = {name: x for name, x in expected(inputs).items() if name in ("o", "final")}
        found = errors({"o": o, "final": final}, wanted)
        assert max(found.values()) <= TOLERANCE[dtype], found


@by_path
@pytest.mark.parametrize("used", ["o", "final"])
def test_a_loss_on_one_of_the_results(case: Case, used: str) -> None:
    """Gradients of the outputs alone and of the final state alone."""
    inputs = make(case._replace(tokens=70)).rounded(torch.float32, DEVICE)

    def gradients(function: Any, inputs: Inputs) -> dict[str, Tensor]:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in inputs.leaves.items()}
        result = function(**inputs._replace(leaves=leaves).arguments())[("o", "final").index(used)]
        found = torch.autograd.grad(result, list(leaves.values()), random_cotangent(result, 0), materialize_grads=True)
        return dict(zip(leaves, found, strict=True))

    wanted = gradients(lambda **x: delta_rule(**x, backend="reference"), inputs.to(torch.float64))
    found = errors(gradients(kernel, inputs), wanted)
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("name", ["v", "g", "state"])
def test_a_gradient_of_one_of_the_arguments(name: str) -> None:
    """The same bits as when all gradients are asked for, and no other tensor gets one."""
    inputs = make(FULL._replace(tokens=70)).rounded(torch.float32, DEVICE)
    everything = run(kernel, inputs)
    leaves = dict(inputs.leaves) | {name: inputs.leaves[name].clone().requires_grad_()}
    results = kernel(**inputs._replace(leaves=leaves).arguments())
    torch.autograd.backward(results, [random_cotangent(x, seed) for seed, x in enumerate(results)])
    assert torch.equal(leaves[name].grad, everything[f"d{name}"])
    assert all(leaf.grad is None for other, leaf in leaves.items() if other != name)


def test_autocast_changes_nothing() -> None:
    arguments = make(FULL._replace(tokens=9)).rounded(torch.float32, DEVICE).arguments()
    plain = kernel(**arguments)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = kernel(**arguments)
    for got, wanted in zip(inside, plain, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_inputs_are_not_modified() -> None:
    inputs = make(FULL._replace(tokens=9)).rounded(torch.float32, DEVICE)
    arguments = inputs.arguments()
    copies = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    run(kernel, inputs)
    o, final = kernel(**arguments)
    assert_same({name: arguments[name] for name in copies}, copies)
    storages = {x.untyped_storage().data_ptr() for x in copies.values()} | {arguments[name].untyped_storage().data_ptr() for name in copies}
    assert not storages & {o.untyped_storage().data_ptr(), final.untyped_storage().data_ptr()}


def test_refusals() -> None:
    """What the kernels cannot take: an error where they were asked for by name, the reference otherwise."""
    wide = torch.rand(1, 2, 1, 257, device=DEVICE)
    double = torch.rand(1, 2, 1, 8, device=DEVICE, dtype=torch.float64)
    for x in (double, wide):
        with pytest.raises(NotImplementedError, match="delta_rule: backend='triton' cannot run"):
            kernel(x, x, x)
        assert torch.equal(delta_rule(x, x, x)[0], delta_rule(x, x, x, backend="reference")[0])


def test_one_token_in_one_document() -> None:
    """All counts are 1, which Triton would otherwise compile for."""
    x = torch.rand(1, 1, 1, SIZE, device=DEVICE)
    o, final = kernel(x, x, x, scale=1.0, cu_seqlens=cu_seqlens_of([1]).to(DEVICE))
    wanted, wanted_final = delta_rule(x.double(), x.double(), x.double(), scale=1.0, backend="reference")
    found = errors({"o": o, "final": final}, {"o": wanted, "final": wanted_final})
    assert max(found.values()) <= TOLERANCE[torch.float32], found


def test_one_token_a_sequence_in_slices_of_a_wide_tensor() -> None:
    """A batch of single tokens whose rows lie far apart: their distance is the batch's stride, not the width of a row."""
    wide = torch.randn(3, 1, 6, 2, 16, device=DEVICE)
    wide[:, :, 3].abs_().neg_()
    leaves = {name: wide[:, :, i] for i, name in enumerate(("q", "k", "v", "g", "b", "w"))}
    assert leaves["q"].stride(0) > leaves["q"][0].numel()
    got = delta_rule(**leaves, backend="triton")
    expected_ = recurrent(**{name: x.double() for name, x in leaves.items()})
    for x, y in zip(got, expected_, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [0, 1])  # of what stands beside them in a row of memory: an offset alone, and rows at odd distances
def test_rows_at_odd_places(width: int) -> None:
    """Views whose rows do not begin at multiples of 16 bytes, or not even of four, as in a fused projection of odd width; incoming gradients too."""
    inputs = make(case_of("gdn2", *((128, 128) if ON_GPU else (16, 16)), tokens=70, state=False)).rounded(LOW, DEVICE)

    def placed(x: Tensor) -> Tensor:
        batch, tokens, heads, channels = x.shape
        row = heads * channels + width
        return x.new_zeros(batch * tokens * row + 1)[1:].view(batch, tokens, row)[..., : heads * channels].unflatten(-1, (heads, channels)).copy_(x)

    def results(place: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [place(x).requires_grad_() for x in inputs.leaves.values()]
        o, _ = delta_rule(**dict(zip(inputs.leaves, leaves, strict=True)), backend="triton")
        return [o, *torch.autograd.grad(o, leaves, place(torch.ones_like(o)))]

    for got, wanted in zip(results(placed), results(lambda x: x.clone()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("only", [0, 1])
def test_gradients_of_one_output_alone(only: int) -> None:
    """The other output has no gradient: it counts as zero."""
    leaves = make(case_of("gdn2", 16, 16, tokens=5)).rounded(torch.float32, DEVICE).leaves
    both = []
    for function, dtype in ((partial(delta_rule, backend="triton"), torch.float32), (recurrent, torch.float64)):
        cast = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
        gradients = torch.autograd.grad(function(**cast)[only].sin().sum(), list(cast.values()), allow_unused=True)
        both.append([torch.zeros_like(x) if d is None else d for x, d in zip(cast.values(), gradients, strict=True)])
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["gdn2", "mamba2"])
def test_a_gate_that_is_not_a_number_shows(model: str) -> None:
    leaves = make(case_of(model, 16, 16, tokens=5)).rounded(torch.float32, DEVICE).leaves
    g = leaves["g"].clone()
    g[:, 2] = float("nan")
    o, *_ = torch.ops.lightning_mixers.delta_rule(*(leaves[n] for n in "qkv"), g, leaves.get("b"), leaves["w"], None, 1.0, None, None, 1, False)
    assert o[:, 2:].isnan().all()
    if model == "mamba2":  # a decay per channel lets it into the other rows of its chunk
        assert o[:, :2].isfinite().all()


@pytest.mark.parametrize("model", ["gdn2", "mamba2"])
def test_gradients_that_come_in_another_layout(model: str) -> None:
    """Transposed outputs have transposed gradients, whose memory is not in the order of their axes."""
    leaves = make(case_of(model, 16, 32, tokens=5, batch=2)).rounded(torch.float32, DEVICE).leaves
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    both = []
    for function in (partial(delta_rule, backend="triton"), recurrent):
        o, final = function(**leaves)
        weights = [torch.linspace(-1, 1, x.numel(), device=DEVICE).view_as(x.transpose(-1, 1)) for x in (o, final)]
        loss = (o.transpose(-1, 1) * weights[0]).sum() + (final.transpose(-1, 1) * weights[1]).sum()
        both.append(torch.autograd.grad(loss, list(leaves.values())))
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
