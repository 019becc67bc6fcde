from dex_jax.plot.over_ticks import lattice
from dex_jax.plot.text import DepthText, depth_text

__all__ = ["DepthText", "depth_text", "lattice"]
