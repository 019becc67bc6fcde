"""Pictures of depth exploration: text coloured by depth, and the lattice over ticks.

`depth_text` needs nothing; `lattice` needs matplotlib (the extra `plot`) and returns a matplotlib Figure,
which a notebook shows and `figure.savefig("name.png")` writes.
"""

from dex_jax.lazy import names

__getattr__, __dir__, __all__ = names(__name__, __file__)
