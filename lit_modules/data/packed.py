"""`PackedText`: documents, packed into sequences of one length, as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, final

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from lit_modules.data.loaders import EvaluationLoader, Shard, TrainLoader
from lit_modules.data.locate import locate
from lit_modules.data.shards import Index, ShardStream
from lit_modules.data.splits import Splits
from lit_modules.data.stream import TokenArray
from lit_modules.data.tokenizer import load_tokenizer
from lit_modules.data.verify import Verified, verify
from lit_modules.data.windows import Packer, Windows
from lit_modules.data.workers import start_server
from mixers.errors import ConfigError


@final
class PackedText(LightningDataModule):
    """Text, tokenized once, packed into windows of seq_len tokens; batches are `lit_modules.data.windows.Batch`.

    Training sample i is a pure function of (seed, i): window permutation(seed, i // windows)[i % windows]. Where `path` was
    made by `python -m recipes prepare` nothing is read before it is asked for: shards are mapped into memory, the permutation is
    computed element by element (`lit_modules.data.order`), and the split for validation is that of `prepare`.
    Ranks, workers, batch size and gradient accumulation only decide who computes it; see `TrainLoader`. The position is
    saved in checkpoints, and training resumes at the exact sample.

    Args:
        path: A folder of prepared shards; or a text, .jsonl or .parquet file, a folder of such files or a glob pattern,
            read into memory. null is the built-in corpus, Python's standard library (source, docstrings and help topics).
        val_path: Validation corpus. null takes val_fraction of the documents of `path`.
        test_path: Test corpus. null tests on the validation set.
        tokenizer: `bytes`, a local tokenizer.json or sentencepiece model file, or a folder with one.
        seq_len: Tokens a sequence.
        batch_size: Sequences a micro-batch, on each device.
        document_boundaries: Keep documents apart: nothing crosses from one to the next, in the model or in the loss.
        val_fraction: Share of documents that validate. A document's side depends on its text and split_seed alone. Of
            prepared shards, `prepare` has decided.
        val_tokens: Use at most so many tokens of the validation set (a fixed choice). null uses all.
        text_key: Key of the text in .jsonl lines, or its column in .parquet files.
        seed: Order of documents and windows in training.
        split_seed: Which documents validate; apart from `seed`, so that runs with several seeds share a validation set.
        num_workers: Worker processes that make batches. 0 makes them in the main process.

    Raises:
        ConfigError: a setting outside its range or an unusable tokenizer, at once; an unusable corpus, in `setup`.
    """

    def __init__(
        self,
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        tokenizer: str = "bytes",
        seq_len: int = 4096,
        batch_size: int = 4,
        document_boundaries: bool = True,
        val_fraction: float = 0.02,
        val_tokens: int | None = None,
        text_key: str = "text",
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _at_least("seq_len", seq_len, 1)
        _at_least("batch_size", batch_size, 1)
        _at_least("seed", seed, 0)
        _at_least("split_seed", split_seed, 0)
        _at_least("num_workers", num_workers, 0)
        _at_least("val_tokens", 1 if val_tokens is None else val_tokens, 1)
        if seq_len >= 2**31:  # cu_seqlens is int32
            raise ConfigError(f"data.seq_len: must be below 2**31, got {seq_len}")
        if val_tokens is not None and val_tokens < seq_len:
            raise ConfigError(f"data.seq_len: one sequence of {seq_len} tokens is more than data.val_tokens ({val_tokens}): lower it, or raise that")
        if not 0.0 < val_fraction < 1.0:
            raise ConfigError(f"data.val_fraction: must lie between 0 and 1, got {val_fraction}")
        if batch_size * seq_len >= 2**31:
            raise ConfigError(f"data.batch_size: {batch_size} * data.seq_len {seq_len} must be below 2**31 tokens")
        self.path = path
        self.val_path = val_path
        self.test_path = test_path
        self.tokenizer = load_tokenizer(tokenizer)
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.document_boundaries = document_boundaries
        self.seed = seed
        self.num_workers = num_workers
        self._splits = Splits(
            {"path": path, "val_path": val_path, "test_path": test_path},
            self.tokenizer,
            tokenizer,
            seq_len=seq_len,
            val_fraction=val_fraction,
            val_tokens=val_tokens,
            text_key=text_key,
            seed=seed,
            split_seed=split_seed,
        )
        self._verified: Verified | None = None
        self.may_change: Collection[str] = ()  # names of `SHARED` in which a checkpoint's training may have differed
        self._packer = Packer(self.tokenizer, seq_len, document_boundaries=document_boundaries)
        self._train_loader: TrainLoader | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def vocab_size(self) -> int:
        """Token ids of the tokenizer, the document separator included."""
        return self.tokenizer.vocab_size

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes what a stage needs (everything if None), once."""
        if self.num_workers:
            start_server()  # it imports while this process reads
        self._splits.read(stage)

    def _split(self, name: str) -> Windows:
        self._splits.read("test" if name == "test" else "fit")
        return self._splits[name if name in self._splits else "validation"]

    def sample(self, index: int) -> TokenArray:
        """Training sample `index`, a pure function of (seed, index): seq_len + 1 tokens, inputs and targets in one."""
        return self._split("train")[index]

    def locate(self, index: int) -> dict[str, Any]:
        """Where training sample `index` lies, see `lit_modules.data.locate`, and how its text begins."""
        begins = self.tokenizer.decode([int(token) for token in self.sample(index)[:64] if token != self.tokenizer.bos_id])
        return {**locate(self._split("train"), index), "begins": begins[:100]}

    def verify(self, stage: str = "fit", say: Callable[[str], object] = lambda _: None) -> Verified | None:
        """Compares what a stage reads of prepared shards with their checksums, see `lit_modules.data.verify`; None if there are none.

        Raises:
            ConfigError: a file is not the one of its index.
        """
        self.setup(stage)
        read = ("train", "validation") if stage == "fit" else ("validation",) if stage == "validate" or "test" not in self._splits else ("test",)
        indices: dict[str, Index] = {}  # by setting, with the splits that are read
        for stream in (self._splits[name].stream for name in read):
            if isinstance(stream, ShardStream):
                index = indices.get(stream.key, stream.index._replace(splits={}))
                indices[stream.key] = index._replace(splits={**index.splits, stream.split: stream.index.splits[stream.split]})
        counts = [verify(index, key, say) for key, index in indices.items()]
        self._verified = Verified(*map(sum, zip(*counts, strict=True))) if counts else None
        return self._verified

    def describe(self) -> dict[str, Any]:
        """What has been set up (all if nothing has), for logs and receipts: plain values, sizes and content hashes.

        Keys: path, identity (of all its documents), tokenizer, vocab_size, seq_len; after `verify` of shards, verified ("7 of 10
        files"); and for each of train, validation, and test if it has a corpus of its own, a dict of documents, tokens, bytes
        (UTF-8), windows (those in use) and identity.
        """
        if not self._splits:
            self._splits.read(None)
        about: dict[str, Any] = {"path": self._splits.shown("path"), "identity": self._splits.identity, "tokenizer": self.tokenizer.identity}
        about |= {"vocab_size": self.vocab_size, "seq_len": self.seq_len}
        if self._verified is not None:
            about["verified"] = str(self._verified)
        for name, windows in self._splits.items():
            stream = windows.stream
            about[name] = {"documents": stream.documents, "tokens": len(stream.tokens), "bytes": stream.n_bytes}
            about[name] |= {"windows": len(windows), "identity": stream.identity}
        return about

    def train_dataloader(self) -> TrainLoader:
        """Training batches of this rank; goes on where the checkpoint, or the loader before this one, stopped."""
        windows = self._split("train")
        trainer = self.trainer
        loader = TrainLoader(
            windows,
            self._packer,
            self.batch_size,
            self._shard(),
            self.num_workers,
            accumulate=int(getattr(trainer, "accumulate_grad_batches", 1)),
            settings=self.shared(),
            may_change=self.may_change,
            overfit=getattr(trainer, "overfit_batches", 0),
            trained=self._count_trained(),
        )
        if self._restored is not None:
            loader.load_state_dict(self._restored)
            self._restored = None
        elif self._train_loader is not None and trainer is not None and trainer.global_step > 0:
            # Lightning asks again in the middle (reload_dataloaders_every_n_epochs) and when it fits a second time.
            loader.load_state_dict(self._train_loader.state_dict())
        self._train_loader = loader
        return loader

    def shared(self) -> dict[str, Any]:
        """What a training that goes on shares with the one before, by the names of `SHARED`. Ranks, workers, batch size and paths are free."""
        return {
            "data": self._split("train").stream.identity,
            "tokenizer": self.tokenizer.identity,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "document_boundaries": self.document_boundaries,
        }

    def _count_trained(self) -> Callable[[], int] | None:
        """Tells the samples trained on from here on, where the module counts its tokens as `LitLM` does: in whole optimizer steps."""
        module: Any = getattr(self.trainer, "lightning_module", None)
        before = getattr(module, "tokens", None)
        if not isinstance(before, int):
            return None
        return lambda: (module.tokens - before) // self.seq_len

    def val_dataloader(self) -> EvaluationLoader:
        """Every validation window once, over all ranks together."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> EvaluationLoader:
        """Every window of `test_path` once, or of the validation set without one."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> EvaluationLoader:
        """The same windows as `test_dataloader`."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> EvaluationLoader:
        return EvaluationLoader(self._split(split), self._packer, self.batch_size, self._shard(), self.num_workers)

    def _shard(self) -> Shard:
        # The data-parallel rank, which under tensor parallelism is not the process's.
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return Shard(replicas["rank"], replicas["num_replicas"]) if replicas else Shard()

    # Lightning keeps the state of a loader only for checkpoints within an epoch, and loses it when something reads the
    # number of batches early; that of a data module is always saved, and restored before any loader is made.
    def state_dict(self) -> dict[str, Any]:
        """The position in the training samples, for the checkpoint."""
        return dict(self._train_loader.state_dict()) if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a checkpoint's position for the next `train_dataloader`, if it is read for training."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._restored = state_dict


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"data.{name}: must be at least {least}, got {value}")
