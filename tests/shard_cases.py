"""What the tests of prepared shards share: a small corpus, and its shards. Imports no torch: processes are started with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lit_modules.data.prepare import Progress, Settings, prepare
from lit_modules.data.shards import Index
from lit_modules.data.sources import open_source
from lit_modules.data.stream import EncodedDocument, divide
from lit_modules.data.tokenizer import ByteTokenizer

SETTINGS = Settings(val_fraction=0.2, split_seed=0, shard_tokens=1500)  # five shards


def write_jsonl(folder: Path, count: int = 200) -> Path:
    """Documents with empty lines and empty texts between them, which are none."""
    from data_cases import texts

    path = folder / "corpus.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) + "\n" * (1 + (i % 7 == 0)) for i, text in enumerate(texts(count))]
    path.write_text('{"text": " "}\n' + "".join(lines))
    return path


def prepared(folder: Path, source: Path, settings: Settings = SETTINGS, workers: int = 0, **heard: Callable) -> Index:
    return prepare(folder, open_source(str(source), text_key="text"), ByteTokenizer(), settings, origin={}, workers=workers, **heard)


class StoppedError(Exception):
    """What ends a preparation in the middle, as a kill would."""


def stopped(folder: Path, source: Path, units: int, settings: Settings = SETTINGS) -> Path:
    """A folder in which so many units were tokenized, and joined where that made a shard."""

    def report(progress: Progress) -> None:
        if progress.units == units:
            raise StoppedError

    with pytest.raises(StoppedError):
        prepared(folder, source, settings, report=report)
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def expected(count: int = 200) -> dict[str, list[EncodedDocument]]:
    """The documents of each split, in the order of the source."""
    from data_cases import encoded, texts

    train, validation = divide(encoded(texts(count)), SETTINGS.split_seed, SETTINGS.val_fraction)
    return {"train": train, "validation": validation}


def joined(documents: list[EncodedDocument]) -> list[int]:
    return np.concatenate([document.tokens for document in documents]).tolist()
