"""Several processes: the strategies that a config may name; FSDP2, with checkpoints that any strategy reads.

FSDP2 keeps parameters, gradients and optimizer state of a model in shards, one on each process, and gathers the parameters of a unit while it runs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lit_modules.decoder_lm import DecoderLM
from lit_modules.saving import write
from lit_modules.sharded import META, named, numbered
from lit_modules.units import reshard, shard, unsummed_gradients
from mixers.errors import ConfigError, unknown

STRATEGIES = ("auto", "ddp", "fsdp2", "fsdp2_zero2", "fsdp2_sharded_checkpoint")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")  # of fsdp2, and of CPUs


def check_strategy_name(name: str) -> None:
    """ConfigError for a strategy that Lightning does not know, or with which no model of this project can be trained.

    What else Lightning knows (variants of ddp, TPUs) is left to it.
    """
    if name == "auto":
        return
    known = dict(StrategyRegistry).get(name)  # its own `get` makes one
    spawns = known is not None and known["init_params"].get("start_method") == "spawn"  # which a model cannot be pickled for
    if known is None or spawns or issubclass(known["strategy"], (FSDPStrategy, DeepSpeedStrategy)):
        raise unknown("trainer.strategy", "strategy", name, STRATEGIES)


def check_precision(strategy: str, precision: object, accelerator: str, *, here: bool) -> list[str]:
    """ConfigError for a precision in place of which Lightning would take another one, with no more than a warning.

    Args:
        strategy, precision, accelerator: of the trainer.
        here: this machine is the one that trains. Otherwise `auto` may find a GPU there.

    Returns:
        What could not be checked, a line each.
    """
    if str(precision) not in ("16", "16-mixed"):
        return []
    if strategy.startswith("fsdp2"):
        raise ConfigError(f"trainer.precision: fsdp2 takes {', '.join(PRECISIONS)}, got {precision}")
    problem = f"16-mixed needs a GPU; a CPU takes {', '.join(PRECISIONS)}"
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    if on_cpu and (here or accelerator == "cpu"):
        raise ConfigError(f"trainer.precision: {problem}, got {precision}")
    return [f"trainer.precision: {problem}; there is no GPU here"] if on_cpu else []


# How gloo, NCCL and the store in which processes find each other say that one of them is gone
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "remote process exit", "remote server shutdown")


def lost_process(error: RuntimeError) -> str | None:
    """One line for an error that means that another process of the training has ended; None for another error."""
    text = " ".join(str(error).split())
    if text.startswith("DataLoader "):  # its worker exited unexpectedly, or it timed out
        return (
            f"data.num_workers: {text}: a worker process was killed, as the system does where memory is short, or found no room in /dev/shm; "
            "--ckpt_path last goes on from the last checkpoint"
        )
    told = next((words for words in GONE if words.lower() in text.lower()), None)
    if told is None or not (isinstance(error, torch.distributed.DistError) or "gloo" in text):
        return None
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    how = _ended_child() or "what it said, or the system's log if it was killed, tells why"
    return f"process {rank}: another process of this training has ended ({told}): {how}; --ckpt_path last goes on from the last checkpoint"


def _ended_child(seconds: float = 1.0) -> str | None:
    """How a process that this one has started ended, if one has within a time. Who started it can still ask."""
    for _ in range(round(seconds / 0.05) if hasattr(os, "waitid") else 0):
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if found is not None:
            killed = found.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
            return f"pid {found.si_pid} {f'was killed by {signal.Signals(found.si_status).name}' if killed else f'with exit code {found.si_status}'}"
        time.sleep(0.05)
    return None


def leave() -> None:
    """Ends the connection with the other processes when all are through. One that exits without may abort, once in a while."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@final
