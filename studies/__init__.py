"""What is run from the repository alone: the rivals of DEX."""
