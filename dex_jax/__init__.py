"""Depth Exploration Decoding (DEX, arXiv 2606.29223) in JAX: faster decoding, not one token changed."""

from dex_jax.config import ModelConfig, RopeScaling
from dex_jax.decoding.generate import generate, stream
from dex_jax.decoding.interface import Exits, Network, StageView
from dex_jax.decoding.loop import DexState, init, run, step
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.output import Output, Stats
from dex_jax.decoding.record import Limits, Record
from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel, load
from dex_jax.lattice import Lattice
from dex_jax.nn.transformer import Stacked, Transformer, Unrolled
from dex_jax.sampling import Sampling

__version__ = "0.1.0"

__all__ = [
    "AR",
    "Dex",
    "DexError",
    "DexState",
    "Exits",
    "LanguageModel",
    "Lattice",
    "Limits",
    "ModelConfig",
    "Network",
    "Output",
    "Record",
    "RopeScaling",
    "Sampling",
    "Stacked",
    "StageView",
    "Stats",
    "Transformer",
    "Unrolled",
    "generate",
    "init",
    "load",
    "run",
    "step",
    "stream",
]
