"""Gluon kernels of the delta rule for Hopper (sm_90), 16-bit inputs and a decay per channel; the same launchers as `_triton`'s."""
