"""The convolution's output in several tensors, and its gradient out of several."""

from __future__ import annotations

import pytest
import torch
from delta_cases import TOLERANCE, assert_close, cu_seqlens_of
from gpu_cases import DEVICE
from test_conv1d_triton import cotangent, make, run
from torch import Tensor

from kernels import causal_conv1d
from kernels.conv1d.api import causal_conv1d_parts

pytestmark = pytest.mark.usefixtures("poison")

PARTS = {
    "q, k and v": (40, {"norm_size": 4, "norm_channels": 32}, [16, 16, 8]),
    "of three widths": (300, {"norm_size": 20, "norm_channels": 200}, [180, 20, 100]),
    "two": (40, {"norm_size": 4, "norm_channels": 32}, [24, 16]),
    "inside a group": (40, {"norm_size": 8, "norm_channels": 32}, [20, 20]),
    "four": (40, {"norm_size": 4, "norm_channels": 32}, [16, 8, 8, 8]),
    "without a norm": (40, {}, [16, 24]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("channels", "norm", "parts"), PARTS.values(), ids=PARTS.keys())
def test_parts_make_the_whole(channels: int, norm: dict[str, int], parts: list[int], packed: bool) -> None:
    lengths = (6, 21) if packed else (21, 21)
    tensors = make(lengths, packed=packed, dtype=torch.float32, channels=channels)
    options = {"activation": "silu", **norm, "cu_seqlens": cu_seqlens_of(lengths).to(DEVICE) if packed else None}

    def joined(backend: str, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        ys, state = causal_conv1d_parts(**leaves, **options, parts=parts, backend=backend)
        assert [y.shape[-1] for y in ys] == parts
        return torch.cat(ys, -1), state

    got, exact = run(joined, tensors, backend="triton"), {name: x.double() for name, x in tensors.items()}
    assert_close(got, run(causal_conv1d, tensors, **options, backend="triton"), 1e-6)
    assert_close(got, run(joined, exact, backend="reference"), TOLERANCE[torch.float32])


def test_parts_in_gradients_of_any_layout() -> None:
    """One part's gradient is absent, one is a slice, one is expanded."""
    tensors = {name: x.requires_grad_() for name, x in make((9, 9), packed=False, dtype=torch.float32, channels=40, state=False).items()}
    options = {"activation": "silu", "norm_size": 4, "norm_channels": 32, "parts": [16, 16, 8]}

    def gradients(backend: str) -> dict[str, Tensor]:
        (_, k, v), _ = causal_conv1d_parts(**tensors, **options, backend=backend)
        wide = cotangent(torch.cat([k, k], -1).detach(), 0)
        found = torch.autograd.grad([k, v], list(tensors.values()), [wide[..., 8:24], torch.ones_like(v[:1, :1]).expand_as(v)])
        return dict(zip(tensors, found, strict=True))

    assert_close(gradients("triton"), gradients("reference"), TOLERANCE[torch.float32])
