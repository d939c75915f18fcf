"""How the kernels of the delta rule are launched. `size` of a row is the larger of the padded K and V."""

from __future__ import annotations

from kernels.tiles import Key, Tile, TileTable

# A serial pass takes its narrow tile where the wide one would leave most multiprocessors without a program.
FEW_PROGRAMS = 64

# Products of four warps with fewer than 64 columns are left out for 16-bit inputs: on Hopper ptxas 12.8 and 13.0 lose uniform registers that hold
# their shared-memory descriptors (docs/log.md). Two warps use no such products, eight were right wherever they were tried.
_SAFE = {
    "scores": Tile(4, 1, {"BK": 32}),
    "solve": Tile(8, 1, {"BK": 64, "BV": 64}),
    "state": Tile(2, 1, {"BV": 16}),
    "state_narrow": Tile(2, 1, {"BV": 16}),
    "dstate": Tile(2, 1, {"BV": 16}),
    "dstate_narrow": Tile(2, 1, {"BV": 16}),
    "dvalues": Tile(8, 1, {"BV": 64}),
    "dscores": Tile(8, 1, {"BK": 32, "BV": 64}),
}
_H100_HALF = Key("sm_90", 2, 128)
_TUNED = {
    "state": {_H100_HALF: Tile(8, 2, {"BV": 128})},
    "state_narrow": {_H100_HALF: Tile(4, 3, {"BV": 32})},
    "dstate": {_H100_HALF: Tile(8, 2, {"BV": 128})},
    "dstate_narrow": {_H100_HALF: Tile(4, 2, {"BV": 32})},
}
TILES = TileTable("delta_rule", _SAFE, _TUNED)
