"""Gradients of x and gate, and the sums over a program's rows that the weight's gradient is made of. With n = x r, r = 1 / sqrt(mean(x^2) + eps):

    dn = dy * weight * SiLU(gate),              dx = r (dn - n mean(dn * n)),
    dgate = dy * weight * n * SiLU'(gate),      dweight = sum over rows of dy * n * SiLU(gate);      not GATED: 1 for SiLU(gate)

Shapes: as in `forward.py`; dy [M, H, size] with its strides; dx, dgate contiguous; partial [P, size] with P programs.
"""

import triton
import triton.language as tl

from kernels.gated_norm._triton.forward import normalised


@triton.jit(do_not_specialize=["R"])
def gated_norm_backward(
    dy, x, gate, weight, dx, dgate, partial, R, dy_M, dy_H, x_M, x_H, gate_M, gate_H, size, eps,
    H: tl.constexpr, BS: tl.constexpr, GATED: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BR: tl.constexpr = TILE // BS
    cols = tl.arange(0, BS)
    scale = tl.load(weight + cols, mask=cols < size, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * (STEPS * BR) + tl.arange(0, BR)
    dweight = tl.zeros([BR, BS], tl.float32)
    for step in tl.range(STEPS, num_stages=STAGES):
        rows = first + step * BR
        mask = (rows < R)[:, None] & (cols < size)[None, :]
        token, head = rows // H, rows % H
        x_row = tl.load(x + (token * x_M + head * x_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + (token * dy_M + head * dy_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        at = rows[:, None] * size + cols[None, :]
        if GATED:
            gate_row = tl.load(gate + (token * gate_M + head * gate_H)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x_row * x_row, 1) / size + eps)
            n = x_row * rstd[:, None]
            s = tl.sigmoid(gate_row)
            silu = gate_row * s
            grad_n = grad * n
            dweight += grad_n * silu
            grad_silu = grad_n * scale[None, :]  # dy * weight * n
            mean = tl.sum(grad_silu * silu, 1) / size
            out = rstd[:, None] * (grad * scale[None, :] * silu - n * mean[:, None])
            tl.store(dgate + at, (grad_silu * (s + silu * (1.0 - s))).to(dgate.dtype.element_ty), mask=mask)
        else:
            n, rstd = normalised(x_row, size, eps)
            dweight += grad * n
            mean = tl.sum(grad * n * scale[None, :], 1) / size
            out = rstd[:, None] * (grad * scale[None, :] - n * mean[:, None])
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
    tl.store(partial + tl.program_id(0).to(tl.int64) * size + cols, tl.sum(dweight, 0), mask=cols < size)
