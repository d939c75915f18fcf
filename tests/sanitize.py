"""Small problems on every kernel, for a memory checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

Without torch's cache every tensor is an allocation of its own, so a read or write past its end is seen. Words select trials of `doctor` that contain
all of them. Sequences without erase are divided into segments, however short. Prints a line a trial, and exits with 1 if one was wrong.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout beside this file, installed or not

from kernels.delta import scan
from recipes.commands import checks


def main(words: list[str]) -> int:
    if not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        print("PYTORCH_NO_CUDA_MEMORY_CACHING=1 is not set: accesses into the allocator's own blocks would not be seen", file=sys.stderr)
        return 2
    scan.how_many = lambda chunks, _states: min(chunks, 3)  # a sequence long enough to be divided otherwise takes minutes here
    trials = [trial for trial in checks.select(dtypes=(torch.bfloat16, torch.float32)) if "long" not in trial.label]
    chosen = [trial for trial in trials if all(word in trial.label for word in words)]
    wrong = 0
    for trial in chosen:
        result = checks.attempt(trial, torch.device("cuda"))
        wrong += not result.passed
        print(f"{'ok' if result.passed else 'WRONG'}  {result.label}  {result.worst or 0:.1e}  {result.note}", flush=True)
    print(f"{len(chosen)} problems, {wrong} wrong")
    return int(wrong > 0 or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
