"""What Mamba-3 does to the outputs of its recurrence: skip connection, gate, sum over the ranks, in one launch; and the values of every rank."""
