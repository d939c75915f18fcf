"""Queries and keys divided by their lengths, head by head, in one launch."""
