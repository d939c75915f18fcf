"""What the launchers would launch on an architecture, compiled for it without a GPU: the project's own launchers run on CPU tensors while Triton's
launches are intercepted. Needs Triton itself, not its interpreter (TRITON_INTERPRET unset).

`python tests/offline.py` compiles every kernel of every trial of `doctor` for every architecture.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout beside this file, installed or not

import kernels
from kernels import backend, tiles
from recipes.commands import checks, problems
from recipes.commands.checks import Trial
from recipes.commands.problems import Problem

WARP = 32


class Compilation(NamedTuple):
    """A kernel as one launch specialises it."""

    kernel: JITFunction[Any]
    architecture: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """The kernel and what it is compiled with, for messages."""
        blocks = {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}
        types = [t for t in self.signature.values() if t.startswith("*")]
        warps, stages = self.options["num_warps"], self.options["num_stages"]
        return f"{self.kernel.__name__} {types[0] if types else ''} {blocks} warps {warps} stages {stages} on {self.architecture}"

    def key(self) -> str:
        """Two launches with one key run the same machine code."""
        return repr((self.kernel.__module__, *self[1:], self.kernel.__name__))

    def compile(self) -> Any:
        """The compiled kernel; Triton keeps it in its cache on disk."""
        source_of = GluonASTSource if self.kernel.is_gluon() else ASTSource
        source = source_of(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target_of(self.architecture), options=self.options)

    def shared_memory(self) -> int:
        """Bytes of shared memory. The compiler stops where it has shared them out, in less than half of the time."""
        stages = CUDABackend.add_stages

        def stop(_: Any, metadata: dict[str, Any]) -> None:
            raise _AllocatedError(metadata["shared"])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CUDABackend, "add_stages", lambda self, found, *rest: [stages(self, found, *rest), found.update(ptx=stop)])
            try:
                return int(self.compile().metadata.shared)  # from the cache
            except _AllocatedError as found:
                return int(found.args[0])


class _AllocatedError(Exception):
    """Carries the shared memory of a kernel out of the compiler."""


def target_of(architecture: str) -> GPUTarget:
    """Triton's name for "sm_90"."""
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), WARP)


def specialise(kernel: JITFunction[Any], architecture: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Compilation:
    """What Triton would compile for a launch, by Triton's own rules."""
    triton_backend = make_backend(target_of(architecture))
    binder = create_function_from_signature(kernel.signature, kernel.params, triton_backend)
    bound, specialization, options = binder(*arguments, **keywords)
    chosen, signature, constants, attributes = kernel._pack_args(triton_backend, {**keywords, **options}, bound, specialization, options)
    return Compilation(kernel, architecture, signature, constants, attributes, dict(chosen.__dict__))


@contextmanager
def launches(architecture: str) -> Iterator[dict[str, Compilation]]:
    """Fills the mapping with every distinct launch inside the block instead of launching; tensors keep what was in their memory.

    Inside, `backend="triton"` takes CPU tensors, and tile tables see `architecture`.
    """
    found: dict[str, Compilation] = {}

    def record(kernel: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:  # noqa: ARG001
        compilation = specialise(kernel, architecture, arguments, {**keywords, "debug": False})
        found.setdefault(compilation.key(), compilation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        patch.setattr(tiles, "architecture", lambda _: architecture)
        patch.setattr(backend, "interpreted", lambda: True)
        yield found


def launch(problem: Problem, dtype: torch.dtype) -> None:
    """Runs an op, forward and backward, on its kernels; for use inside `launches`."""
    rounded = problem.to(dtype)
    checks.both_ways(rounded, problems.call(rounded, "triton"))


def tables() -> dict[str, tiles.TileTable]:
    """Every tile table of the project, by its op."""
    modules = [f"kernels.{path.parent.name}.{path.stem}" for path in sorted(Path(kernels.__file__).parent.glob("*/*.py"))]
    values = [value for module in modules for value in vars(import_module(module)).values()]
    return {value.op: value for value in values if isinstance(value, tiles.TileTable)}


def trials() -> list[Trial]:
    """Everything that `doctor` tries on a GPU, of the ops that have kernels."""
    return checks.select([op for op in checks.ops() if op in backend.TRITON_OPS])


def record(architecture: str, chosen: Iterable[Trial]) -> dict[str, Compilation]:
    """What trials launch on an architecture; those that the kernels refuse launch nothing."""
    with launches(architecture) as found:
        for trial in chosen:
            with suppress(NotImplementedError):
                launch(problem_of(trial), trial.dtype)
    return found


@cache
def problem_of(trial: Trial) -> Problem:
    return trial.problem()


def representative(found: Iterable[Compilation]) -> list[Compilation]:
    """For every kernel and tile (warps, stages and blocks) the launch of the widest numbers with the largest compile-time sizes; on Hopper and
    data-centre Blackwell, whose tensor cores take 16-bit numbers in another way, one of each width."""

    def width(compilation: Compilation) -> int:
        first = next(t for t in compilation.signature.values() if t.startswith(("*", "tensordesc<")))
        found = re.search(r"(?:bf|fp|i)(\d+)", first)
        assert found is not None, first
        return int(found.group(1))

    def sizes(compilation: Compilation) -> int:
        return prod(value for value in compilation.constants.values() if isinstance(value, int) and value > 0)

    def blocks(compilation: Compilation) -> tuple[Any, ...]:
        named = {compilation.kernel.arg_names[path[0]]: value for path, value in compilation.constants.items()}
        return tuple(named.get(name) for name in ("BK", "BV", "BLOCK"))

    groups: dict[tuple[Any, ...], Compilation] = {}
    for one in sorted(found, key=lambda one: (width(one), sizes(one))):
        apart = width(one) if one.architecture in ("sm_90", "sm_100") else 0
        groups[one.kernel.__name__, apart, one.options["num_warps"], one.options["num_stages"], blocks(one)] = one
    return list(groups.values())


def too_large(compilation: Compilation) -> str | None:
    """What is wrong with a kernel on its architecture, None if it fits."""
    shared, limit = compilation.shared_memory(), tiles.SHARED_MEMORY[compilation.architecture]
    return f"{compilation.label}: {shared:,} bytes of shared memory, {limit:,} are there" if shared > limit else None


def main() -> int:
    """Compiles every launch of every trial for every architecture, to the end; that takes an hour. Prints what does not fit."""
    wrong = 0
    for architecture in tiles.ARCHITECTURES:
        found = record(architecture, trials())
        for compilation in found.values():
            compilation.compile()
        complaints = [complaint for complaint in map(too_large, found.values()) if complaint]
        print(f"{architecture}: {len(found)} kernels, {len(complaints)} do not fit", *complaints, sep="\n  ", flush=True)
        wrong += len(complaints)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
