"""The studies that run from a clone of the repository only: the rivals of DEX."""
