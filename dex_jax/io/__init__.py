"""Checkpoints and tokenizers, and the files that they come from."""
