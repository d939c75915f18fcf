"""Times `prepare` against the bare tokenizer, and the loader of shards, on one core: `python tests/bench_data.py`.

Prints a table and rewrites docs/benchmarks/data_cpu.csv. The text is Python's own source, 8 MB as .jsonl, and the tokenizers are trained on it. Bare
is a loop over the texts that calls the tokenizer's library and keeps nothing; `prepare` also reads the file, hashes, packs and writes. They take
turns, so that what else the machine does meets both; a figure is the median over the turns. Files are in the page cache.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from bench_reference import machine
from tqdm import tqdm

from lit_modules.data import PackedText
from lit_modules.data.builtin import standard_library
from lit_modules.data.prepare import Settings, prepare
from lit_modules.data.sources import FileSource
from lit_modules.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

TABLE = Path(__file__).parents[1] / "docs/benchmarks/data_cpu.csv"
SETTINGS = Settings(val_fraction=0.05, split_seed=0, shard_tokens=2**29)
BYTES, TURNS, BATCH, SEQ_LEN = 8_000_000, 5, 4, 4096


class Row(NamedTuple):
    """A line of the table; tokens a second by the clock, and for each second of a core that it and its workers had."""

    what: str
    impl: str
    tokens: int
    tokens_per_s: int
    tokens_per_core_s: int
    versions: str
    cpu: str
    torch: str
    commit: str
    date: str


def write_text(folder: Path) -> tuple[Path, list[str]]:
    texts: list[str] = []
    for _, text in standard_library():
        if sum(map(len, texts)) >= BYTES:
            break
        texts += [text] if text.strip() else []
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def train_huggingface(texts: list[str], folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = Model(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    model.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=32_000, special_tokens=["<s>"], show_progress=False))
    model.save(str(folder / "tokenizer.json"))
    return HuggingFaceTokenizer(folder / "tokenizer.json")


def train_sentencepiece(texts: list[str], folder: Path) -> Tokenizer:
    import sentencepiece

    model, lines = io.BytesIO(), (line for text in texts[:60] for line in text.splitlines() if line)
    options = {"vocab_size": 8000, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "hard_vocab_limit": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return SentencePieceTokenizer(folder / "tokenizer.model")


def bare(tokenizer: Any, texts: list[str]) -> int:
    """Calls the library itself; the number of tokens."""
    model = tokenizer._model
    if isinstance(tokenizer, SentencePieceTokenizer):
        return sum(len(model.encode(text, out_type=int)) for text in texts)
    return sum(len(model.encode(text, add_special_tokens=False).ids) for text in texts)


def prepared(tokenizer: Tokenizer, path: Path, folder: Path) -> int:
    index = prepare(folder, FileSource(str(path), "text"), tokenizer, SETTINGS, origin={})
    return sum(index.total(split).tokens for split in index.splits)


def loaded(folder: Path, tokenizer: str, num_workers: int) -> int:
    """One pass over the shards in batches; the number of tokens."""
    data = PackedText(str(folder), tokenizer=tokenizer, seq_len=SEQ_LEN, batch_size=BATCH, num_workers=num_workers)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None, overfit_batches=0, global_step=0)
    return sum(batch.inputs.numel() for batch in data.train_dataloader())


def measure(what: str, versions: str, implementations: dict[str, Callable[[int], int]]) -> list[Row]:
    """Each implementation is called with the number of the turn and returns its tokens."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in implementations}
    tokens = {}
    for turn in tqdm(range(TURNS), what):
        for name, function in implementations.items():
            start, busy = time.perf_counter(), sum(os.times()[:4])
            tokens[name] = function(turn)
            seconds[name].append((time.perf_counter() - start, sum(os.times()[:4]) - busy))
    processor, torch_version, _, commit, date = machine()
    about = versions, processor.partition(",")[0], torch_version, commit, date
    rows = []
    for name, times in seconds.items():
        speeds = [round(tokens[name] / statistics.median(column)) for column in zip(*times, strict=True)]
        rows.append(Row(what, name, tokens[name], *speeds, *about))
    return rows


def main() -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, texts = write_text(folder)
        for train, package in ((train_huggingface, "tokenizers"), (train_sentencepiece, "sentencepiece")):
            tokenizer = train(texts, folder)
            implementations = {
                "bare": lambda _, tokenizer=tokenizer: bare(tokenizer, texts),
                "prepare": lambda turn, tokenizer=tokenizer, package=package: prepared(tokenizer, path, folder / f"{package}{turn}"),
            }
            rows += measure(f"{package}, {tokenizer.vocab_size:,} tokens", f"{package} {version(package)}", implementations)
        shards, file = folder / "tokenizers0", str(folder / "tokenizer.json")
        loads = {f"{n} workers": lambda _, n=n: loaded(shards, file, n) for n in (0, 1)}
        rows += measure(f"loader, {BATCH} x {SEQ_LEN:,} tokens", f"numpy {version('numpy')}", loads)
    for row in rows:
        print(f"{row.what:35}{row.impl:12}{row.tokens:12,}{row.tokens_per_s:15,}/s{row.tokens_per_core_s:15,}/s of a core")
    with TABLE.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
