"""Triton kernels of the convolution, one stage a file; the launchers are `kernels/conv1d/forward.py` and `backward.py`."""
