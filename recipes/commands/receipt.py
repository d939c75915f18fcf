"""receipt.json, in every run's folder: what has to be the same for another run to give the same numbers, and how the run ended."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kernels import tiles
from lit_modules.autopsy import FILE as AUTOPSY
from lit_modules.data.shards import INDEX, replace_file
from lit_modules.decoder_lm import DecoderLM
from lit_modules.paths import given_path
from lit_modules.stopping import Stopped
from mixers.errors import ConfigError
from mixers.init import watched
from recipes.commands import gpu_ready, machine
from recipes.commands.cli import MixersCLI
from recipes.commands.run_folder import CONFIG, RECEIPT, RunFolder

FORMAT = 1
PARTS = ("config", "data", "outcome")  # without which two receipts cannot be compared
PACKAGES = ("lightning-mixers", "torch", "lightning", "torchmetrics", "jsonargparse", "numpy")
EXTRAS = ("mamba-ssm", "datasets", "pyarrow", "sentencepiece", "tokenizers")
# variables that decide which algorithm, precision, order of sums or device is used
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE", "PYTHONHASHSEED", "CUBLAS_WORKSPACE_CONFIG")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "TORCHINDUCTOR_", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "ATEN_", "CUDNN_")
SOURCE = Path(__file__).parents[2]  # of a checkout, or where the packages are installed


def read_receipt(path: str | Path, key: str) -> dict[str, Any]:
    """The receipt of a run folder, or in a file.

    Raises:
        ConfigError: there is none, or it is not one.
    """
    file = given_path(path, key)
    file = file / RECEIPT if file.is_dir() else file
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {file} does not exist (legal: a run folder, or its {RECEIPT})") from error
    except OSError as error:
        raise ConfigError(f"{key}: {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{key}: {file} is no receipt: it is not valid JSON") from error
    if not isinstance(content, dict) or content.get("receipt") != FORMAT:
        found = content.get("receipt") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{key}: {file} is no receipt that this version can read (it needs receipt: {FORMAT}, has {found})")
    lost = [part for part in PARTS if not isinstance(content.get(part), dict)]
    if lost or "sha256" not in content["config"]:
        raise ConfigError(f"{key}: {file} is no whole receipt: {', '.join(lost) or 'config.sha256'} is missing")
    return content


@contextmanager
def kept(receipt: Receipt | None) -> Iterator[None]:
    """The training inside is in the receipt: when its model is there, and when and how it has ended. One that is refused leaves no folder."""
    if receipt is None:
        yield
        return
    try:
        with watched(receipt.see):
            yield
    except BaseException as error:
        if isinstance(error, ConfigError) and not receipt.has_stepped:
            receipt.folder.remove()
            raise
        stopped = isinstance(error, (Stopped, KeyboardInterrupt)) or isinstance(error.__context__, KeyboardInterrupt)
        receipt.end("stopped" if stopped else "failed", error)
        raise
    receipt.end("finished")


@final
class Receipt(Callback):
    """The receipt of a run that is under way, a callback of its trainer.

    Args:
        folder: of the run, with its config.
        cli: what has been built.
        argv: the command line.
        backends: a line for every mixer.
        checkpoint: what the training goes on from.
        changed: in what it differs from the training of its checkpoint, the old and the new value by name.

    Raises:
        OSError: it cannot be written, now or before the first step. At the end that is said.
    """

    def __init__(
        self, folder: RunFolder, cli: MixersCLI, argv: list[str], backends: list[str], checkpoint: Path | None, changed: dict[str, tuple[Any, Any]]
    ) -> None:
        self.folder = folder
        self.file = folder.path / RECEIPT
        self._drawn: dict[str, str] = {}  # hashes of initial values by name
        self._trainer = cli.trainer
        self._module = cli.model
        self._first: int | None = None  # the number of the first step
        config = (folder.path / CONFIG).read_bytes()
        self.content: dict[str, Any] = {
            "receipt": FORMAT,
            "started": _now(),
            "ended": None,
            "outcome": {"state": "running"},  # what stays of a run that was killed
            "first_saved": None,  # the step of its first checkpoint
            "command": ["python", "-m", "recipes", "fit", *argv],
            "config": {"file": CONFIG, "sha256": hashlib.sha256(config).hexdigest()},
            "data": _data(cli.datamodule),
            "initial_weights": None,
            "resumed": _resumed(checkpoint, changed),
            "processes": cli.trainer.world_size,
            "strategy": type(cli.trainer.strategy).__name__,
            "versions": _versions(),
            "source": _source(),
            "machine": _machine(),
            "backends": backends,
            "tiles": {},
            "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        }
        self._write()
        cli.trainer.callbacks.append(self)  # type: ignore[attr-defined]

    @property
    def has_stepped(self) -> bool:
        """Whether the training has taken an optimizer step."""
        return self._first is not None and self._trainer.global_step > self._first

    def see(self, name: str, value: Tensor) -> None:
        """An initial value, as `mixers.init.watched` shows it."""
        digest = hashlib.sha256(f"{list(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().numpy())
        self._drawn[name] = digest.hexdigest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        lines = "\n".join(f"{name} {self._drawn[name]}" for name in sorted(self._drawn))
        self.content["initial_weights"] = hashlib.sha256(lines.encode()).hexdigest()
        self.content["processes"] = trainer.world_size
        self._first = trainer.global_step
        self._write()

    def on_checkpoint_saved(self, trainer: Trainer) -> None:
        """Notes the first one: `auto` begins anew only where there never was any."""
        if self.content["first_saved"] is None:
            self.content["first_saved"] = trainer.global_step
            try:
                self._write()
            except OSError:  # a full disk: with the next one again
                self.content["first_saved"] = None

    def end(self, state: str, error: BaseException | None = None) -> None:
        """How the training ended."""
        outcome: dict[str, Any] = {"state": state, "step": self._trainer.global_step, "tokens": self._module.tokens}
        if error is not None:
            error = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error  # Lightning makes SystemExit of Ctrl-C
            outcome["what"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".removesuffix(": ")
            outcome["what"] += "" if state == "failed" or self.has_stepped else ", before the first step"
        if self.file.with_name(AUTOPSY).is_file():
            outcome["autopsy"] = AUTOPSY
        ran = {
            f"{op} {kernel}: {key.architecture}, {key.itemsize} bytes, size {key.size}": t.options() for (op, kernel, key), t in tiles.used.items()
        }
        self.content |= {"ended": _now(), "outcome": outcome, "tiles": dict(sorted(ran.items()))}
        try:
            self._write()
        except OSError as error:  # what was trained counts more
            print(f"receipt: {self.file} could not be written: {error.strerror or error}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        replace_file(self.file, json.dumps(self.content, indent=1, default=str).encode())


def backends_of(lm: DecoderLM, precision: str) -> list[str]:
    """What every mixer's ops run on without a GPU; `gpu_ready.get_ready` says it for one."""
    dtype, cpu = gpu_ready.DTYPES.get(precision, torch.float32), torch.device("cpu")
    return gpu_ready.name_backends(lm, gpu_ready.trace_all(lm, dtype, cpu), dtype, cpu)


