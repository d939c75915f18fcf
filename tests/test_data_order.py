"""The order of samples: a function of the seed alone, whoever asks and however often training is interrupted."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_cases import BOS, assert_same, data_of, encoded, rows, texts, write_corpus
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_modules.data import PackedText
from lit_modules.data.loaders import MicroBatches, Shard, saved_settings
from lit_modules.data.stream import concatenate
from lit_modules.data.windows import Batch, Windows, permutation
from mixers.errors import ConfigError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


def test_windows_are_the_stream() -> None:
    stream = concatenate(encoded(texts(50)), 0)
    windows = Windows(stream, 16)
    assert len(windows) == (len(stream.tokens) - 1) // 16
    for k in range(len(windows)):
        assert windows[k].tolist() == stream.tokens[16 * k : 16 * k + 17].tolist()
    exact = Windows(stream._replace(tokens=stream.tokens[: 16 * 3 + 1]), 16)
    assert len(exact) == 3
    assert len(exact[2]) == 17


def test_order_of_documents_follows_the_seed() -> None:
    documents = encoded(texts(50))
    stream = concatenate(documents, 3)
    assert np.array_equal(stream.tokens, concatenate(documents[::-1], 3).tokens)
    assert not np.array_equal(stream.tokens, concatenate(documents, 4).tokens)
    assert stream.identity == concatenate(documents, 4).identity


def test_permutation() -> None:
    for n in (1, 2, 1000):
        orders = [permutation(seed, epoch, n) for seed in (0, 1) for epoch in (0, 1, 2)]
        for order in orders:
            assert sorted(order.tolist()) == list(range(n))
    assert len({tuple(order.tolist()) for order in orders}) == 6
    # Fixed for ever: an order that changes breaks the resuming of every run there is.
    assert permutation(0, 0, 10).tolist() == [0, 2, 5, 3, 1, 4, 9, 8, 7, 6]
    assert permutation(5, 3, 10).tolist() == [7, 2, 8, 5, 4, 3, 9, 1, 6, 0]
    slots = np.array([permutation(0, epoch, 10) for epoch in range(4000)])
    assert np.abs(slots.mean(axis=0) - 4.5).max() < 0.25  # uniform: the standard error is 0.045


def test_sample_is_a_function_of_seed_and_index(corpus: Path) -> None:
    data, again = data_of(corpus), data_of(corpus)
    windows = data._split("train")
    n = len(windows)
    first = [data.sample(i).tolist() for i in range(n)]
    second = [data.sample(n + i).tolist() for i in range(n)]
    everything = [windows.stream.tokens[16 * k : 16 * k + 17].tolist() for k in range(n)]
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second
    assert first == [everything[k] for k in permutation(0, 0, n)]
    assert [again.sample(i).tolist() for i in reversed(range(n))] == first[::-1]
    assert [data_of(corpus, seed=1).sample(i).tolist() for i in range(n)] != first
    with pytest.raises(ValueError, match="read-only"):
        data.sample(0)[0] = 1


def take(loader, count: int) -> list[Batch]:
    found: list[Batch] = []
    while len(found) < count:
        found += list(loader)
    return found[:count]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 12), (2, 6), (4, 3), (3, 4), (12, 1)])
def test_order_does_not_depend_on_ranks(corpus: Path, world_size: int, batch_size: int) -> None:
    shards = [data_of(corpus, rank, world_size, batch_size=batch_size) for rank in range(world_size)]
    passes = 2 + len(shards[0]._split("train")) // 12 * 2  # more than two epochs, none of which 12 divides
    assert len(shards[0]._split("train")) % 12
    dealt = [take(shard.train_dataloader(), passes) for shard in shards]
    order = [row for step in zip(*dealt, strict=True) for batch in step for row in rows(batch)]
    assert order == [shards[0].sample(i)[:-1].tolist() for i in range(passes * 12)]


def test_loader_counts_through_epochs(corpus: Path) -> None:
    data = data_of(corpus)
    loader = data.train_dataloader()
    assert len(loader) == len(data._split("train")) // 3
    for start in (0, len(loader), 2 * len(loader)):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert rows(batches[0]) == [data.sample(start * 3 + j)[:-1].tolist() for j in range(3)]
    assert len(data_of(corpus, batch_size=10_000).train_dataloader()) == 1  # several epochs in one micro-batch


@pytest.mark.parametrize("split", ["train", "val"])
def test_workers_do_not_change_the_order(corpus: Path, split: str) -> None:
    one, other = (getattr(data_of(corpus, num_workers=count), f"{split}_dataloader")() for count in (0, 2))
    for _ in range(2):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


def test_position_is_what_was_delivered(corpus: Path) -> None:
    data = data_of(corpus, num_workers=2)  # workers run ahead
    iterator = iter(data.train_dataloader())
    for _ in range(4):
        next(iterator)
    state = data.state_dict()
    assert state["samples"] == 12
    resumed = data_of(corpus, 1, 2, batch_size=2)  # other ranks and batch size
    resumed.trainer.state = SimpleNamespace(fn="fit")
    resumed.load_state_dict(state)
    batch = next(iter(resumed.train_dataloader()))
    assert rows(batch) == [data.sample(12 + 2 + j)[:-1].tolist() for j in range(2)]
    other = data_of(corpus, seed=1)
    other.trainer.state = SimpleNamespace(fn="fit")
    other.load_state_dict(state)
    with pytest.raises(ConfigError, match=r"^data: seed_everything: 0 in the checkpoint's training, 1 here; PackedText.may_change allows that$"):
        other.train_dataloader()
    other.may_change = ["seed"]
    with pytest.warns(UserWarning, match="seed_everything: 0 in .*, 1 here; training starts at sample 0 of these data"):
        batch = next(iter(other.train_dataloader()))
    assert rows(batch) == [other.sample(j)[:-1].tolist() for j in range(3)]


def test_positions_of_old_checkpoints_and_of_other_boundaries(corpus: Path) -> None:
    """Boundaries do not move windows, so the position stays. Version 0.1 saved one string, without them."""
    state = {**data_of(corpus).train_dataloader().state_dict(), "samples": 6}
    apart, old = data_of(corpus, document_boundaries=False), data_of(corpus)
    apart.may_change = ["document_boundaries"]
    settings = state["settings"]
    assert settings == data_of(corpus).shared()
    order = f"{settings['data']} bytes 16 0"
    for data, saved, words in (
        (apart, state, "document_boundaries: True in the checkpoint's training, False here; the position in the data stays"),
        (old, {"samples": 6, "order": order}, r"does not say the data.document_boundaries \(here True\) of its training"),
    ):
        data.trainer.state = SimpleNamespace(fn="fit")
        data.load_state_dict(saved)
        with pytest.warns(UserWarning, match=words):
            loader = data.train_dataloader()
        assert rows(next(iter(loader))) == [data.sample(6 + j)[:-1].tolist() for j in range(3)]
    assert saved_settings({"samples": 6, "order": "x sentencepiece:a b 16 0"})["tokenizer"] == "sentencepiece:a b"
    for broken in ({}, {"samples": 6}, {"samples": 6, "order": "x y"}, {"samples": 6, "settings": 3}, {"settings": settings}):
        with pytest.raises(ConfigError, match="state of the data cannot be read: it holds no samples and settings"):
            saved_settings(broken)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_evaluation_deals_every_window_once(corpus: Path, world_size: int) -> None:
    shards = [data_of(corpus, rank, world_size, val_tokens=16 * 13) for rank in range(world_size)]
    batches = [list(shard.val_dataloader()) for shard in shards]
    assert {len(dealt) for dealt in batches} == {len(shards[0].val_dataloader())} == {-(-13 // (3 * world_size))}
    windows = shards[0]._split("validation")
    expected = [windows[k][:-1].tolist() for k in range(13)]
    found = [row for step in zip(*batches, strict=True) for batch in step for row in rows(batch)]
    counted = sum(int(batch.n_bytes) for dealt in batches for batch in dealt)
    filler = [BOS] + [0] * 15
    fillers = len(found) - 13  # ranks that have nothing left in the last step
    assert found == expected + [filler] * fillers
    assert counted == sum((windows[k][1:] != BOS).sum() for k in range(13))
    for dealt in batches:
        if rows(dealt[-1]) == [filler]:
            assert dealt[-1].cu_seqlens.tolist() == [0, 16]
            assert dealt[-1].n_bytes == 0
            assert (dealt[-1].targets == -100).all()


def test_micro_batches_follow_the_formula() -> None:
    first, size, world = 7, 4, 3
    for rank in range(world):
        dealt = list(MicroBatches(first, first + 5 * size * world, size, Shard(rank, world)))
        starts = [first + (m * world + rank) * size for m in range(5)]
        assert dealt == [list(range(start, start + size)) for start in starts]


class Recorder(LightningModule):
    """Keeps the rows of every training batch; one weight, so that there is something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[list[int]] = []
        self.validated = 0

    def training_step(self, batch: Batch) -> torch.Tensor:
        assert isinstance(batch, Batch)
        self.trained += rows(batch)
        return self.weight**2

    def validation_step(self, batch: Batch) -> None:
        assert isinstance(batch, Batch)
        self.validated += batch.inputs.numel() // 16

    def predict_step(self, batch: Batch) -> int:
        return int(batch.n_bytes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder: Path, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "max_epochs": -1, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return Trainer(default_root_dir=folder, **(quiet | defaults | settings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("saved_by", ["callback", "end of fit"])
@pytest.mark.parametrize("where", ["middle", "end of epoch", "second epoch"])
def test_training_resumes_at_the_exact_sample(corpus: Path, tmp_path: Path, where: str, saved_by: str, num_workers: int) -> None:
    def fit(model: Recorder, steps: int, ckpt_path: Path | None = None, **settings) -> None:
        data = PackedText(str(corpus), seq_len=16, batch_size=40, val_fraction=0.1, num_workers=num_workers)
        trainer = trainer_of(tmp_path, max_steps=steps, accumulate_grad_batches=2, **settings)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=False)
        if saved_by == "end of fit" and ckpt_path is None:
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    reference = PackedText(str(corpus), seq_len=16, batch_size=40, val_fraction=0.1)
    epoch = len(reference.train_dataloader())  # in micro-batches
    assert epoch == 10
    first = {"middle": 3, "end of epoch": 5, "second epoch": 7}[where]  # in steps of two of them
    total = 13
    expected = [reference.sample(i)[:-1].tolist() for i in range(total * 80)]
    if saved_by == "callback":
        saver = ModelCheckpoint(tmp_path, "a", every_n_train_steps=first, save_top_k=1)
        model, ran = Recorder(), min(total, 2 * first - 1)
        fit(model, ran, callbacks=[saver], enable_checkpointing=True)
    else:
        model, ran = Recorder(), first
        fit(model, ran)
    resumed = Recorder()
    fit(resumed, total, tmp_path / "a.ckpt")
    assert model.trained == expected[: ran * 80]
    assert resumed.trained == expected[first * 80 :]


@pytest.mark.filterwarnings("ignore")
def test_short_epochs_validation_and_accumulation(corpus: Path, tmp_path: Path) -> None:
    data = PackedText(path=str(corpus), seq_len=16, batch_size=40, val_fraction=0.1, val_tokens=16 * 20)
    model = Recorder()
    trainer = trainer_of(tmp_path, max_steps=5, limit_train_batches=4, accumulate_grad_batches=2, reload_dataloaders_every_n_epochs=1)
    trainer.fit(model, datamodule=data)
    assert model.trained == [data.sample(i)[:-1].tolist() for i in range(10 * 40)]
    assert model.validated == 20 * 2
    validated = [data._split("validation")[k] for k in range(20)]
    predicted = trainer.predict(model, datamodule=data)
    assert predicted is not None
    assert sum(predicted) == sum(int((window[1:] != BOS).sum()) for window in validated)


@pytest.mark.filterwarnings("ignore")
def test_validating_a_checkpoint_does_not_move_training(corpus: Path, tmp_path: Path) -> None:
    data = PackedText(str(corpus), seq_len=16, batch_size=40, val_fraction=0.1)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.fit(Recorder(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again, model = PackedText(str(corpus), seq_len=16, batch_size=40, val_fraction=0.1), Recorder()
    checked = trainer_of(tmp_path)
    checked.validate(model, datamodule=again, ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    trainer_of(tmp_path, max_steps=1).fit(model, datamodule=again)
    assert model.trained == [again.sample(i)[:-1].tolist() for i in range(40)]


@pytest.mark.filterwarnings("ignore")
def test_overfitting_repeats_its_batches(corpus: Path, tmp_path: Path) -> None:
    data = PackedText(path=str(corpus), seq_len=16, batch_size=4, val_fraction=0.1)
    model = Recorder()
    trainer_of(tmp_path, max_epochs=3, overfit_batches=2).fit(model, datamodule=data)
    assert model.trained == [data.sample(i)[:-1].tolist() for i in range(8)] * 3


def test_data_module_can_be_sent_to_another_process(corpus: Path) -> None:
    data = PackedText(path=str(corpus), seq_len=16)
    data.setup("fit")
    assert pickle.loads(pickle.dumps(data)).sample(5).tolist() == data.sample(5).tolist()
