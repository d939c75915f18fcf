"""The Triton kernels of the package mamba-ssm (extra `mamba`) as another backend of the recurrences of Mamba-2 (SSD) and Mamba-3 (SISO).

They take what a training or a prefill has: CUDA tensors, packed documents, states. A decode step is `kernels.delta_rule_step` with any backend.

Shapes: B batch, T tokens, N sequences, G groups, H heads (a multiple of G), K d_state, V head_dim, A angles.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mixers.errors import ConfigError, unknown

Backend = Literal["auto", "delta", "mamba_ssm"]
Resolved = Literal["delta", "mamba_ssm"]

INSTALL = (  # nothing is compiled: no nvcc is needed
    "pip install wheel && MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1 einops"
)
SSD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SISO_DTYPES = (torch.bfloat16,)  # its kernels round whatever they get to bfloat16
AUTO_DTYPES = (torch.bfloat16,)  # of the rows that a mixer's `AUTO` comes from
SSD_CHUNK, SISO_CHUNK = 256, 64  # the defaults of mamba_ssm's layers
MOST_PROGRAMS = 65_535  # of a grid's second and third axis


class Choice(NamedTuple):
    """A mixer's setting `backend` and what is known about it before there are tensors."""

    requested: Backend
    auto: Resolved  # what "auto" is where mamba_ssm can run; elsewhere it is delta
    refusal: str | None  # why mamba_ssm cannot run whatever the tensors
    dtypes: tuple[torch.dtype, ...]  # that its kernels keep

    def resolve(self, device: torch.device, dtype: torch.dtype, programs: int = 1, what: str = "sequences") -> Resolved:
        """What computes the recurrence for tensors on `device` that the input projection gave in `dtype`. `programs`: how many sequences (SISO) or
        chunks (SSD) there are.

        "auto" gives up nothing for speed: mamba_ssm's float32 is tf32, its gradients differ from run to run and compilers leave it alone. It is taken
        in the dtype that was measured, where nobody asked for the same bits and nothing compiles.

        Raises:
            ConfigError: mamba_ssm was asked for by name and cannot run there.
        """
        if self.requested == "delta" or (self.requested == "auto" and self.auto == "delta"):
            return "delta"
        if self.requested == "auto" and (dtype not in AUTO_DTYPES or torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling()):
            return "delta"
        why = self.refusal
        if device.type != "cuda":
            why = f"tensors are on {device.type}"
        elif dtype not in self.dtypes:
            legal = ", ".join(_short(known) for known in self.dtypes)
            why = f"its kernels compute in {legal} here, not {_short(dtype)} (trainer.precision bf16-mixed gives bfloat16)"
        elif programs > MOST_PROGRAMS:
            why = f"it takes {MOST_PROGRAMS:,} {what} at most, got {programs:,}"
        if why is None:
            return "mamba_ssm"
        if self.requested == "auto":
            return "delta"
        raise ConfigError(f"backend: mamba_ssm cannot run: {why}; set backend to auto or delta")


def choose(backend: str, auto: Mapping[int, Resolved], d_state: int, refusal: str | None, dtypes: tuple[torch.dtype, ...]) -> Choice:
    """The setting, checked. `auto` is a mixer's table: largest d_state of a class -> backend; `refusal` is `ssd_refusal` or `siso_refusal`.

    Raises:
        ConfigError: no such backend, or mamba_ssm was asked for by name and cannot run on this machine or with these sizes.
    """
    if backend not in get_args(Backend):
        raise unknown("backend", "backend", backend, get_args(Backend))
    refusal = None if backend == "delta" else refusal or missing()
    if backend == "mamba_ssm":
        why = refusal or (None if torch.cuda.is_available() else "it needs a CUDA GPU, and torch finds none here")
        if why:
            raise ConfigError(f"backend: mamba_ssm cannot run: {why}; set backend to auto or delta")
    wanted: Resolved = next((chosen for largest, chosen in sorted(auto.items()) if d_state <= largest), "delta")
    if backend == "mamba_ssm" or (backend == "auto" and wanted == "mamba_ssm" and not refusal):
        _leave_to_eager()
    return Choice(backend, wanted, refusal, dtypes)  # type: ignore[arg-type]


def missing() -> str | None:
    """Why the package cannot be imported; None if it can."""
    needed = (("mamba-ssm", "mamba_ssm"), ("einops", "einops"), ("triton", "triton"))
    absent = [name for name, module in needed if not _is_there(module)]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed: {INSTALL}" if absent else None


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # somebody has put another in its place, as one does to get past its `__init__`
        return True


def ssd_refusal(head_dim: int, d_state: int) -> str | None:
    """Why the SSD kernels do not take these sizes; None if they do."""
    sizes = (("head_dim", head_dim), ("d_state", d_state))
    return _first(f"its SSD kernels take a {name} of at most 256 that is a multiple of 8, not {n}" for name, n in sizes if n % 8 or n > 256)


def siso_refusal(head_dim: int, d_state: int, mimo_rank: int, num_angles: int) -> str | None:
    """Why the SISO kernels do not take these sizes; None if they do."""
    if mimo_rank > 1:
        return f"its MIMO kernels need TileLang and are not used here (mimo_rank must be 1, not {mimo_rank})"
    if num_angles % 2:
        return f"its SISO kernels take an even number of angles, not {num_angles} (int(d_state * rope_fraction) // 2)"
    sizes = (("head_dim", head_dim), ("d_state", d_state))
    return _first(f"its SISO kernels take a {name} of 16, 32, 64 or 128, not {n}" for name, n in sizes if n not in (16, 32, 64, 128))


