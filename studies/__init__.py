"""The studies that are run from the repository alone: the rivals of DEX."""
