"""The gates of the delta rule: log-decay, erase and write, from their logits in one launch."""
