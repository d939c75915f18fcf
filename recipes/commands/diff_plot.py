"""The picture of `diff --plot`: the training losses of two runs, each with the runs that it went on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mixers.errors import ConfigError


class Curve(NamedTuple):
    """The training loss of a run and of those before it."""

    label: str
    losses: Mapping[int, float]  # of optimizer steps
    began: Sequence[int]  # the steps at which a run went on from a checkpoint


def draw(path: Path, a: Curve, b: Curve) -> None:
    """Writes a PNG: the losses above, their difference below.

    Raises:
        ConfigError: there is nothing to draw, or the file cannot be written.
    """
    for curve in (a, b):
        if not curve.losses:
            raise ConfigError(f"plot: run {curve.label} has no train/loss in its metrics.csv")
    from matplotlib.figure import Figure  # slow to import; with a Figure of its own no display and no global state is touched

    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for curve, color, width in ((a, "#c9d8e2", 5.0), (b, "#b5421e", 1.2)):  # the second lies on the first where they are equal
        above.plot(*zip(*sorted(curve.losses.items()), strict=True), color=color, linewidth=width, label=curve.label)
    for i, step in enumerate(b.began):
        above.axvline(step, color="#555555", linewidth=0.9, linestyle=":", label="b went on from a checkpoint" if i == 0 else None)
    common = sorted(a.losses.keys() & b.losses.keys())
    differences = [b.losses[step] - a.losses[step] for step in common]
    below.plot(common, differences, color="#b5421e", linewidth=1.0)
    if not any(differences):
        below.text(0.5, 0.72, f"equal to the bit in all {len(common):,} steps", transform=below.transAxes, ha="center", fontsize=9)
    above.set_ylabel("training loss, nats per token")
    below.set_ylabel("difference")
    below.set_xlabel("optimizer step")
    above.legend(frameon=False, loc="upper right")
    for axes in (above, below):
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise ConfigError(f"plot: {path} cannot be written: {error.strerror or error}") from error
