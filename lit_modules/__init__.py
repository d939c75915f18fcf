"""The language model, its training, and its data. Importing this package imports nothing else."""
