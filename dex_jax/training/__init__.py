"""The training of exit heads: data, losses, trainer."""
