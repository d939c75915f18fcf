"""y = x / sqrt(mean(x^2) + eps) * weight * SiLU(gate), the last only if GATED.

Shapes: R = M * H rows of `size` channels, BS: size rounded up to a power of two; x, gate [M, H, size] with their strides;
weight [size]; y contiguous.
A program takes STEPS times BR = TILE / BS rows.
"""

import triton
import triton.language as tl


@triton.jit
def normalised(x_row, size, eps):
    """n = x / sqrt(mean(x^2) + eps) and the factor between them, of rows whose squares may be too large for float32."""
    largest = tl.maximum(tl.max(tl.abs(x_row), 1), 1.0)
    small = x_row / largest[:, None]
    rstd = tl.rsqrt(tl.sum(small * small, 1) / size + eps / largest / largest)
    return small * rstd[:, None], rstd / largest


@triton.jit(do_not_specialize=["R"])
def gated_norm_forward(
    x, gate, weight, y, R, x_M, x_H, gate_M, gate_H, size, eps,
    H: tl.constexpr, BS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE // BS
    cols = tl.arange(0, BS)
    scale = tl.load(weight + cols, mask=cols < size, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (STEPS * BR) + tl.arange(0, BR)
    for step in range(STEPS):
        rows = first + step * BR
        mask = (rows < R)[:, None] & (cols < size)[None, :]
        token, head = rows // H, rows % H
        x_row = tl.load(x + (token * x_M + head * x_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATED:
            gate_row = tl.load(gate + (token * gate_M + head * gate_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_row * x_row, 1) / size + eps)
            out = x_row * rstd[:, None] * scale[None, :] * (gate_row * tl.sigmoid(gate_row))
        else:
            n, _ = normalised(x_row, size, eps)
            out = n * scale[None, :]
        tl.store(y + rows[:, None] * size + cols[None, :], out.to(y.dtype.element_ty), mask=mask)
