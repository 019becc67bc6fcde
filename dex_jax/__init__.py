"""Depth Exploration Decoding (DEX, arXiv 2606.29223) in JAX: faster decoding, not one token changed.

Its names stand in __init__.pyi and are imported when they are asked for: JAX alone takes two seconds, and
`decode.py --help` has no use for it.
"""

from dex_jax.lazy import names
from dex_jax.versions import check_versions

check_versions()  # before jax and flax are imported

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = names(__name__, __file__)
