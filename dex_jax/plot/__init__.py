"""Pictures of depth exploration: text coloured by depth, the lattice over ticks, and charts.

`depth_text` needs nothing; the others need matplotlib (the extra `plot`) and return a matplotlib Figure,
which a notebook shows and `figure.savefig("name.png")` writes.
"""

from dex_jax.lazy import names

__getattr__, __dir__, __all__ = names(__name__, __file__)
