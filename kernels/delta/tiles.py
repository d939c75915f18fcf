"""How the kernels of the delta rule are launched. `size` of a row is the larger of the padded K and V, or the smaller if that is below 64: the tiles
of larger sizes do not suit it. `_hopper`: the kernels of `_gluon`."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# A serial pass takes its narrow tile where the wide one would leave most multiprocessors without a program.
FEW_PROGRAMS = 64
# Serial passes of `_hopper` take a multiprocessor a program, of which an H100 has so many: a program has as many more columns than in the table as
# make all run at once, up to what shared memory holds. Where that is not enough, and for packed documents, the transposed one takes the forward pass.
AT_ONCE, MOST_COLUMNS, TRANSPOSED_COLUMNS = 132, {"state": 32, "dstate": 64}, 64

# On Hopper ptxas 12.8 and 13.0 lose uniform registers that hold where in shared memory the operands of a product lie (docs/log.md): with 16-bit
# inputs many tiles of four warps with fewer than 64 columns are wrong, and `dscores` of eight if one block holds all of 64 value columns; in float32
# several of eight with 16 (op.py gives no kernel fewer than 32). tests/sass.py finds them; no tile below is one of them. `scan` is wrong with four
# warps in float32 or for 32 columns, where it takes its narrow tile.
_SAFE = {
    "scores": Tile(4, 1, {"BK": 32}),
    "solve": Tile(8, 1, {"BK": 64, "BV": 64}),
    "scan": Tile(4, 1, {"BV": 64}),
    "scan_narrow": Tile(2, 1, {"BV": 32}),
    "dscan": Tile(4, 1, {"BV": 64}),
    "state": Tile(2, 1, {"BV": 16}),
    "state_narrow": Tile(2, 1, {"BV": 16}),
    "dstate": Tile(2, 1, {"BV": 16}),
    "dstate_narrow": Tile(2, 1, {"BV": 16}),
    "dvalues": Tile(8, 1, {"BV": 64}),
    "dscores": Tile(8, 1, {"BK": 32, "BV": 32}),
    "dscores_hopper": Tile(8, 1, {"BK": 64, "BV": 64}),
    "state_hopper": Tile(4, 3, {"BV": 32}),
    "state_transposed_hopper": Tile(4, 3, {"BV": 64}),
    "dstate_hopper": Tile(4, 3, {"BV": 32}),
    "dstates_hopper": Tile(4, 3, {"BV": 64}),
    "dchunks_hopper": Tile(8, 2),
}
_H100_HALF = Key("sm_90", 2, 128)
_H100_HALF_64 = Key("sm_90", 2, 64)
_TUNED = {
    "scan": {_H100_HALF_64: Tile(4, 3, {"BV": 64}), _H100_HALF: Tile(4, 2, {"BV": 64})},
    "dscan": {_H100_HALF_64: Tile(4, 2, {"BV": 64}), _H100_HALF: Tile(4, 2, {"BV": 64})},
    "solve": {_H100_HALF: Tile(4, 1, {"BK": 64, "BV": 128})},
    "state_hopper": {_H100_HALF: Tile(4, 3, {"BV": 16})},
    "state_transposed_hopper": {_H100_HALF: Tile(4, 3, {"BV": 64})},
    "dstate": {_H100_HALF: Tile(8, 2, {"BV": 128})},
    "dstate_hopper": {_H100_HALF: Tile(4, 3, {"BV": 16})},
    "dvalues": {_H100_HALF: Tile(4, 1, {"BV": 128})},
    "dscores_hopper": {_H100_HALF: Tile(8, 1, {"BK": 64, "BV": 128})},
    "dstates_hopper": {_H100_HALF_64: Tile(4, 3, {"BV": 64}), _H100_HALF: Tile(4, 3, {"BV": 64})},
    "dchunks_hopper": {_H100_HALF_64: Tile(8, 2), _H100_HALF: Tile(8, 2)},
}
TILES = TileTable("delta_rule", _SAFE, _TUNED)

# what `bench tune` tries
CANDIDATES = {name: [Tile(warps, stages, {"BV": 64}) for warps in (4, 8) for stages in (1, 2, 3)] for name in ("scan", "dscan")}
