"""Mamba-3's keys and queries: biases added, turned by running angles, for every head and rank in one launch."""
