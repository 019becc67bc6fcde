"""Depth Exploration Decoding (DEX, arXiv 2606.29223) in JAX: faster decoding, not one token changed.

public.py has the package's names. They are imported when the first is used (PEP 562), as JAX and flax take seconds to
import and `decode.py --help` has no use for them.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dex_jax.public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Return a module of this package, or what public.py has under the name."""
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        return globals().setdefault(name, getattr(importlib.import_module(f"{__name__}.public"), name))

    def __dir__() -> list[str]:
        return [*globals(), *importlib.import_module(f"{__name__}.public").__all__]
