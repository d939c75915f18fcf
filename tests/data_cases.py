"""What the tests of the data module share: small corpora, and PackedText as some rank would hold it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lit_modules.data import PackedText
from lit_modules.data.corpus import Document
from lit_modules.data.stream import encode_document
from lit_modules.data.tokenizer import ByteTokenizer
from lit_modules.data.windows import Batch

BOS = 256


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdé \n"), size=rng.integers(1, 60))) + str(i) for i in range(count)]


def encoded(documents: list[str]) -> list:
    return [encode_document(Document(str(i), text), ByteTokenizer()) for i, text in enumerate(documents)]


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(200)))
    return path


def data_of(corpus: Path, rank: int = 0, world_size: int = 1, **settings) -> PackedText:
    data = PackedText(**({"path": str(corpus), "seq_len": 16, "batch_size": 3, "val_fraction": 0.1} | settings))
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size}, overfit_batches=0, global_step=0)
    return data


def rows(batch: Batch, seq_len: int = 16) -> list[list[int]]:
    return batch.inputs.reshape(-1, seq_len).tolist()


def assert_same(one: Batch, other: Batch) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
