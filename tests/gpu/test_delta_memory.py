"""What the backward pass of the delta rule keeps alive while it runs, and that freeing the rest is never seen in a gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from delta_cases import cu_seqlens_of, make
from delta_triton_cases import case_of, kernel
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.delta import backward, scan

SIZE = 64 if ON_GPU else 32
LAUNCHES = ("state_gradients", "value_gradients", "score_gradients")
READ_BY_STATE = {"Y", "P", "Qg", "Ktail", "gamma"}
FREED = [set(), READ_BY_STATE, READ_BY_STATE | {"A", "v", "w"}]  # before each of the launches
KEPT: list[set[str]] = [set(), set(), set()]


class Watched(TorchDispatchMode):
    """Somebody who looks at every operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[set[str]]]:
    """For each launch of the backward pass, as they come: which of the tensors that the first one was given are freed before it takes memory."""
    given: dict[str, StorageWeakRef] = {}
    found: list[set[str]] = []

    def watch(name: str) -> None:
        launch: Callable[..., Any] = getattr(backward, name)

        def watched(problem: Any, kept: dict[str, Tensor], *rest: Any) -> Any:
            if name == LAUNCHES[0]:
                given.clear()
                given.update({name: StorageWeakRef(x.untyped_storage()) for name, x in (problem.inputs | kept).items()})
            if not ON_GPU:
                gc.collect()  # the interpreter leaves cycles that hold a launch's arguments
            found.append({name for name, reference in given.items() if reference.expired()})
            return launch(problem, kept, *rest)

        monkeypatch.setattr(backward, name, watched)

    for name in LAUNCHES:
        watch(name)
    gc.freeze()  # a collection looks at what comes from now on, and is quick
    yield found
    gc.unfreeze()


def problem(model: str = "gdn2") -> tuple[dict[str, Tensor], Callable[..., Tensor]]:
    """Leaves, and a loss whose arguments of the op live nowhere but in the graph."""
    leaves = make(case_of(model, SIZE, SIZE, tokens=9)).rounded(torch.float32, DEVICE).leaves
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}

    def loss(*given: Tensor) -> Tensor:
        o, final = kernel(**{name: x.clone() for name, x in zip(leaves, given, strict=True)}, cu_seqlens=cu_seqlens_of([9]).to(DEVICE))
        return o.sin().sum() + final.sin().sum()

    return leaves, loss


def gradients(loss: Tensor, leaves: dict[str, Tensor], **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(leaves.values()), **options))


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("model", ["gdn2", "gdn", "gla"])
def test_what_was_read_for_the_last_time_is_freed(model: str, freed: list[set[str]]) -> None:
    leaves, loss = problem(model)
    erase, write = "b" in leaves, "w" in leaves
    absent = (set() if erase else {"A", "Y"}) | (set() if write else {"w"})  # q stands there in their place, which is read until the end
    gradients(loss(*leaves.values()), leaves)
    assert freed == [names - absent for names in FREED]


def test_one_launch_frees_what_it_has_read_before_heads_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.freeze()  # as above
    leaves, loss = problem("mamba2")
    given: list[StorageWeakRef] = []
    alive: list[int] = []
    make_problem, sum_heads = scan.make_problem, scan.sum_heads

    def watched(*arguments: Any) -> Any:  # before a launch
        found = make_problem(*arguments)
        given.clear()
        given.extend(StorageWeakRef(x.untyped_storage()) for name, x in found.inputs.items() if name in "kvgw")
        return found

    def summed(*arguments: Any) -> Tensor:
        if not ON_GPU:
            gc.collect()
        alive.append(sum(not one.expired() for one in given))
        return sum_heads(*arguments)

    value = loss(*leaves.values())
    monkeypatch.setattr(scan, "make_problem", watched)
    monkeypatch.setattr(scan, "sum_heads", summed)
    gradients(value, leaves)
    gc.unfreeze()
    assert len(given) == 4
    assert alive == [0] * 5  # q, k, v, g, w


def test_a_retained_graph_keeps_all_of_it(freed: list[set[str]]) -> None:
    leaves, loss = problem()
    value = loss(*leaves.values())
    first = gradients(value, leaves, retain_graph=True)
    assert freed == KEPT
    assert_equal(gradients(value, leaves, retain_graph=True), first)
    assert_equal(gradients(value, leaves), first)
    assert freed == [*KEPT, *KEPT, *FREED]
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(value, leaves)


def test_what_others_hold_stays(freed: list[set[str]]) -> None:
    leaves, _ = problem()
    before = {name: x.detach().clone() for name, x in leaves.items()}
    gradients(kernel(**leaves)[0].sum(), leaves)
    assert freed == [names - {"v", "w"} for names in FREED]
    assert all(torch.equal(leaves[name], x) for name, x in before.items())


def test_two_uses_of_the_results(freed: list[set[str]]) -> None:
    leaves, loss = problem()
    one = gradients(loss(*leaves.values()), leaves)
    value = loss(*leaves.values())
    two = gradients(value + 3 * value, leaves)
    assert freed == [*FREED, *FREED]
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(4 * a, b, rtol=0, atol=float(1e-5 * b.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool, freed: list[set[str]]) -> None:
    leaves, loss = problem()
    wanted = gradients(loss(*leaves.values()), leaves)
    checkpoint(loss, *leaves.values(), use_reentrant=reentrant).backward()
    assert_equal([x.grad for x in leaves.values() if x.grad is not None], wanted)
    assert freed == [*FREED, *FREED]


@pytest.mark.parametrize("retain", [False, True])
def test_saved_elsewhere(retain: bool) -> None:
    """Hooks that put what is saved somewhere else and bring it back."""
    leaves, loss = problem()
    wanted = gradients(loss(*leaves.values()), leaves)
    with torch.autograd.graph.save_on_cpu():
        value = loss(*leaves.values())
    for _ in range(1 + retain):
        assert_equal(gradients(value, leaves, retain_graph=retain), wanted)


def test_somebody_who_looks_sees_the_op(freed: list[set[str]]) -> None:
    leaves, loss = problem()
    with Watched():
        gradients(loss(*leaves.values()), leaves)
    assert freed == KEPT


@pytest.mark.parametrize("inside", [True, False])
def test_tensors_that_only_stand_for_others(inside: bool) -> None:
    leaves, _ = problem()
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    fake = {name: mode.from_tensor(x.detach()).requires_grad_() for name, x in leaves.items()}
    with mode if inside else nullcontext():
        found = gradients(kernel(**fake)[0].sum(), fake)
    assert [x.shape for x in found] == [x.shape for x in leaves.values()]


def test_gradients_cannot_be_differentiated_silently() -> None:
    leaves, loss = problem()
    wanted = gradients(loss(*leaves.values()), leaves)
    once = gradients(loss(*leaves.values()), leaves, create_graph=True)
    assert_equal([x.detach() for x in once], wanted)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        sum(x.sum() for x in once).backward()  # type: ignore[union-attr]
