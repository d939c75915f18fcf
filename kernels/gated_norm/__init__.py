"""RMSNorm times SiLU of a gate: the output norm of the recurrent mixers, in one launch."""
