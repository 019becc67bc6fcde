"""Checkpoints, tokenizers and where they come from."""
