"""decode.py --dry-run: what a run would hold in memory, from the checkpoint's headers alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from dex_jax.cli.arguments import prompts_of
from dex_jax.decoding.methods import Dex, Method, is_auto
from dex_jax.errors import DexError


def dry_run(args: argparse.Namespace, method: Method) -> int:
    """Prints GB per device of weights, caches and exits, and whether they fit; returns exit code 0.

    Without a prompt, one short prompt is assumed.

    Raises:
      DexError: as a real run would, for what can be known without weights.
    """
    from dex_jax.cli.devices import layout_of
    from dex_jax.decoding.exits import resolve_method
    from dex_jax.decoding.methods import with_stages
    from dex_jax.decoding.session import check_mesh
    from dex_jax.evaluation.footprint import cache_length_for, device_memory, footprint, trained_bytes, verdict
    from dex_jax.io import open_checkpoint
    from dex_jax.language_model import resolve_dtype
    from dex_jax.nn.transformer import Unrolled
    from dex_jax.prompts import encode_prompt
    from dex_jax.sharding import STAGE

    if args.max_new_tokens < 1 or args.num_samples < 1:
        raise DexError("--max-new-tokens and --num-samples must be at least 1")
    checkpoint = open_checkpoint(args.model)
    config, dtype = checkpoint.config, resolve_dtype(args.dtype)
    layout, mesh = layout_of(args, method)
    if mesh is not None:
        method = with_stages(method, mesh.shape[STAGE])
    if is_auto(method):
        # Which schedule is chosen is measured on the device; serial rounds hold no less than AR.
        method = Dex(schedule="serial")
    resolved = resolve_method(method, args.exits, config, checkpoint.fingerprint())
    resolved.say()
    schedule = resolved.schedule
    lengths = [1]
    if args.prompt or args.prompt_file is not None:
        tokenizer, chat = checkpoint.tokenizer, not args.no_chat
        prompts = prompts_of(args)
        lengths = [len(encode_prompt(p, tokenizer, config.vocab_size, checkpoint.source, chat)) for p in prompts]
    length = cache_length_for(max(lengths), args.max_new_tokens, schedule)
    batch = len(lengths) * args.num_samples
    layout = layout or Unrolled()
    check_mesh(mesh, layout, schedule, batch)
    sampled, exits_bytes = args.temperature > 0, trained_bytes(config, dtype, resolved.trained, mesh)
    options: dict[str, Any] = {"sampled": sampled, "exits_bytes": exits_bytes, "mesh": mesh}
    needed = footprint(config, dtype, schedule, batch, length, layout, **options)
    sentence = verdict(needed, device_memory())
    devices = 1 if mesh is None else mesh.size
    if args.json:
        sizes = dataclasses.asdict(needed) | {"total_bytes": needed.total_bytes}
        print(json.dumps(sizes | {"devices": devices, "batch": batch, "dtype": str(dtype), "verdict": sentence}))
        return 0
    how = f", {schedule.kind}" if schedule.kind else ""
    where = "one device" if devices == 1 else f"each of {devices} devices"
    print(f"{checkpoint.source}: {batch} sequence(s) of at most {length} positions in {dtype}{how}, on {where}")
    for field in dataclasses.fields(needed):
        print(f"  {field.name.removesuffix('_bytes'):<10} {getattr(needed, field.name) / 1e9:8.3f} GB")
    print(sentence)
    return 0
