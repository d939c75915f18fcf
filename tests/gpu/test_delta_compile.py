"""The delta rule's custom ops under torch's own checks, and under torch.compile: alone, and inside a mixer on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_cases import assert_same, cu_seqlens_of, make, run
from delta_triton_cases import case_of, kernel
from gpu_cases import DEVICE, ON_GPU
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels import backend
from mixers.gdn2 import GatedDeltaNet2
from recipes.commands import problems
from recipes.commands.problems import Draw, Shape

pytestmark = pytest.mark.usefixtures("_interpreter_is_known")

COMPILER = "inductor" if ON_GPU else "aot_eager"  # inductor would build C++ on a CPU
SIZE = 64 if ON_GPU else 16


@pytest.fixture
def _interpreter_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile cannot trace how Triton looks up whether it is an interpreter; on a GPU nobody asks."""
    if not ON_GPU:
        monkeypatch.setattr(backend, "interpreted", lambda: True)


class CustomOps(TorchDispatchMode):
    """Records the calls of this project's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lightning_mixers":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("poison")  # what an op returns and never writes is NaN, which equals nothing
@pytest.mark.parametrize(("model", "layout"), [("gdn2", "packed"), ("gdn", "dense"), ("mamba2", "dense"), ("linear_attention", "packed")])
def test_opcheck(model: str, layout: str) -> None:
    """Schema, fake implementation, autograd registration and tracing with dynamic shapes, of the forward op and of the ops behind it."""
    documents = (65, 1)  # as many chunks as there can be: what a spare one holds is never written
    case = case_of(model, SIZE, SIZE, layout=layout, documents=documents, tokens=66, decay="mild", state=layout == "dense")
    with CustomOps() as recorded:
        run(kernel, make(case).rounded(torch.float32, DEVICE))
    assert len(recorded.calls) == 2
    for n, (op, args, kwargs) in enumerate(recorded.calls):
        forward = n == 0  # the op that gradients are asked of
        leaves = tree_map_only(Tensor, lambda x, forward=forward: x.detach().clone().requires_grad_(forward and x.is_floating_point()), args)
        torch.library.opcheck(op, leaves, kwargs)


def ranked(tokens: int, packed: bool) -> dict[str, Tensor]:
    """Arguments with three ranks, which are filled up to four, and a weight of a token's own."""
    arguments = dict(problems.ranked_delta_rule(Shape(1, tokens, 1, SIZE, SIZE, 2), Draw(), ranks=3).to(torch.float32, DEVICE).leaves)
    if packed:
        arguments |= {"cu_seqlens": cu_seqlens_of([tokens - 1, 1]).to(DEVICE), "state": arguments["state"].repeat(2, 1, 1, 1)}
    return arguments


def gradients_of(call: Any, arguments: dict[str, Tensor]) -> list[Tensor]:
    """Results, and gradients of everything that has one."""
    leaves = {name: x.detach().requires_grad_() for name, x in arguments.items() if x.is_floating_point()}
    o, final = call(**{**arguments, **leaves})
    return [o.detach(), final.detach(), *torch.autograd.grad(o.square().sum() + final.square().sum(), list(leaves.values()))]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_opcheck_of_both_passes_with_ranks(packed: bool) -> None:
    with CustomOps() as recorded:
        gradients_of(kernel, ranked(34, packed))  # as many chunks as there can be
    assert [str(op).split(".")[1] for op, *_ in recorded.calls] == ["delta_rule", "delta_rule_backward"]
    for op, args, kwargs in recorded.calls:
        torch.library.opcheck(op, tree_map_only(Tensor, lambda x: x.detach().clone(), args), kwargs)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_ranks_compile_once_for_every_length(packed: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernel, fullgraph=True, backend=counter)
    for tokens in (34, 40, 23, 50):
        arguments = ranked(tokens, packed)
        for got, wanted in zip(gradients_of(compiled, arguments), gradients_of(kernel, arguments), strict=True):
            assert torch.equal(got, wanted)
    assert counter.frame_count <= 2


def test_compiled_alone() -> None:
    inputs = make(case_of("gdn2", SIZE, SIZE, layout="packed", documents=(2, 7), tokens=9)).rounded(torch.float32, DEVICE)
    torch._dynamo.reset()
    assert_same(run(torch.compile(kernel, fullgraph=True, backend=COMPILER), inputs), run(kernel, inputs))


def test_one_recompilation_for_each_axis_made_dynamic() -> None:
    """A second length makes the axis dynamic; a third one compiles nothing. The same for the number of documents, and for the batch."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kernel, fullgraph=True, backend=counter)

    def compilations_of(lengths: list[list[int]], batches: list[int]) -> int:
        before = counter.frame_count
        for documents in lengths:
            case = case_of("gdn", SIZE, SIZE, layout="packed", documents=tuple(documents), tokens=sum(documents))
            run(compiled, make(case).rounded(torch.float32, DEVICE))
        for batch in batches:
            run(compiled, make(case_of("gdn", SIZE, SIZE, tokens=5, batch=batch)).rounded(torch.float32, DEVICE))
        return counter.frame_count - before

    assert compilations_of([[2, 7]], []) == 1
    assert compilations_of([[3, 8], [5, 9], [2, 2]], []) <= 1  # tokens
    assert compilations_of([[3, 8, 4], [1, 5, 9, 2], [2, 2, 2, 2, 2]], []) <= 1  # documents
    assert compilations_of([], [2]) == 1  # without cu_seqlens: another program
    assert compilations_of([], [3, 4, 5]) <= 1  # batch


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_whole_mixer_compiles_without_a_graph_break(packed: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    mixer = GatedDeltaNet2(128, num_heads=2, head_dim=64).to(DEVICE)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(mixer, fullgraph=True, backend=counter)
    for tokens in (100, 140, 200, 333):
        x = torch.randn(1, tokens, 128, device=DEVICE, requires_grad=True)
        cu_seqlens = cu_seqlens_of([30, tokens - 30]).to(DEVICE) if packed else None

        def results(module: Any, x: Tensor = x, cu_seqlens: Tensor | None = cu_seqlens) -> list[Tensor]:
            y, _ = module(x, cu_seqlens=cu_seqlens)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]

        for got, wanted in zip(results(compiled), results(mixer), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=float(1e-4 * wanted.abs().max()))
    assert counter.frame_count <= 2
