"""RMSNorm, times SiLU of a gate where there is one: the output norm of the recurrent mixers, in one launch."""