def _matters(variable: str) -> bool:
    return variable in ENVIRONMENT or (variable.startswith(PREFIXES) and not variable.endswith(("_DIR", "_PATH", "_FILE")))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _data(data: Any) -> dict[str, Any]:
    about: dict[str, Any] = data.describe()
    for key in ("path", "val_path"):
        index = Path(str(getattr(data, key))).expanduser() / INDEX
        if index.is_file():
            about[f"{key}_index"] = hashlib.sha256(index.read_bytes()).hexdigest()
    return about


def _resumed(checkpoint: Path | None, changed: dict[str, tuple[Any, Any]]) -> dict[str, Any] | None:
    """The checkpoint, the receipt of the run that wrote it while both lie where that run left them, and what has changed since."""
    if checkpoint is None:
        return None
    found = next((folder / RECEIPT for folder in list(checkpoint.absolute().parents)[:2] if (folder / RECEIPT).is_file()), None)
    differs = {name: f"{old} -> {new}" for name, (old, new) in changed.items()}
    return {"checkpoint": str(checkpoint), "receipt": None if found is None else str(found), "changed": differs}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {name: machine.installed(name) for name in (*PACKAGES, *EXTRAS)}
    versions |= {"python": platform.python_version(), "torch": torch.__version__, "triton": machine.triton_version()}
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {**versions, "cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def _source() -> dict[str, Any]:
    """The project's own code: a hash of it, and its commit if it is a checkout."""
    digest = hashlib.sha256()
    for package in ("kernels", "lit_modules", "mixers", "recipes"):
        for file in sorted((SOURCE / package).rglob("*.py")):
            digest.update(f"{file.relative_to(SOURCE).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    commit, changes = (_git(*words) if (SOURCE / ".git").exists() else None for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    return {"sha256": digest.hexdigest(), "commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(SOURCE), *words], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "driver": machine.driver_version(Path("/proc/driver/nvidia/version")),
    }
