"""Pictures of depth exploration: text coloured by depth, and the lattice over ticks.

`depth_text` needs nothing; `lattice` needs matplotlib (the extra `plot`) and returns a matplotlib Figure,
which a notebook shows and `figure.savefig("name.png")` writes.
"""

from dex_jax.plot.over_ticks import lattice
from dex_jax.plot.text import DepthText, depth_text

__all__ = ["DepthText", "depth_text", "lattice"]
