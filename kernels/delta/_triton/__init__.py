"""Triton kernels of the delta rule, one stage a file; the launchers are `kernels/delta/forward.py` and `backward.py`."""
