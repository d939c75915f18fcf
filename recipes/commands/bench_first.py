"""The first call of an implementation: forward and backward in a fresh process with an empty Triton cache.

python -m recipes.commands.bench_first '{"what": "gdn2", "ours": true, "shape": [4, 4096, 16, 128, 128, 1], "dtype": "bfloat16"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace

from recipes.commands.bench_timing import Entry
from recipes.commands.problems import Shape

OP_OF = {"conv+silu+norm": "conv", "gates": "gates", "gated_rms_norm": "norm", "l2_norm": "l2norm", "ssd": "ssd", "siso": "siso"}


def first_call_seconds(entry: Entry, shape: Shape, given: Namespace) -> float | None:
    """The time, None if the process fails. Starting Python and making the inputs do not count."""
    request = {"what": entry.what, "ours": entry.impl == "ours", "shape": list(shape), "dtype": given.dtype}
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "recipes.commands.bench_first", json.dumps(request)]
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"first call of {entry.what}, {entry.impl}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(done.stdout.split()[-1])


def main(request: str) -> None:
    """Prints the seconds of the first call."""
    import torch

    from recipes.commands import bench_groups
    from recipes.commands.bench_arguments import dtype_of

    given = json.loads(request)
    mixer = given["what"].partition("+")[0]
    wanted = bench_groups.groups(
        OP_OF.get(given["what"], "delta"),
        [mixer] if mixer != "attention" else ["gdn2"],
        Shape(*given["shape"]),
        dtype_of(given["dtype"]),
        [] if given["ours"] else ["fla", "sdpa", "mamba_ssm"],
    )
    entries = (entry for group in wanted for entry in group.entries)
    entry = next(e for e in entries if e.what == given["what"] and (e.impl == bench_groups.OURS) == given["ours"])
    torch.cuda.synchronize()
    start = time.perf_counter()
    entry.forward_backward()
    torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1])
