"""The equations of kernels/delta/README.md, written out for one head and one chunk, against the recurrence and its autograd."""

from __future__ import annotations

import pytest
import torch
from delta_cases import TOLERANCE, Case, assert_close, make, random_cotangent, run
from torch import Tensor

from kernels.delta.reference import recurrent

C = 20
CASE = Case("channel", "channel", "channel", "key", "key", 1, C, (4, 6), "dense", True, 1.0, "contiguous", "mixed")


def by_the_readme(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, S0: Tensor) -> dict[str, Tensor]:
    """Sections 2 and 4 for q, k, v, g, b, w [C, .] and S0 [K, V]; scores literally, as in (3.1)."""
    r = torch.arange(C)
    between = (r[:, None, None] >= r) & (r[None, :, None] < r)  # [r, s, i]: s < i <= r
    x = torch.einsum("rsi,ic->rsc", between.double(), g).exp()  # (2.1), above the diagonal 1 and not used
    gamma, tail = g.cumsum(0).exp(), x[-1]
    e, Z = b * k, w * v
    Ebar, Qg, Ktail = gamma * e, gamma * q, tail * k
    T, P = (torch.einsum("rc,sc,rsc->rs", left, k, x).tril(diagonal) for left, diagonal in ((e, -1), (q, 0)))
    A = torch.linalg.inv(torch.eye(C, dtype=torch.float64) + T)
    Y, U = A @ Ebar, A @ Z
    R = U - Y @ S0  # (2.3)
    o, S = Qg @ S0 + P @ R, gamma[-1, :, None] * S0 + Ktail.T @ R  # (2.4), (2.5)

    dO, dS = random_cotangent(o, 0), random_cotangent(S, 1)
    dR = P.T @ dO + Ktail @ dS  # (4.1)
    dZ = A.T @ dR  # (4.2)
    dS0 = Qg.T @ dO + gamma[-1, :, None] * dS - Ebar.T @ dZ  # (4.3)
    torch.testing.assert_close(Ebar.T @ dZ, Y.T @ dR)
    dEbar, dT, dP = -dZ @ S0.T, -(dZ @ R.T).tril(-1), (dO @ R.T).tril()  # (4.4), (4.5)
    dA = dR @ Z.T - dR @ S0.T @ Ebar.T
    torch.testing.assert_close(dT, -(A.T @ dA @ A.T).tril(-1))
    dq = gamma * (dO @ S0.T) + torch.einsum("rs,sc,rsc->rc", dP, k, x)  # (4.6)
    de = gamma * dEbar + torch.einsum("rs,sc,rsc->rc", dT, k, x)
    dk_direct = tail * (R @ dS.T) + torch.einsum("rs,rc,rsc->sc", dP, q, x) + torch.einsum("rs,rc,rsc->sc", dT, e, x)
    dk, db = dk_direct + b * de, k * de  # (4.7)
    dG = q * dq - k * dk + 2 * b * db  # (4.9)
    torch.testing.assert_close(dG, q * dq + e * de - k * dk_direct)  # (4.8)
    dG[-1] += (dS * S).sum(1)
    dg = dG.flip(0).cumsum(0).flip(0)
    return {"o": o, "final": S, "dq": dq, "dk": dk, "dv": w * dZ, "dg": dg, "db": db, "dw": v * dZ, "dstate": dS0}


@pytest.mark.parametrize("decay", ["mixed", "mild", "0.0"])
def test_the_equations_of_the_readme(decay: str) -> None:
    inputs = make(CASE._replace(decay=decay))
    one_head = inputs._replace(leaves={n: x[:1, :1] if n == "state" else x[:1, :, :1] for n, x in inputs.leaves.items()})
    one_head = one_head._replace(views={name: lambda x: x for name in inputs.views})
    expected = {n: x[0, 0] if n in ("final", "dstate") else x[0, :, 0] for n, x in run(recurrent, one_head).items()}
    got = by_the_readme(**{"S0" if n == "state" else n: x[0, 0] if n == "state" else x[0, :, 0] for n, x in one_head.leaves.items()})
    assert_close(got, expected, TOLERANCE[torch.float64])
