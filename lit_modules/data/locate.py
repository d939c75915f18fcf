"""Where a window of a token stream lies: in which documents, and in which shard."""

from __future__ import annotations

from typing import Any

import numpy as np

from lit_modules.data.shards import STARTS, ShardStream
from lit_modules.data.stream import TokenStream
from lit_modules.data.windows import Windows


def locate(windows: Windows, sample: int) -> dict[str, Any]:
    """Sample number `sample` of `windows`, as plain values.

    Keys: sample, epoch, window, tokens ([first, behind] in the stream), and where they lie: a list of pieces, one for each shard (one in all for
    text in memory), each with shard (its name; None), tokens ([first, behind] in the shard) and documents ([first, last], counted in the shard).
    """
    window = windows.window_of(sample)
    start, stop = window * windows.seq_len, (window + 1) * windows.seq_len + 1
    stream = windows.stream
    pieces = _in_shards(stream, start, stop) if isinstance(stream, ShardStream) else []
    if isinstance(stream, TokenStream):
        pieces = [_piece(None, stream.starts, start, stop)]
    return {"sample": sample, "epoch": sample // len(windows), "window": window, "tokens": [start, stop], "in": pieces}


def _in_shards(stream: ShardStream, start: int, stop: int) -> list[dict[str, Any]]:
    pieces, begin = [], 0
    for shard in stream.index.splits[stream.split]:
        end = begin + shard.tokens
        if begin < stop and start < end:
            starts = np.fromfile(stream.index.folder / f"{shard.name}.starts", STARTS)
            pieces.append(_piece(shard.name, starts, max(start, begin) - begin, min(stop, end) - begin))
        begin = end
    return pieces


def _piece(shard: str | None, starts: Any, first: int, behind: int) -> dict[str, Any]:
    documents = (np.searchsorted(starts, (first, behind - 1), side="right") - 1).tolist()
    return {"shard": shard, "tokens": [first, behind], "documents": documents}
