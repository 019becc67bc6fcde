"""The methods that DEX is compared with, as any user's own methods: their loop comes with them."""

from studies.rivals.dynamic import DEL
from studies.rivals.methods import AdaDecode, LayerSkip, layer_steps

__all__ = ["DEL", "AdaDecode", "LayerSkip", "layer_steps"]
