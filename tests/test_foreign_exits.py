"""Exits files that others wrote, wrong in every way: as in test_foreign_files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.checkpoints import FAMILIES
from reference.eagle_heads import MODEL, VARIANTS, head_tensors, write_head
from reference.small_models import random_exits
from safetensors.numpy import load_file, save
from test_foreign_files import DAMAGE, DEEP, NASTY, changed, check, damaged, edited, many, places, refused

from dex_jax.io.eagle import fit_eagle, load_eagle
from dex_jax.io.exits_file import load_exits, save_exits
from dex_jax.io.huggingface_config import huggingface_config

EAGLE_MODEL = huggingface_config(FAMILIES[MODEL], {}, "model")


def use_exits(path: Path) -> None:
    assert load_exits(path).digest


@pytest.fixture(scope="module")
def exits(tmp_path_factory) -> Path:
    """A drafter with a draft vocabulary."""
    path = tmp_path_factory.mktemp("exits") / "exits.safetensors"
    drafter = random_exits("mlp", fused=True, draft=30, depths=(0,))
    about = {"data": ["a=1"], "held_out": {"mean": {"grids": [{"explorers": 2, "depth_side_speedup": 1.5}]}}}
    drafter.metadata.update(about)
    save_exits(path, drafter)
    return path


def exits_with(path: Path, metadata: dict[str, str], **tensors: np.ndarray) -> bytes:
    return save(load_file(path) | tensors, metadata)


def metadata_of(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


@many
@given(data=st.data(), key=st.sampled_from(["config", "about"]), value=st.sampled_from(NASTY))
def test_metadata_of_exits_with_one_value_changed(exits, data, key, value) -> None:
    metadata = metadata_of(exits)
    place = data.draw(st.sampled_from(places(json.loads(metadata[key]))))
    with changed(exits, exits_with(exits, metadata | {key: edited(metadata[key], place, value)})):
        check(use_exits, exits)


@many
@given(damage=DAMAGE)
def test_exits_with_bytes_changed(exits, damage) -> None:
    with changed(exits, damaged(exits.read_bytes(), damage, within=3000)):
        check(use_exits, exits)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        *(("config", content) for content in ("", "[]", "{", "[" * DEEP, '{"kind": "mlp", "depths": 3, "width": 64}')),
        *(("about", content) for content in ("", "[]", "[" * DEEP, '{"held_out": 3}', '{"data": 3}')),
        ("about", '{"held_out": {"mean": {"grids": [{"explorers": 2, "depth_side_speedup": -1}]}}}'),
        ("about", '{"held_out": {"mean": []}}'), ("format", "other"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_exits_whose_metadata_lie(exits, key, content) -> None:
    with changed(exits, exits_with(exits, metadata_of(exits) | {key: content})):
        refused(use_exits, exits)


OF_EXITS = [
    {"width": 10**12}, {"width": 63}, {"hidden": 0}, {"hidden": 2**40}, {"window": 2**40}, {"depths": [0] * 2},
    {"depths": ["x"]}, {"depths": list(range(100_000))}, {"kind": 3}, {"fused": "x"}, {"draft_size": 29},
    {"draft_size": -1}, {"norm_eps": -1.0}, {"kind": "attn", "fused": False, "head_dim": 7},
]  # fmt: skip


@pytest.mark.parametrize("change", OF_EXITS, ids=lambda change: str(change)[:40])
def test_exits_whose_shapes_lie(exits, change) -> None:
    metadata = metadata_of(exits)
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | change)
    with changed(exits, exits_with(exits, metadata)):
        refused(use_exits, exits)


def test_exits_whose_tensors_lie(exits) -> None:
    metadata, tensors = metadata_of(exits), load_file(exits)
    vocabulary, gate_up = tensors["draft_vocabulary"], tensors["gate_up"]
    spoilt = gate_up.copy()
    spoilt.flat[0] = np.nan
    for change in (
        # Integers and steps that would multiply to 231 GiB.
        {"gate_up": np.zeros((310_000, 1), np.int8), "gate_up.steps": np.zeros((1, 200_000), np.float32)},
        {"gate_up": gate_up.astype(np.int8), "gate_up.steps": np.ones(gate_up.shape, np.float32)},
        {"gate_up": gate_up.astype(np.int8)},
        {"gate_up": gate_up.astype(np.float64)},
        {"gate_up": gate_up[:, :-1].copy()},
        {"gate_up": spoilt},
        {"draft_vocabulary": vocabulary[::-1].copy()},
        {"draft_vocabulary": vocabulary - 1000},
        {"draft_vocabulary": vocabulary.astype(np.float32)},
        {"draft_vocabulary": np.zeros_like(vocabulary)},
        {"draft_vocabulary": vocabulary[:, None].copy()},
    ):
        with changed(exits, exits_with(exits, metadata, **change)):
            refused(use_exits, exits)


def use_head(folder: Path) -> None:
    fit_eagle(load_eagle(folder), EAGLE_MODEL)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Path:
    return write_head(tmp_path_factory.mktemp("head"), "safeailab")


@many
@given(data=st.data(), value=st.sampled_from(NASTY), variant=st.sampled_from(["safeailab", "all_normed"]))
def test_the_configuration_of_an_eagle_head_with_one_value_changed(head, data, value, variant) -> None:
    whole = json.dumps(VARIANTS[variant])
    place = data.draw(st.sampled_from(places(VARIANTS[variant])))
    with changed(head / "config.json", edited(whole, place, value)):
        check(use_head, head)


@many
@given(damage=DAMAGE)
def test_an_eagle_head_with_bytes_changed(head, damage) -> None:
    file = head / "model.safetensors"
    with changed(file, damaged(file.read_bytes(), damage, within=3000)):
        check(use_head, head)


@pytest.mark.parametrize(
    "lie",
    [
        {"d2t": np.zeros(60, np.float32)},
        {"d2t": np.zeros(59, np.int64)},
        {"d2t": np.full(60, 211)},
        {"d2t": np.full(60, -1)},
        {"lm_head.weight": np.zeros((60, 95), np.float32)},
        {"fc.weight": np.zeros(96, np.float32)},
        {"fc.weight": np.full((96, 288), np.nan, np.float32)},
        {"midlayer.mlp.up_proj.weight": np.zeros((159, 96), np.float32)},
    ],
    ids=lambda lie: f"{next(iter(lie))} {next(iter(lie.values())).shape}",
)
def test_tensors_of_an_eagle_head_that_lie(head, lie) -> None:
    file = head / "model.safetensors"
    with changed(file, save(head_tensors("safeailab") | lie)):
        refused(use_head, head)


@pytest.mark.parametrize("name", ["d2t", "fc.weight", "lm_head.weight", "midlayer.self_attn.k_proj.weight"])
def test_an_eagle_head_without_a_tensor(head, name) -> None:
    kept = {each: value for each, value in head_tensors("safeailab").items() if each != name}
    with changed(head / "model.safetensors", save(kept)):
        assert name in refused(use_head, head)
