"""DEX: the tick, what it asks of a network, and the transformer behind it."""
