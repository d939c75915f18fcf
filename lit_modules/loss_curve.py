"""The loss curve of a run: recorded in bounded memory, drawn without a display."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, final


def short_number(value: float) -> str:
    """Three digits and a letter: 950, 12.3k, 1.5M, 20B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@final
class LossCurve:
    """Bits per byte over tokens seen: every validation, and training steps averaged in bins that widen as the run goes on.

    Args:
        max_points: most points of training that are kept.
    """

    def __init__(self, max_points: int = 1000) -> None:
        self.max_points = max_points
        self.train: list[tuple[float, float]] = []  # (tokens, bits per byte)
        self.validation: list[tuple[float, float]] = []
        self._stride = 1  # steps a point
        self._bin: list[tuple[float, float]] = []  # steps of the next point

    def add_train(self, tokens: float, bpb: float) -> None:
        """One optimizer step; values that are not finite are left out."""
        if not math.isfinite(bpb):
            return
        self._bin.append((tokens, bpb))
        if len(self._bin) < self._stride:
            return
        self.train.append(_mean(self._bin))
        self._bin = []
        if len(self.train) >= self.max_points:
            pairs = [self.train[i : i + 2] for i in range(0, len(self.train), 2)]
            self.train, self._stride = [_mean(pair) for pair in pairs], 2 * self._stride

    def add_validation(self, tokens: float, bpb: float) -> None:
        """One validation; values that are not finite are left out."""
        if math.isfinite(bpb):
            self.validation.append((tokens, bpb))

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"train": list(self.train), "validation": list(self.validation), "stride": self._stride, "bin": list(self._bin)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.train, self.validation = [(t, b) for t, b in state["train"]], [(t, b) for t, b in state["validation"]]
        self._stride, self._bin = state["stride"], [(t, b) for t, b in state["bin"]]

    def draw(self, path: Path, title: str) -> None:
        """Writes a PNG. The axis is cut above what the loss was after the first 2 % of the tokens, where there is enough to see."""
        from matplotlib.figure import Figure  # slow to import; with a Figure of its own no display and no global state is touched
        from matplotlib.ticker import FuncFormatter

        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        if self.train:
            axes.plot(*zip(*self.train, strict=True), color="#7aa6c2", linewidth=1.0, label="training")
        if self.validation:
            tokens, bpb = self.validation[-1]
            marker = "o" if len(self.validation) <= 40 else ""
            axes.plot(*zip(*self.validation, strict=True), color="#b5421e", linewidth=1.8, marker=marker, markersize=4, label="validation")
            axes.annotate(f"{bpb:.3f}", (tokens, bpb), xytext=(6, 0), textcoords="offset points", va="center", color="#b5421e", annotation_clip=False)
        limits = self._limits()
        if limits is not None:
            axes.set_ylim(*limits)
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens seen")
        axes.set_ylabel("bits per byte")
        axes.set_title(title, loc="left", fontsize=11)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if self.train or self.validation:
            axes.legend(frameon=False, loc="upper right")
        partial = path.with_name(f".{path.name}.part")  # the disk may fill up meanwhile
        try:
            figure.savefig(partial, format="png")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _limits(self) -> tuple[float, float] | None:
        points = self.train + self.validation
        if not points:
            return None
        settled = [bpb for tokens, bpb in points if tokens > 0.02 * points[-1][0]]
        shown = settled if len(settled) >= 20 else [bpb for _, bpb in points]
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        return min(bpb for _, bpb in points) - margin, max(shown) + margin


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    """The mean bits per byte, at the last of the tokens."""
    return points[-1][0], sum(bpb for _, bpb in points) / len(points)
