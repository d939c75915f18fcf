"""A permutation of any number of things that needs no memory: where each goes is computed when it is asked for."""

from __future__ import annotations

from math import isqrt

from lit_modules.data.stream import keyed_hash

ROUNDS = 8  # even; the theory asks for four, of large ranges


def place(seed: int, epoch: int, n: int, position: int) -> int:
    """What stands at `position` of a permutation of 0 .. n - 1, drawn by (seed, epoch).

    A keyed Feistel network over the smallest rectangle a * b that holds the range (Black and Rogaway, 2002): a position is left + a * right, and each
    round adds a keyed hash of one half to the other, modulo a or b in turn. That is a permutation of 0 .. a * b - 1, whatever the hash. A result of n
    or more is put in again until it falls into the range (cycle walking), which makes it one of 0 .. n - 1; with a = ceil(sqrt n) that is seldom.
    """
    a = isqrt(n - 1) + 1  # the smallest number whose square is at least n
    b = -(-n // a)
    while True:
        right, left = divmod(position, a)
        for step in range(0, ROUNDS, 2):
            left = (left + _noise(seed, epoch, step, right)) % a
            right = (right + _noise(seed, epoch, step + 1, left)) % b
        position = left + a * right
        if position < n:
            return position


def _noise(seed: int, epoch: int, step: int, half: int) -> int:
    """64 bits."""
    return keyed_hash("place", seed, b"%d %d %d" % (epoch, step, half))
