"""The public names of the package, by plain imports."""

from dex_jax import plot
from dex_jax.config import ExitsConfig, LayerKind, ModelConfig, RopeScaling
from dex_jax.decoding.dex.interface import Committed, DexState, Drafter, DraftRows, Exits, Network, StageView
from dex_jax.decoding.dex.loop import init, run, step
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.generate import generate, stream
from dex_jax.decoding.output import Output, Stats
from dex_jax.decoding.plan import Plan
from dex_jax.decoding.record import Limits, Record
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.trace import Trace, TracedNode, trace, watch
from dex_jax.errors import DexError
from dex_jax.io.eagle import EagleHead, load_eagle
from dex_jax.io.exits_file import TrainedExits, load_exits, save_exits
from dex_jax.language_model import LanguageModel, load
from dex_jax.lattice import Lattice
from dex_jax.nn.transformer import Staged, Transformer
from dex_jax.sampling import Sampling

__all__ = [
    "AR",
    "Committed",
    "Dex",
    "DexError",
    "DexState",
    "DraftRows",
    "Drafter",
    "EagleHead",
    "Exits",
    "ExitsConfig",
    "LanguageModel",
    "Lattice",
    "LayerKind",
    "Limits",
    "ModelConfig",
    "Network",
    "Output",
    "Plan",
    "Record",
    "Request",
    "RopeScaling",
    "Sampling",
    "StageView",
    "Staged",
    "Stats",
    "Trace",
    "TracedNode",
    "TrainedExits",
    "Transformer",
    "TreeShape",
    "generate",
    "init",
    "load",
    "load_eagle",
    "load_exits",
    "plot",
    "run",
    "save_exits",
    "step",
    "stream",
    "trace",
    "watch",
]
