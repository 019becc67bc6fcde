"""A program that decodes on meshes of forced host devices and writes one result per case, for tests/test_mesh.py.

python mesh_worker.py FOLDER NAME ...     (XLA_FLAGS=--xla_force_host_platform_device_count=8)
"""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from reference.checkpoints import write_checkpoint
from reference.small_models import LLAMA, ragged_prompts, random_drafter, random_exits, random_reader, small_model
from reference.steady_ticks import steady_seconds
from test_io_gguf import write_gguf

import dex_jax
from dex_jax import AR, Dex, Staged
from dex_jax.config import ModelConfig
from dex_jax.decoding.check import logits_of
from dex_jax.decoding.dex.drafters import draft_model
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.plan import GivenHeads, Plan, plan_for
from dex_jax.decoding.program import _PROGRAMS
from dex_jax.decoding.request import Request
from dex_jax.decoding.session import PREFILL, RUN, START, Session
from dex_jax.grid import even_depths
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.nn.placing import build_on_mesh
from dex_jax.nn.sharding import STAGE, make_mesh, parse_mesh
from dex_jax.nn.transformer import Transformer

TOKENS = 10
TREE = TreeShape((2, 1), 2, (0.3, *[0.7] * 7))
CHOSEN = dataclasses.replace(TREE, rungs=(1, 3))
SEED = 11
AXES = "data=2,stage=2,tensor=2"

