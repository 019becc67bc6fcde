"""Training of exit heads: data, losses, trainer."""