def ssd(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(A dt_t) S_{t-1} + dt_t k_t v_t^T, o_t = S_t^T q_t, by mamba_ssm's `mamba_chunk_scan_combined`.

    Args:
        q, k: [B, T, G, K].
        v: [B, T, H, V].
        dt: [B, T, H] > 0.
        A: [H] < 0.
        state: [N, H, K, V]; None: zero, and no final state is wanted.
        cu_seqlens: as `SequenceMixer.forward`'s.

    Returns:
        o [B, T, H, V] and the final state.
    """
    found: tuple[Tensor, Tensor | None] = _eager.get("ssd", _ssd)(q, k, v, dt, A, state, cu_seqlens)
    return found


def _ssd(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if cu_seqlens is not None and state is not None:  # the kernels reset a packed state but cannot start from one: each document by itself
        spans = [slice(start, end) for start, end in pairwise(cu_seqlens.tolist())]
        parts: list[tuple[Tensor, Any]] = [_ssd(q[:, s], k[:, s], v[:, s], dt[:, s], A, state[n : n + 1], None) for n, s in enumerate(spans)]
        return torch.cat([o for o, _ in parts], 1), torch.cat([S for _, S in parts])
    document = None
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(v.shape[1], device=v.device), right=True, out_int32=True).unsqueeze(0)
    scan = kernel("ops.triton.ssd_combined", "mamba_chunk_scan_combined")
    with torch.autocast(v.device.type, enabled=False):
        before = None if state is None else state.mT.contiguous()
        found = scan(v, dt, A, k, q, SSD_CHUNK, initial_states=before, seq_idx=document, return_final_states=state is not None)
    return (found, None) if state is None else (found[0], found[1].mT)


class SisoState(NamedTuple):
    """What the SISO kernels start from and end with."""

    angle: Tensor  # [N, H, A] angles summed so far
    h: Tensor  # [N, H, K, V] the state with the last token in it, zeta_t k_t v_t^T
    k: Tensor  # [N, H, K] the last token's rotated keys
    v: Tensor  # [N, H, V] the last token's values


class SisoInputs(NamedTuple):
    """What the SISO kernels read: they add the biases, turn q and k and form the steps themselves."""

    q: Tensor  # [B, T, G, K] before bias and rotation
    k: Tensor
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H] log-decay
    delta: Tensor  # [B, T, H] step size
    trap: Tensor  # [B, T, H] logit of lambda
    theta: Tensor  # [B, T, A] before tanh
    q_bias: Tensor  # [H, K]
    k_bias: Tensor


def siso(x: SisoInputs, state: SisoState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, SisoState | None]:
    """The recurrence of Mamba-3 (mixers/mamba3.md, equations 2 to 5) for rank 1 by mamba_ssm's `mamba3_siso_combined`: o [B, T, H, V] and what is
    carried on; None: start with zeros, and nothing is wanted back."""
    found: tuple[Tensor, SisoState | None] = _eager.get("siso", _siso)(x, state, cu_seqlens)
    return found


def _siso(x: SisoInputs, state: SisoState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, SisoState | None]:
    run = kernel("ops.triton.mamba3.mamba3_siso_combined", "mamba3_siso_combined")
    angles = x.theta.unsqueeze(-2).expand(-1, -1, x.v.shape[-2], -1)
    g, delta, trap = (t.transpose(1, 2) for t in (x.g, x.delta, x.trap))
    with torch.autocast(x.v.device.type, enabled=False):
        found = run(
            Q=x.q,
            K=x.k,
            V=x.v,
            ADT=g,
            DT=delta,
            Trap=trap,
            Q_bias=x.q_bias,
            K_bias=x.k_bias,
            Angles=angles,
            Input_States=None if state is None else (state.angle, state.h.mT, state.k, state.v),
            chunk_size=SISO_CHUNK,
            return_final_states=state is not None,
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.int(),
        )
    if state is None:
        return found, None
    o, angle, h, k, v = found
    return o, SisoState(angle, h.mT, k, v)


_eager: dict[str, Callable[..., Any]] = {}  # functions that a compiler is to leave alone


def _leave_to_eager() -> None:
    """Marks them. Not when this module is imported, because it loads the compiler, and that Triton."""
    if not _eager:
        _eager.update(ssd=torch.compiler.disable(_ssd), siso=torch.compiler.disable(_siso))


def kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of the package.

    Raises:
        ConfigError: its module cannot be imported.
    """
    try:
        with _past_its_init():
            function: Callable[..., Any] = getattr(import_module(f"mamba_ssm.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"backend: mamba_ssm cannot be imported: {error}; try: {INSTALL}") from error
    return function


@contextmanager
def _past_its_init() -> Iterator[None]:
    """Imports of the package's modules do not run its `__init__`, which imports extensions that a build without nvcc does not have."""
    spec = None if "mamba_ssm" in sys.modules else find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        yield
        return
    stand_in = ModuleType("mamba_ssm")
    stand_in.__path__ = list(spec.submodule_search_locations)
    sys.modules["mamba_ssm"] = stand_in
    try:
        yield
    finally:
        del sys.modules["mamba_ssm"]  # who imports the package later gets it whole


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first(reasons: Iterator[str]) -> str | None:
    return next(reasons, None)
