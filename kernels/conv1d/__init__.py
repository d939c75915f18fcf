"""The causal depthwise short convolution, with optional SiLU and per-head L2 norm behind it."""
