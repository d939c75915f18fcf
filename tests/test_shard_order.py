"""Training on shards: the sample at an index is a function of (seed, index), whoever asks; a pass holds every sample once."""

from __future__ import annotations

import pickle
import random
import shutil
import tracemalloc
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_cases import assert_same, data_of, rows
from shard_cases import SETTINGS, expected, joined, prepared, write_jsonl

from lit_modules.data import PackedText, sources
from lit_modules.data.order import place
from lit_modules.data.windows import Batch
from mixers.errors import ConfigError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "UNIT_BYTES", 500)
        prepared(folder / "shards", write_jsonl(folder))
    return folder / "shards"


# --- the permutation ---


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 97, 1000])
def test_place_is_a_permutation(n: int) -> None:
    orders = {tuple(place(seed, epoch, n, i) for i in range(n)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert n < 16 or len(orders) == 6


def test_place_is_fixed_for_ever() -> None:
    """An order that changes breaks the resuming of every run there is."""
    assert [place(0, 0, 10, i) for i in range(10)] == [2, 4, 6, 7, 9, 3, 1, 0, 5, 8]
    assert [place(5, 3, 10, i) for i in range(10)] == [6, 1, 5, 3, 7, 9, 2, 0, 8, 4]
    assert [place(0, 0, 10**12, i) for i in range(3)] == [93759993736, 987268007546, 906715104872]


def test_place_is_uniform() -> None:
    for n in (5, 12):
        epochs = 2000
        counts = torch.zeros(n, n)
        for epoch in range(epochs):
            for i in range(n):
                counts[i, place(0, epoch, n, i)] += 1
        chi2 = float(((counts - epochs / n) ** 2).sum() / (epochs / n))
        freedom = n * (n - 1)
        assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    spots = torch.tensor([[i, place(0, 0, 10**9, i)] for i in range(5000)], dtype=torch.float64)
    steps = torch.stack([spots[:-1, 1], spots[1:, 1]])
    assert abs(float(torch.corrcoef(spots.T)[0, 1])) < 0.07  # five standard errors
    assert abs(float(torch.corrcoef(steps)[0, 1])) < 0.07


def test_place_holds_nothing() -> None:
    tracemalloc.start()
    for i in range(100):
        place(0, 0, 10**12, i)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20_000


# --- samples ---


def windows_of(seq_len: int = 16) -> list[list[int]]:
    stream = joined(expected()["train"])
    return [stream[k * seq_len : (k + 1) * seq_len + 1] for k in range((len(stream) - 1) // seq_len)]


def test_every_sample_once_an_epoch(shards: Path) -> None:
    everything, data = windows_of(), data_of(shards)
    n = len(everything)
    order = [data.sample(i).tolist() for i in range(3 * n)]
    for epoch in range(3):
        assert sorted(order[epoch * n : (epoch + 1) * n]) == sorted(everything)
        assert order[epoch * n : (epoch + 1) * n] == [everything[place(0, epoch, n, i)] for i in range(n)]
    again = data_of(shards)
    shuffled = random.Random(0).sample(range(3 * n), n)
    assert [again.sample(i).tolist() for i in shuffled] == [order[i] for i in shuffled]
    assert [data_of(shards, seed=1).sample(i).tolist() for i in range(n)] != order[:n]
    assert pickle.loads(pickle.dumps(data)).sample(5).tolist() == order[5]


@pytest.mark.parametrize("seq_len", [1, 16, 100, 4096])
def test_any_length(shards: Path, seq_len: int) -> None:
    data = data_of(shards, seq_len=seq_len, val_path=None if seq_len < 4096 else str(shards.parent / "corpus.jsonl"), val_tokens=None)
    assert data.sample(0).tolist() in windows_of(seq_len)
    assert len(data._split("train")) == len(windows_of(seq_len))


def test_validation_is_that_of_prepare(shards: Path) -> None:
    stream = joined(expected()["validation"])
    found = [row for seed in (0, 1) for batch in data_of(shards, seed=seed).val_dataloader() for row in rows(batch)]
    assert found == 2 * [stream[k * 16 : k * 16 + 16] for k in range((len(stream) - 1) // 16)]


def loaders(shards: Path, world_size: int, batch_size: int, num_workers: int, samples: int = 0) -> list:
    """The training loaders of all ranks, that go on after so many samples."""
    dealt = []
    for rank in range(world_size):
        data = data_of(shards, rank, world_size, batch_size=batch_size, num_workers=num_workers)
        state = {**data.train_dataloader().state_dict(), "samples": samples}
        data.trainer.state = SimpleNamespace(fn="fit")
        data.load_state_dict(state)
        dealt.append(data.train_dataloader())
    return dealt


def take(loader, count: int) -> list[Batch]:
    found: list[Batch] = []
    while len(found) < count:
        batches = iter(loader)
        found += islice(batches, count - len(found))
        batches.close()  # ends the workers now
    return found


@pytest.mark.parametrize(("world_size", "batch_size", "num_workers"), [(1, 6, 0), (2, 3, 0), (3, 2, 0), (3, 1, 0), (1, 6, 1), (2, 3, 2)])
def test_order_does_not_depend_on_who_asks(shards: Path, world_size: int, batch_size: int, num_workers: int) -> None:
    """Ranks, workers and accumulation (a batch of 1 takes two turns for the step of the others), beyond an epoch and from any sample."""
    data, everything = data_of(shards), windows_of()
    for first in (0, 6, 7, len(everything) - 5):
        count = 12 if num_workers else len(everything) // (world_size * batch_size) + 2
        dealt = [take(loader, count) for loader in loaders(shards, world_size, batch_size, num_workers, first)]
        found = [row for turn in zip(*dealt, strict=True) for batch in turn for row in rows(batch)]
        assert found == [data.sample(first + i)[:-1].tolist() for i in range(count * world_size * batch_size)]


def test_batches_are_the_same_to_the_bit(shards: Path) -> None:
    """Whoever packs them; and as they are packed from a corpus in memory."""
    (whole,) = loaders(shards, 1, 6, 0)
    (other,) = loaders(shards, 1, 6, 2)
    for one, two in zip(take(whole, 20), take(other, 20), strict=True):
        assert_same(one, two)
    text = data_of(shards.parent / "corpus.jsonl", val_fraction=0.2)
    windows = [data_of(shards).sample(i) for i in range(4)]
    for one, two in zip(data_of(shards)._packer(windows), text._packer([list(window) for window in windows]), strict=True):
        assert torch.equal(one, two)


def test_start_up_reads_no_tokens(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_modules.data.windows.permutation", None)  # the order of a corpus in memory
    data = data_of(shards)
    about = data.describe()
    assert about["train"]["documents"] == len(expected()["train"])
    assert about["train"]["tokens"] == len(joined(expected()["train"]))
    assert about["path"] == str(shards)
    copy = shutil.copytree(shards, tmp_path / "copy")
    assert data_of(copy).describe() == {**about, "path": str(copy)}
    assert len({about["identity"], about["train"]["identity"], about["validation"]["identity"]}) == 3


# --- what goes wrong ---


def test_settings_that_do_not_fit(shards: Path, tmp_path: Path) -> None:
    undivided = prepared(tmp_path / "undivided", shards.parent / "corpus.jsonl", SETTINGS._replace(val_fraction=0.0)).folder
    with pytest.raises(
        ConfigError, match=r"data\.path: .* has no document for validation: .* another --val_fraction of `prepare`, or a data\.val_path"
    ):
        data_of(undivided).setup("fit")
    for val_path, documents in ((undivided, 200), (shards, len(expected()["validation"]))):
        data = data_of(undivided, val_path=str(val_path), test_path=str(val_path))
        assert data.describe()["validation"]["documents"] == data.describe()["test"]["documents"] == documents
    with pytest.raises(ConfigError, match=r"data\.path: .* tokens for validation, and one sequence needs 4097: lower data\.seq_len"):
        data_of(shards, seq_len=4096).setup("fit")
    with pytest.raises(ConfigError, match=r"data\.val_path: .*no_shards does not exist"):
        data_of(shards, val_path=str(tmp_path / "no_shards")).setup("fit")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_shard_is_one_line(shards: Path, tmp_path: Path, num_workers: int) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    file = copy / "train-00000.tokens"
    file.write_bytes(b"\xff" * file.stat().st_size)
    data = data_of(copy, num_workers=num_workers)
    with pytest.raises(ConfigError) as caught:
        list(data.train_dataloader())
    assert str(caught.value) == (
        f"data.path: {file} has the token 65535, but its vocabulary has 257 tokens: the file is corrupt; "
        "remove it and give the `prepare` command of its folder again"
    )


def test_another_tokenizer_is_refused(shards: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: is huggingface:.*, but .*shards was prepared with bytes"):
        PackedText(str(shards), tokenizer=str(tmp_path / "tokenizer.json"), seq_len=16).setup("fit")
