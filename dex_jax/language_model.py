"""A loaded model: weights on the device, configuration and tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.grid import check_depths, even_depths, nearest_depths
from dex_jax.host_memory import return_free_memory
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.exits_file import default_exits
from dex_jax.io.jax_cache import keep_programs
from dex_jax.io.opening import open_checkpoint
from dex_jax.io.prompts import Prompt, encode_prompt
from dex_jax.io.save import save_model
from dex_jax.io.tokenizer import Tokenizer
from dex_jax.nn import cache, few_rows
from dex_jax.nn.blocks import FORMATS
from dex_jax.nn.forward import extend
from dex_jax.nn.packed import INT8, Packed, joined, to_int8
from dex_jax.nn.placing import build_on_mesh
from dex_jax.nn.planes import PLANES
from dex_jax.nn.products import DISTRUSTED, compiled_for
from dex_jax.nn.sharding import STAGE, TENSOR, bits_of, check_model, check_stages, make_mesh
from dex_jax.nn.transformer import Staged, Transformer, build
from dex_jax.nn.trial import try_kernels
from dex_jax.nn.weights import Packing, abstract_weights, canonical_weights, merge_model, weight_bytes
from dex_jax.progress import notify

LARGE_TENSOR = 2**22
"""Number of bytes of a tensor from which on freed memory is given back after it has been read."""

WEIGHTS = ("stored", "int8", "dense")
"""The forms that weights may be kept in."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Described:
    """The properties of a model that prompts and reports need, also before its weights are loaded."""

    config: ModelConfig
    tokenizer: Tokenizer | None
    source: str
    dtype: jnp.dtype
    packing: Packing

    @property
    def weights_kind(self) -> str:
        """The formats that weights are kept in: "float32", "Q4_1 and Q8_0", "int8"."""
        names = {format for _, runs in self.packing for format, _ in runs}
        kinds = " and ".join(sorted(name.removesuffix(PLANES) for name in names))
        return kinds + PLANES * any(name.endswith(PLANES) for name in names) if names else str(self.dtype)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a sequence, by the configuration and the chat template, ascending."""
        from_template = () if self.tokenizer is None else self.tokenizer.eos_ids
        return tuple(sorted({*self.config.eos_ids, *from_template}))

    def encode(self, prompt: Prompt, chat: bool = True) -> list[int]:
        """Return the token ids of a prompt; see `dex_jax.io.prompts.encode_prompt`."""
        return encode_prompt(prompt, self.tokenizer, self.config.vocab_size, self.source, chat)


class LanguageModel(Described):
    """A transformer ready to decode.

    Attributes:
      config: shapes and constants.
      tokenizer: text to ids and back; None when the checkpoint has none (prompts are then token ids).
      source: where the weights came from.
      fingerprint: short hexadecimal digest of the backbone.
      dtype: of hidden states and caches, and of weights that are not packed.
      packing: which kernels stay packed, () for none; `weights_kind` says it in words.
      mesh: the devices it is spread over; None for one device.
      layout: Staged(depths) on a mesh, None on one device.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        source: str,
        fingerprint: str,
        mesh: Mesh | None = None,
        packing: Packing = (),
    ):
        keep_programs()
        self.mesh = mesh
        self.packing = packing
        self.config = model.config
        self.tokenizer = tokenizer
        self.source = source
        self.fingerprint = fingerprint
        self.dtype = model.dtype
        self.layout = model.layout
        self.weights = nnx.state(model)

    def __repr__(self) -> str:
        c, where = self.config, "" if self.mesh is None else f", on {self.mesh.size} devices"
        return (
            f"LanguageModel({self.source}: {c.num_layers} layers of width {c.width}, vocabulary of {c.vocab_size}, "
            f"{self.parameter_bytes / 1e6:.1f} MB in {self.weights_kind}{where})"
        )

    @property
    def parameter_bytes(self) -> int:
        """Number of bytes of all weights."""
        return sum(leaf.size * bits_of(leaf.dtype) // 8 for leaf in jax.tree.leaves(self.weights))

    def save(self, folder: str | Path) -> Path:
        """Write a Hugging Face directory with dense weights; see `dex_jax.io.save.save_model`, also for its errors.

        Raises:
          DexError: the model lies on a mesh.
        """
        if self.mesh is not None:
            raise DexError(f"{self.source} lies on a mesh: to save it, load it without")
        weights = canonical_weights(self.config, self.weights)
        return save_model(folder, self.config, weights, self.tokenizer)

    def logits(self, tokens: jax.Array | np.ndarray | Sequence[Sequence[int]]) -> jax.Array:
        """Compute the final logits at every position, on one device: tokens [B, T] int32 -> [B, T, V] float32.

        Raises:
          DexError: the model lies on a mesh, where `dex_jax.decoding.check.logits_of` gives them.
        """
        if self.mesh is not None:
            raise DexError(f"{self.source} lies on a mesh: dex_jax.decoding.check.logits_of gives its logits")
        return _full_logits(self.config, self.weights, jnp.asarray(tokens, jnp.int32))


@dataclasses.dataclass(eq=False)
class Outline(Described):
    """All of a model but its weights: enough to check prompts and options, and to compile."""

    checkpoint: Checkpoint  # opened, nothing read
    dtype: jnp.dtype  # that the weights will have
    packing: Packing = ()  # which kernels stay packed
    mesh: Mesh | None = None  # where they will lie; None for one device
    layout: Staged | None = None  # how, on a mesh

    def __post_init__(self) -> None:
        keep_programs()
        self.config, self.source = self.checkpoint.config, self.checkpoint.source
        self.tokenizer = self.checkpoint.tokenizer

    @property
    def fingerprint(self) -> str:
        """Short hexadecimal digest of the backbone."""
        return self.checkpoint.fingerprint()

    @property
    def weights(self) -> Any:
        """The shapes of the weights as jax.ShapeDtypeStruct."""
        return abstract_weights(self.config, self.dtype, self.packing, self.layout)

    def load(self, on_tensor: Callable[[int, int], None] | None = None) -> LanguageModel:
        """Load the model, one tensor at a time, with `on_tensor` as in `load`; raise DexError like `load`."""
        notify("loading the model")
        read = _reader(self.checkpoint, self.dtype, self.packing, on_tensor)
        try:
            if self.mesh is None:
                model = build(self.config, read, self.dtype)
            else:
                assert self.layout is not None
                model = build_on_mesh(self.config, self.layout, read, self.dtype, self.mesh, self.packing)
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise DexError(
                    f"the weights of {self.source} do not fit into memory in {self.weights_kind}: use "
                    "int8 weights, a smaller dtype or a smaller model (decode.py --dry-run shows what each needs)"
                ) from error
            raise
        return_free_memory()
        return LanguageModel(model, self.tokenizer, self.source, self.fingerprint, self.mesh, self.packing)


def outline(
    source: str,
    dtype: str | None = None,
    layout: Staged | None = None,
    mesh: str | dict[str, int] | Mesh | None = None,
    weights: str | None = None,
) -> Outline:
    """Open a model without reading its weights; arguments and errors are those of `load`."""
    chosen, spread = resolve_dtype(dtype), None if mesh is None else make_mesh(mesh)
    checkpoint = open_checkpoint(source)
    stored = {format for parts in checkpoint.formats().values() for format, _ in parts} & FORMATS.keys()
    # Drafters are kept in 8 bits.
    few_rows.start_build({INT8, *(stored if stored and weights in (None, "stored") else (str(chosen),))})
    if spread is None and layout is not None:
        raise DexError("layout=Staged(...) spreads a model over a mesh: say which, with mesh=")
    layout = None if spread is None else layout_on_mesh(checkpoint, layout, spread)
    return Outline(checkpoint, chosen, packing_of(checkpoint, chosen, spread, weights), spread, layout)


def packing_of(
    checkpoint: Checkpoint, dtype: jnp.dtype, mesh: Mesh | None, weights: str | None, platform: str | None = None
) -> Packing:
    """Return which kernels stay packed: those that `weights`, as in `load`, asks for and the device computes rightly.

    Say on stderr which formats of a file become dense in `dtype`. `platform` is that of the device, by default of the
    one at hand. On one TPU blocks lie in planes (nn/planes.py); on a mesh they do not, as jax 0.10 takes no arrays of
    4 bits that are split over devices. Raise DexError for unknown `weights`, or ones that the mesh cannot split.
    """
    if weights not in (None, *WEIGHTS):
        raise DexError(f"unknown weights {weights!r}: choose one of {', '.join(WEIGHTS)}")
    try_kernels()
    split = mesh is not None and mesh.shape[TENSOR] > 1
    formats = checkpoint.formats()
    blocks = any(format in FORMATS for parts in formats.values() for format, _ in parts)
    if weights == "dense" or (weights is None and (split or not blocks or few_rows.language() == "XLA")):
        return ()
    if split and weights == "stored" and blocks:
        raise DexError("a tensor axis cannot cut a file's blocks: take weights='int8' or 'dense' there")
    if weights == "int8":
        return tuple((name, ((INT8, sum(rows for _, rows in parts)),)) for name, parts in formats.items())
    suffix = PLANES if mesh is None and (platform or compiled_for().platform) == "tpu" else ""
    if suffix in DISTRUSTED:
        return ()
    packed = {
        name: tuple((format + suffix, rows) for format, rows in _runs(parts))
        for name, parts in formats.items()
        if all(each in FORMATS for each, _ in parts)
    }
    if mesh is not None:  # an array holds a layer of every stage
        fields = {name.split(".")[-1] for name in formats if name.startswith("layers.")}
        for field in fields:
            own = [name for name in formats if name.startswith("layers.") and name.endswith(f".{field}")]
            if len({packed.get(name) for name in own}) > 1:
                packed = {name: runs for name, runs in packed.items() if name not in own}
    dense = sorted({format for name, parts in formats.items() if name not in packed for format, _ in parts})
    if blocks and dense:
        print(f"matrices with parts in {', '.join(dense)} do not stay packed: they are {dtype}", file=sys.stderr)
    return tuple(packed.items())


def _runs(parts: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """Join neighbours of one format among parts that lie one above the other."""
    return tuple(
        (format, sum(rows for _, rows in run)) for format, run in itertools.groupby(parts, key=operator.itemgetter(0))
    )


def layout_on_mesh(checkpoint: Checkpoint, layout: Staged | None, mesh: Mesh) -> Staged:
    """Return the given layout, or the grid of the model's default exits for so many stages; errors as in `load`."""
    config = checkpoint.config
    check_model(mesh, config)
    if layout is None:
        depths, trained = even_depths(mesh.shape[STAGE], config.num_layers), default_exits(checkpoint.fingerprint())
        if trained is not None and len(depths) - 1 <= trained.count:
            depths = (*nearest_depths(depths[:-1], trained.config.depths, trained.source), config.num_layers)
        return Staged(check_depths(depths, config.num_layers))
    check_stages(mesh, len(layout.depths))
    return Staged(check_depths(layout.depths, config.num_layers), len(layout.depths) // mesh.shape[STAGE])


def load(
    source: str,
    dtype: str | None = None,
    layout: Staged | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
    mesh: str | dict[str, int] | Mesh | None = None,
    weights: str | None = None,
) -> LanguageModel:
    """Load a model, one tensor at a time.

    Args:
      source: an alias ("smollm2-135m"), a .gguf file, a Hugging Face directory, or a hub id "owner/name".
      dtype: "float32", "bfloat16" or "float16", which on a CPU is float32; None chooses `default_dtype()`.
      layout: on a mesh Staged(depths); None is the grid that `generate` uses for so many explorers.
      on_tensor: called with (bytes so far, bytes in all) after each tensor, for a progress bar.
      mesh: devices to spread the model over: "stage=5", "stage=2,tensor=3", "data=2,stage=2", the same as a dict, or a
        jax Mesh with axes of these names. Each tensor goes to the devices that own it and passes through no other.
        `generate` then runs there: explorers on the devices of their stages, and AR and the prompt from stage to stage.
      weights: the form that kernels are kept in. "stored" leaves the blocks of 4 to 8 bits of a .gguf file packed:
        they stand for exactly the numbers that "dense" makes of them, and on CPUs are multiplied with rows of 16 bits.
        "int8" is 8 bits a weight and a scale for each output, another model than the checkpoint. None is "stored" on
        CPUs with a C++ compiler and without a tensor axis, else "dense".

    Raises:
      DexError: nothing of that name, missing or truncated weights, an architecture or dtype that is not covered, no
        memory for the weights, a mesh that has more devices than there are or that cannot cut the model, or weights
        that cannot stay packed there.
    """
    return outline(source, dtype, layout, mesh, weights).load(on_tensor)


def resolve_dtype(name: str | None) -> jnp.dtype:
    """Return the dtype of a name of DTYPES, or `default_dtype()` for None; raise DexError for another name.

    On a CPU float16 is float32, and a line says so.
    """
    if name is None:
        return default_dtype()
    if name not in DTYPES:
        raise DexError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")
    if name == "float16" and jax.devices()[0].platform == "cpu":
        print("float16 takes minutes to compile on a CPU and is slow there: float32 is used", file=sys.stderr)
        return jnp.dtype(jnp.float32)
    return jnp.dtype(DTYPES[name])


def default_dtype() -> jnp.dtype:
    """Return float32 on CPUs, which have to widen bfloat16, float16 on old GPUs, and bfloat16 elsewhere.

    GPUs below compute capability 8 (a T4, for one) have no bfloat16 units.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return jnp.dtype(jnp.float32)
    # AMD's GPUs give a name here, such as gfx942.
    capability = getattr(device, "compute_capability", None) or ""
    if device.platform == "gpu" and capability[:1].isdigit() and float(capability) < 8:
        return jnp.dtype(jnp.float16)
    return jnp.dtype(jnp.bfloat16)


def _reader(
    checkpoint: Checkpoint, dtype: jnp.dtype, packing: Packing, on_tensor: Callable[[int, int], None] | None
) -> Callable[[str], np.ndarray | Packed]:
    """Return a function that reads canonical tensors, packed or not, and frees memory after large ones."""
    sizes, runs = weight_bytes(checkpoint.config, dtype, packing), dict(packing)
    total, done = sum(sizes.values()), 0

    def tensor(name: str) -> np.ndarray | Packed:
        if name not in runs:
            return checkpoint.read(name)
        if runs[name][0][0] == INT8:
            return to_int8(checkpoint.read(name))
        return joined(checkpoint.blocks(name), runs[name])

    def read(name: str) -> np.ndarray | Packed:
        nonlocal done
        found = tensor(name)
        done += sizes[name]
        if sizes[name] >= LARGE_TENSOR:
            return_free_memory()
        if on_tensor is not None:
            on_tensor(done, total)
        return found

    return read


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(config: ModelConfig, weights: Any, tokens: jax.Array) -> jax.Array:
    batch, length = tokens.shape
    config = config.at_length(length)
    model = merge_model(config, weights)
    memory = cache.allocate(config, batch, length, 0, model.dtype)
    states, _ = extend(model, memory, tokens, jnp.zeros(batch, jnp.int32))
    return model.logits(states[-1])
