"""Pictures of depth exploration: text coloured by depth, the lattice over ticks, and a page that plays it.

`depth_text` and `player` need nothing; `lattice` needs matplotlib (the extra `plot`) and returns a matplotlib Figure,
which a notebook shows and `figure.savefig("name.png")` writes.
"""

from dex_jax.plot.over_ticks import lattice
from dex_jax.plot.player import Player, player
from dex_jax.plot.text import DepthText, depth_text

__all__ = ["DepthText", "Player", "depth_text", "lattice", "player"]
