"""The methods that DEX is compared with, written as a user's own methods with a loop of their own."""

from studies.rivals.dynamic import DEL
from studies.rivals.methods import AdaDecode, LayerSkip, layer_steps

__all__ = ["DEL", "AdaDecode", "LayerSkip", "layer_steps"]
