from dex_jax.plot.charts import ead_histogram, speedup_by_k
from dex_jax.plot.over_ticks import lattice
from dex_jax.plot.text import DepthText, depth_text

__all__ = ["DepthText", "depth_text", "ead_histogram", "lattice", "speedup_by_k"]
