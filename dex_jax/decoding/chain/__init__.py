"""The rivals of DEX, which draft on a chain."""
