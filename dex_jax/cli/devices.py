"""--mesh and --dry-run: on which devices a model lies, and what it would hold there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dex_jax.cli.arguments import prompts_of
from dex_jax.decoding.dex.drafters import draft_model, exit_zero
from dex_jax.decoding.footprint import (
    device_memory,
    footprint,
    remembered_bytes,
    trained_bytes,
    verdict,
)
from dex_jax.decoding.generate import encode_prompts, sampling_of
from dex_jax.decoding.methods import Dex, Method, with_stages
from dex_jax.decoding.output import title
from dex_jax.decoding.resolve import GivenExits, opened, resolve, unmeasured
from dex_jax.decoding.session import check_layout
from dex_jax.decoding.sizes import batch_bucket, cache_length_for
from dex_jax.errors import DexError
from dex_jax.hardware import USABLE, Device, hardware, platform_of
from dex_jax.io.opening import open_checkpoint
from dex_jax.language_model import Outline, layout_on_mesh, packing_of, resolve_dtype
from dex_jax.nn.transformer import Layout, Staged, Unrolled
from dex_jax.prompts import Prompt
from dex_jax.sharding import STAGE, make_mesh


def layout_of(args: argparse.Namespace, method: Method) -> tuple[Layout | None, Mesh | None]:
    """The mesh that --mesh names and the layout of weights on it, for the exit depths of the method.

    Raises:
      DexError: a mesh that cannot be had, or whose stages are not the explorers.
    """
    if args.mesh is None:
        return None, None
    checkpoint, mesh = open_checkpoint(args.model), make_mesh(args.mesh)
    fingerprint = checkpoint.fingerprint()
    method = unmeasured(with_stages(method, mesh.shape[STAGE]), args.exits, fingerprint)
    schedule = resolve(method, args.exits, checkpoint.config, fingerprint).schedule
    layout = Staged(schedule.depths) if schedule.has_lattice and schedule.stages > 1 else None
    return layout_on_mesh(checkpoint, layout, mesh), mesh


def dry_run(args: argparse.Namespace, method: Method) -> int:
    """Prints GB per device of weights, caches and exits, and whether they fit; returns exit code 0.

    Without a prompt, one short prompt is assumed. With --hardware they are those of a device that need not be here.

    Raises:
      DexError: as a real run would, for what can be known without weights.
    """
    checkpoint = open_checkpoint(args.model)
    elsewhere = None if args.hardware is None else hardware(args.hardware).device
    if elsewhere is not None and args.mesh is not None:
        raise DexError("--hardware judges one device: leave --mesh out")
    config, dtype = checkpoint.config, _dtype_of(args, elsewhere)
    layout, mesh = layout_of(args, method)
    if args.draft_model is not None and method == Dex():
        method = Dex(explorers=1)
    if mesh is not None:
        method = with_stages(method, mesh.shape[STAGE])
    layout = layout or Unrolled()
    weights = args.weights or (None if elsewhere is None or elsewhere.name == "cpu" else "dense")
    platform = None if elsewhere is None else platform_of(elsewhere.name)
    packing = packing_of(checkpoint, dtype, mesh, weights, platform)
    outline = Outline(checkpoint, dtype, layout, mesh, packing)
    exits: GivenExits = opened(args.exits)
    if args.draft_model is not None:
        small = open_checkpoint(args.draft_model)
        kept = packing_of(small, dtype, None, weights, platform)
        exits = draft_model(outline, Outline(small, dtype, Unrolled(), None, kept))
    # Which of AR and one explorer is chosen is measured on the device; the latter holds no less.
    method = unmeasured(method, exits, checkpoint.fingerprint())
    resolved = resolve(method, exits, config, checkpoint.fingerprint())
    resolved.say(checkpoint.fingerprint())
    schedule = resolved.schedule
    prompts: list[Prompt] = prompts_of(args) if args.prompt or args.prompt_file is not None else [[0]]
    ids = encode_prompts(outline, prompts, not args.no_chat, args.num_samples, args.max_new_tokens)
    batch = len(ids)
    sampling, _ = sampling_of(args.temperature, args.top_k, args.top_p, args.seed, batch, config.vocab_size)
    compiled_for = batch if mesh is not None else batch_bucket(batch)
    longest = max(map(len, ids))
    length = cache_length_for(longest, args.max_new_tokens, schedule.ahead, compiled_for)
    check_layout(mesh, layout, resolved, batch)
    exits_bytes = sum(trained_bytes(config, dtype, each, mesh, packing) for each in (resolved.exits, resolved.drafter))
    if resolved.drafter is not None:
        drafter = exit_zero(resolved.drafter, longest + args.max_new_tokens)
        exits_bytes += remembered_bytes(drafter, dtype, compiled_for, length)
    options: dict[str, Any] = {"sampled": sampling is not None, "exits_bytes": exits_bytes, "mesh": mesh}
    needed = footprint(config, dtype, schedule, compiled_for, length, layout, packing=packing, **options)
    sentence = verdict(needed, device_memory() if elsewhere is None else int(USABLE * elsewhere.memory))
    devices = 1 if mesh is None else mesh.size
    if args.json:
        about = {"devices": devices, "batch": batch, "dtype": str(dtype), "weights": outline.weights_kind}
        sizes = dataclasses.asdict(needed) | {"total_bytes": needed.total_bytes}
        print(json.dumps(sizes | about | {"verdict": sentence}))
        return 0
    where = "one device" if devices == 1 else f"each of {devices} devices"
    where = where if elsewhere is None else f"one {elsewhere.name}"
    packed = f", weights in {outline.weights_kind}" if packing else ""
    what = f"{batch} sequence(s) of at most {length} positions in {dtype}, {title(schedule)}"
    print(f"{checkpoint.source}: {what}, on {where}{packed}")
    for field in dataclasses.fields(needed):
        print(f"  {field.name.removesuffix('_bytes'):<10} {getattr(needed, field.name) / 1e9:8.3f} GB")
    print(sentence)
    return 0


def _dtype_of(args: argparse.Namespace, elsewhere: Device | None) -> jnp.dtype:
    """--dtype, or what is the default on the device at hand or elsewhere."""
    if elsewhere is None or elsewhere.name == "cpu":
        return resolve_dtype(args.dtype)
    return jnp.dtype(args.dtype or ("float16" if elsewhere.name == "t4" else "bfloat16"))
