"""Sequence mixers behind one contract (`mixers.base`), found by name (`mixers.registry`)."""
