"""Data modules. `PackedText` is imported on first use, so that reading a corpus needs neither torch nor Lightning."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_modules.data.packed import PackedText

__all__ = ["PackedText"]


def __getattr__(name: str) -> object:
    if name == "PackedText":
        from lit_modules.data.packed import PackedText

        return PackedText
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
