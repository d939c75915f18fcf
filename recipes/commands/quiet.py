"""Keeps a few of Lightning's lines from the terminal: advertisements, what the config says, and warnings about what is meant to be so. No others."""

from __future__ import annotations

import logging
import warnings

NEEDLESS = ("\N{ELECTRIC LIGHT BULB} Tip", "GPU available: ", "TPU available", "Detected KeyboardInterrupt", "Seed set to")
EXPECTED = (
    r"The '\w+' does not have many workers",  # batches are slices of an array in memory
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning calls it so
    r"The dirpath has changed from",  # a resumed run has a folder of its own
    r"Be aware that when using `ckpt_path`, callbacks .*'RunSummary'",  # they only train
    r"Experiment logs directory .* exists and is not empty",  # the run's config lies there before its metrics
)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in NEEDLESS)


def hush() -> None:
    """Filters the messages above; may be called again."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_wanted)  # the same filter is not added twice
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
