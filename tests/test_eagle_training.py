"""Training an EAGLE-3 head: it reads what it reads in decoding, learns, and is written so that others read it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from flax import nnx
from reference.eagle_heads import VARIANTS, head_tensors, write_head
from reference.greedy import is_greedy
from reference.small_models import LLAMA, random_transformer, small_model
from safetensors.numpy import load_file

import dex_jax
from dex_jax.cli.train import main as train_exits
from dex_jax.config import EagleConfig
from dex_jax.decoding.dex.interface import Chunk, DraftRows
from dex_jax.decoding.dex.own_layers import EagleDrafter, OwnArrays
from dex_jax.errors import DexError
from dex_jax.io.eagle import load_eagle, save_eagle
from dex_jax.lattice import NO_NODE
from dex_jax.nn.eagle import Eagle, eagle_parameters
from dex_jax.nn.forward import depth_states
from dex_jax.training.config import TrainConfig
from dex_jax.training.eagle_training import EagleTraining, read_chains, train_eagle
from dex_jax.training.journal import read_journal
from dex_jax.training.packing import Activations

STEPS, READS = 3, (1, 2, 3)
LAYER = dataclasses.replace(LLAMA, num_layers=1)
SHALLOW = dataclasses.replace(LLAMA, num_layers=2, bos_id=1)


def random_head(norm_output: bool) -> Eagle:
    config = EagleConfig(LAYER, READS, LLAMA.width, 40, norm_output=norm_output, norm_before_residual=norm_output)
    order = {name: i for i, name in enumerate(eagle_parameters(config))}

    def init(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        made = np.random.default_rng([7, order[name]]).standard_normal(shape)
        return jnp.asarray(1 + 0.1 * made if kind == "scale" else made * shape[-1] ** -0.5, jnp.float32)

    return Eagle(config, init)


@pytest.mark.parametrize("norm_output", [slow(False), True])
def test_training_reads_what_decoding_does(norm_output) -> None:
    """A row of two texts, against chains below every root."""
    model, head = random_transformer(LLAMA, 0), random_head(norm_output)
    drafter, arrays = EagleDrafter(head.eagle), OwnArrays(nnx.state(head))
    lengths, longest = (5, 6), 6
    texts = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, longest)).astype(np.int32)
    states = jax.jit(lambda: depth_states(model, jnp.asarray(texts), READS))()
    token = jnp.concatenate([text[:length] for text, length in zip(texts, lengths, strict=True)])[None]
    position = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    both = jnp.concatenate([states[:, i, :length] for i, length in enumerate(lengths)], axis=1)[:, None]
    batch = Activations(both, both[0], model.embed_tokens(token), token, position, jnp.ones(token.shape))
    found, valid = jax.jit(lambda: read_chains(head, batch, STEPS))()
    reading, checked = drafter.drafter(model, arrays), 0

    @jax.jit
    def read(text, hidden, root):
        """What the drafter remembers of the tokens before a root."""
        chunk = Chunk(text[None], hidden[None], jnp.int32(0), root[None])
        return drafter.read(model, arrays, drafter.empty(1, 16, jnp.float32), chunk)

    @jax.jit
    def drafted(memory, rows, *asked):
        return reading.features(SimpleNamespace(exits=memory), rows, DraftRows(*asked, memory.previous[:, None]))

    for i, (size, offset) in enumerate(zip(lengths, (0, lengths[0]), strict=True)):
        hidden = jnp.concatenate([states[0, i] * 0, *states[:, i]], axis=-1)
        for root in range(1, size):
            memory, rows = read(texts[i], hidden, jnp.int32(root)), reading.blank(1, STEPS)
            for step in range(STEPS):
                there = root + step < size
                assert bool(valid[step][0, offset + root]) == there
                if not there:
                    break
                parent = np.array([[NO_NODE if step == 0 else step - 1]], np.int32)
                at = root + np.array([[step]], np.int32)
                features, own = drafted(memory, rows, texts[i][at], at, parent)
                rows = type(rows)(*(old.at[:, step].set(new[:, 0]) for old, new in zip(rows, own, strict=True)))
                np.testing.assert_allclose(found[step][0, offset + root], features[0, 0], atol=2e-5)
                checked += 1
        assert not valid[0][0, offset], "nothing is known before the first token"
    assert checked == sum(sum(min(STEPS, size - root) for root in range(1, size)) for size in lengths)


@pytest.mark.slow
def test_the_program_trains_a_head_that_learns_and_drafts(tmp_path, capsys) -> None:
    lm, folder, config = small_model(SHALLOW), tmp_path / "run", tmp_path / "mine.py"
    model = lm.save(tmp_path / "model")
    config.write_text(
        "from dex_jax.training.config import TrainConfig\n"
        "from dex_jax.training.eagle_training import EagleTraining\n"
        "from dex_jax.training.sources import SourceOptions\n"
        "train = TrainConfig(steps=75, batch=4, learning_rate=2e-2, warmup_steps=5, checkpoint_every=75, log_every=5)\n"
        "config = EagleTraining(train, reads=(0, 1, 2), mlp_width=48, draft_size=40,\n"
        f"    sources=SourceOptions(length=24), tokens=3000, model={str(model)!r})\n"
    )
    arguments = ["--config", str(config), "--folder", str(folder)]
    assert train_exits(arguments) == 0
    assert f"--exits {folder / 'head'}" in capsys.readouterr().out
    assert train_exits([*arguments, "--init-from", "default"]) == 2
    assert "--init-from" in capsys.readouterr().err
    losses = [record["loss"] for record in read_journal(folder) if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    head = load_eagle(folder / "head")
    # A run that is done gives the same head again.
    assert train_exits(arguments) == 0
    chex.assert_trees_all_equal(load_eagle(folder / "head").parameters, head.parameters)
    unembed = np.asarray(lm.weights["embed"][...])[head.vocabulary]
    assert np.array_equal(head.parameters["unembed"], unembed), "the model's own"
    prompts = [[1, 5, 9], [1]]
    method = dex_jax.Dex(explorers=1, draft=dex_jax.TreeShape((2, 1), drafted=2, lookup=(0.0,) * 8))
    out = dex_jax.generate(lm, prompts, method=method, exits=str(folder / "head"), max_new_tokens=24)
    for row, prompt in enumerate(prompts):
        assert is_greedy(lm, prompt, out.tokens[row, : out.lengths[row]].tolist())
    assert (out.stats.exits[:, 1:] == 0).any()


def test_what_cannot_be_trained_is_refused(tmp_path) -> None:
    lm, train = small_model(SHALLOW), TrainConfig(steps=1)
    with pytest.raises(DexError, match="depths"):
        train_eagle(EagleTraining(train, reads=(1, 2, 9)), lm, tmp_path)


def test_heads_are_written_as_they_were_read(tmp_path) -> None:
    head = load_eagle(write_head(tmp_path / "one", "safeailab", eagle_aux_hidden_state_layer_ids=[2, 3, 4]))
    save_eagle(tmp_path / "two", head)
    tensors = load_file(tmp_path / "two" / "model.safetensors")
    chex.assert_trees_all_equal(tensors, head_tensors("safeailab"))
    assert load_eagle(tmp_path / "two").config == head.config
    for variant in VARIANTS.keys() - {"safeailab"}:
        with pytest.raises(DexError, match="norms"):
            save_eagle(tmp_path / "three", load_eagle(write_head(tmp_path / variant, variant)))