# The families have biases, norms of heads, tied and untied embeddings, 9 and 3 heads, and windows that differ by stage.
# Each has a mesh, and a method if tokens are generated. The ticks of `Dex(explorers=2)` choose their rows.
CHECKPOINTS = {
    "llama_attention_bias": ("stage=2,tensor=2", Dex(explorers=2)),
    "qwen3": ("stage=3,tensor=2", None),
    "smollm2": ("stage=2,tensor=3", None),
    "gemma3": ("stage=3", Dex(draft=TREE)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One decoding that runs on a mesh and on one device."""

    name: str  # the name of its result
    mesh: str  # as `make_mesh` takes it
    layers: int
    method: str = "dex"  # or "ar"
    sampled: bool = False
    batch: int = 1
    exits: tuple[str, bool, int | None] | None = None  # (kind, fused, draft vocabulary), None for the model's own
    filters: bool = False  # top-k and top-p
    head_dim: int = LLAMA.head_dim
    drafts: str | None = None  # "text", "drafter" or "model"
    chosen: bool = False  # whether ticks choose their rows and drafted levels
    explorers: int | None = None  # K; None is one explorer per stage of the mesh

    @property
    def config(self) -> ModelConfig:
        """Configuration of the model."""
        return dataclasses.replace(LLAMA, num_layers=self.layers, head_dim=self.head_dim)

    @property
    def plan(self) -> Plan:
        """Plan of DEX, by default with one explorer per stage; the mesh of an AR case takes its depths from it too."""
        draft = False if self.drafts is None else CHOSEN if self.chosen else TREE
        return plan_for(Dex(explorers=self.explorers or parse_mesh(self.mesh)["stage"], draft=draft), self.layers)

    @property
    def layout(self) -> Staged:
        """Layout of the layers on the mesh."""
        devices, depths = parse_mesh(self.mesh)["stage"], self.plan.depths
        return (
            Staged(even_depths(devices, self.layers)) if self.explorers == 1 else Staged(depths, len(depths) // devices)
        )

    @property
    def tokens(self) -> int:
        """Number of new tokens, which is larger with drafts, as these need some text to be right."""
        return TOKENS if self.drafts is None else 3 * TOKENS

    @property
    def trained(self) -> TrainedExits | None:
        """Random exits of the kind that `exits` names, or None."""
        if self.exits is None:
            return None
        kind, fused, draft = self.exits
        return random_exits(kind, fused=fused, draft=draft, depths=self.plan.depths[:-1])

    @property
    def request(self) -> Request:
        """Request of the batch."""
        filters = {"top_k": 20, "top_p": 0.95} if self.filters else {}
        return Request(max_new_tokens=self.tokens, temperature=0.9 if self.sampled else 0.0, seed=SEED, **filters)


def named(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


CASES = named(
    Case("exits attn", "stage=3", 3, batch=4, exits=("attn", False, 30)),
    Case("ar", "stage=3", 4, method="ar", batch=4),
    Case("all axes", AXES, 3, batch=4, sampled=True, filters=True),
    Case("drafts, exits mlp", "stage=3", 3, batch=4, drafts="drafter", chosen=True, exits=("mlp", True, 30)),
    Case("drafts, six on two devices", "stage=2", 7, batch=2, drafts="drafter", exits=("attn", True, 30), explorers=6),
    Case("four explorers on one device", "stage=1", 5, batch=2, sampled=True, exits=("linear", True, 30), explorers=4),
    # The exits of one explorer offer nothing: an array without elements.
    Case("drafts of the text, one explorer", "data=2,stage=1", 1, batch=4, drafts="text"),
    Case("a pipeline of trees", "stage=2", 3, batch=2, drafts="drafter", chosen=True, explorers=1),
    Case("a model drafts on all axes", AXES, 2, sampled=True, batch=4, drafts="model", explorers=1),
    Case("drafts, all axes", AXES, 2, sampled=True, batch=4, drafts="drafter"),
)
IN_CPP = named(
    Case("C++, exits", AXES, 3, sampled=True, batch=4, exits=("linear", True, 30), head_dim=16),
    Case("C++, ar", AXES, 3, method="ar", sampled=True, filters=True, batch=4, head_dim=16),
)


def main() -> None:
    folder = Path(sys.argv[1])
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Ticks that choose their rows must choose alike on the mesh and on one device, and be as many in a call.
    Session._seconds = steady_seconds  # type: ignore[method-assign]
    for name in sys.argv[2:]:
        try:
            result = result_of(name, folder)
        except Exception as error:
            # The other cases run all the same; the test of this one fails.
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {error}"}
        (folder / f"{name}.json").write_text(json.dumps(result))


def result_of(name: str, folder: Path) -> dict[str, Any]:
    if name == "packed":
        return packed(folder)
    return checkpoint(name, folder) if name in CHECKPOINTS else run((CASES | IN_CPP)[name], folder)


def checkpoint(family: str, folder: Path) -> dict[str, Any]:
    """Load a checkpoint onto a mesh and onto one device, and return the relative error of logits, and new tokens."""
    mesh, method = CHECKPOINTS[family]
    directory = write_checkpoint(folder / family, family)
    progress: list[tuple[int, int]] = []
    lm = dex_jax.load(directory, "float32", mesh=mesh, on_tensor=lambda *done: progress.append(done))
    one = dex_jax.load(directory, "float32")
    tokens = np.arange(2, 22).reshape(2, 10)
    made = None
    if method is not None:
        output = dex_jax.generate(lm, tokens[:, :4].tolist(), method=method, max_new_tokens=6)
        tokens[:, 4:] = output.tokens
        made = [output.stats.device, [*output.stats.plan.depths]]
    ours, theirs = np.asarray(logits_of(lm, tokens)), np.asarray(one.logits(tokens))
    return {
        "error": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "read": progress[-1],
        "made": made,
        "best": theirs.argmax(-1)[:, 3:-1].tolist(),
        "tokens": tokens[:, 4:].tolist(),
    }


def packed(folder: Path) -> dict[str, Any]:
    """Run packed weights on meshes and on one device, and return figures of both.

    For blocks of a GGUF file on uneven stages these are the layers of each device, and tokens beside dense ones. For 8
    bits on a tensor axis they are the shapes of a device's part of two kernels, the tokens, and the logits' error.
    """
    path = str(write_gguf(folder / "packed.gguf", "llama2", "Q4_1", kinds={"attn_v": "Q8_0"}))
    one = dex_jax.load(path, "float32", weights="dense")
    depths = (1, one.config.num_layers)
    lm = dex_jax.load(path, "float32", mesh="stage=2", layout=Staged(depths), weights="stored")
    prompts, options = [[5, 9, 3, 11], [7, 2]], {"exits": "shared", "max_new_tokens": TOKENS}
    methods = {"AR": AR(), "explorers": Dex(depths=depths, draft=False)}
    outs = {name: dex_jax.generate(lm, prompts, method=method, **options) for name, method in methods.items()}
    parts = jax.tree.leaves(lm.weights["layers"][0]["qkv"])
    both = [dex_jax.load(path, "float32", mesh=mesh, weights="int8") for mesh in ("stage=2,tensor=2", None)]
    trees = Dex(explorers=1, draft=TREE)
    split = [
        dex_jax.generate(each, prompts, method=how, **options) for each, how in zip(both, (trees, AR()), strict=True)
    ]
    kernels = [leaf for name in ("gate_up", "down") for leaf in jax.tree.leaves(both[0].weights["layers"][0][name])]
    given, wanted = (np.asarray(logits_of(each, np.arange(20).reshape(2, 10))) for each in both)
    return {
        "int8": {
            "shapes": [leaf.addressable_shards[0].data.shape[1:] for leaf in kernels],
            "tokens": [out.tokens.tolist() for out in split],
            "error": float(np.abs(given - wanted).max() / np.abs(wanted).max()),
        },
        "kind": lm.weights_kind,
        "stages": [[shard.data.shape[0] for shard in part.addressable_shards] for part in parts],
        "tokens": {name: out.tokens.tolist() for name, out in outs.items()},
        "dense": dex_jax.generate(one, prompts, method=AR(), **options).tokens.tolist(),
    }


def run(case: Case, folder: Path) -> dict[str, Any]:
    mesh, layout = make_mesh(case.mesh), case.layout
    model = build_on_mesh(case.config, layout, random_reader(case.config, 0), jnp.dtype(jnp.float32), mesh)
    assert_own_stage(nnx.state(model)["layers"], mesh)
    spoil_padding(model)
    lm = LanguageModel(model, None, "random", "0", mesh)
    one = small_model(case.config)
    return {"mesh": decode(lm, case, folder), "one": decode(one, case, None)}


def decode(lm: LanguageModel, case: Case, folder: Path | None) -> list[dict[str, Any]]:
    """Return tokens, exits and ticks of each sequence, and write the optimised HLO of the programs into `folder`."""
    plan = plan_for(AR(), case.layers) if case.method == "ar" else case.plan
    drafter: Any = random_drafter() if case.drafts == "drafter" else None
    if case.drafts == "model":
        drafter = draft_model(lm, small_model(case.config))  # the model itself, which is always right
    exits = None if case.trained is None else case.trained.config
    plan = dataclasses.replace(plan, exits=exits, heads=GivenHeads(case.trained, drafter))
    session = Session(lm, ragged_prompts()[: case.batch], plan, case.request)
    session.prefill()
    # Two calls, so that the state of the first goes into the second.
    session.advance(3)
    record = session.advance(1000)
    if folder is not None:
        assert lm.mesh is not None
        assert_own_stage((session.state.memory[:4], getattr(session.state, "hidden", ())), lm.mesh)
        for program in (PREFILL, START, RUN):
            *_, used_last = (begun.made.result() for key, begun in _PROGRAMS.items() if key[0] is program)
            (folder / f"{case.name}.{program.name}.hlo").write_text(used_last.as_text())
    return [
        {
            "tokens": record.tokens[row, :length].tolist(),
            "exits": record.exits[row, :length].tolist(),
            "ticks": int(record.ticks[row]),
        }
        for row, length in enumerate(record.lengths)
    ]


def spoil_padding(model: Transformer) -> None:
    """Set the layers that pad shorter stages to NaN: they are skipped, and must never be read."""
    assert isinstance(model.layout, Staged)
    for number, place in enumerate(model.layout.places):
        spoilt = np.array([layer is None for layer in place])

        def spoil(leaf: jax.Array, spoilt: np.ndarray = spoilt) -> jax.Array:
            return jax.device_put(
                np.where(spoilt.reshape(-1, *(1,) * (leaf.ndim - 1)), np.float32(np.nan), leaf), leaf.sharding
            )

        layer = model.layers[number]
        nnx.update(layer, jax.tree.map(spoil, nnx.state(layer)))


def assert_own_stage(staged: Any, mesh: Mesh) -> None:
    """Assert that every device holds the part of each array that belongs to its stages, and no other."""
    here = {device: at[1] for at, device in np.ndenumerate(mesh.devices)}
    for leaf in jax.tree.leaves(staged):
        for shard in leaf.addressable_shards:
            held = shard.data.shape[0]
            assert held * mesh.shape[STAGE] == leaf.shape[0]
            assert (shard.index[0].start or 0) == held * here[shard.device]


if __name__ == "__main__":
    main()