class FSDP2(ModelParallelStrategy):
    """Lightning's ModelParallelStrategy with FSDP2 over all processes, by the name fsdp2.

    Its checkpoints are those of one device: one file, or a folder that `python -m recipes consolidate` makes into one.

    Args:
        save_distributed_checkpoint: Whether each process writes its shard into a folder. Otherwise the main process gathers all in its memory.
        process_group_backend: Of torch.distributed; null: nccl on GPUs, gloo on CPUs.
        timeout: After which a process that waits for the others gives up.
        reshard_after_forward: Whether a block's parameters are gathered anew for its backward pass. Without it (ZeRO-2) all stay gathered until
            then, and gradients are whole until the last micro-batch of a step, whose backward pass sums them over the processes: less to send, for
            some 2 bytes a parameter (bf16-mixed) and 4 more where micro-batches are accumulated.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        reshard_after_forward: bool = True,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._reshard = reshard_after_forward
        self._folder: Path | None = None  # the sharded checkpoint that is being read

    def _configure_launcher(self) -> None:
        # The first thing that Trainer calls with the precision known
        if self.precision_plugin.precision not in PRECISIONS:
            raise ConfigError(f"trainer.precision: fsdp2 takes {', '.join(PRECISIONS)}, got {self.precision_plugin.precision}")
        super()._configure_launcher()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's default shares only nodes
        super().setup_environment()

    def shard(self, lm: DecoderLM) -> None:
        """Applies FSDP2, if it has not been."""
        if not isinstance(lm, FSDPModule):
            precision = str(self.precision_plugin.precision)
            shard(lm, self.device_mesh["data_parallel"], precision, reshard_after_forward=self._reshard)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the backward pass of every micro-batch of a step but the last."""
        with nullcontext() if self._reshard else unsummed_gradients(self._whole):
            yield

    # Checkpoints. Under FSDP2 Lightning numbers the parameters of an optimizer's state in the model's order; under all other strategies torch numbers
    # them, in the order of the optimizer's groups. From a file of the one the other would give states to wrong parameters, without a word.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state to save: shards by parameter name for a folder; for one file as one device has it, on the main process only."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        whole = not self._save_distributed_checkpoint
        reshard(self._whole)  # the optimizer's parameters are the shards
        state = get_optimizer_state_dict(self._whole, optimizer, options=StateDictOptions(full_state_dict=whole, cpu_offload=True))
        return numbered(state) if whole and state else dict(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        """A folder is written beside its place, then renamed; see `saving.write`."""
        if not self._save_distributed_checkpoint:
            return super().save_checkpoint(checkpoint, filepath, storage_options)
        return write(self, checkpoint, self.broadcast(str(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """What is no tensor; tensors too if it is one file, mapped into memory."""
        path = Path(self.broadcast(checkpoint_path))
        self._folder = path if path.is_dir() else None
        file = path if self._folder is None else path / META
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
        return checkpoint if self._folder is None else {"state_dict": {}, "optimizer_states": [], **checkpoint}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part."""
        options = StateDictOptions(full_state_dict=self._folder is None, strict=strict)
        state = checkpoint["state_dict"]
        if self._folder is not None:
            state = get_model_state_dict(self._whole)
            load({"state_dict": state}, checkpoint_id=self._folder)
        set_model_state_dict(self._whole, state, options=options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Likewise."""
        options = StateDictOptions(full_state_dict=self._folder is None)
        for i, optimizer in enumerate(self.optimizers):
            if self._folder is not None:
                state = {f"optimizer_{i}": get_optimizer_state_dict(self._whole, optimizer)}
                load(state, checkpoint_id=self._folder)
                named_state = state[f"optimizer_{i}"]
            else:
                named_state = named(checkpoint["optimizer_states"][i], self._names(optimizer))
            set_optimizer_state_dict(self._whole, optimizer, named_state, options=options)

    @property
    def _whole(self) -> nn.Module:
        assert self.model is not None
        return self.model

    def _names(self, optimizer: Optimizer) -> list[str]:
        """The names of an optimizer's parameters, in its own order."""
        names = {parameter: name for name, parameter in self._whole.named_parameters()}
        return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2 over all processes; checkpoints are one file", override=True)
StrategyRegistry.register(
    "fsdp2_zero2",
    FSDP2,
    description="FSDP2 with parameters gathered once a micro-batch, and gradients summed once a step",
    override=True,
    reshard_after_forward=False,
)
StrategyRegistry.register(
    "fsdp2_sharded_checkpoint",
    FSDP2,
    description="FSDP2 over all processes; a checkpoint is a folder with a file a process",
    override=True,
    save_distributed_checkpoint=True,
)
