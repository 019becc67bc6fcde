"""The flags --mesh and --dry-run: on which devices a model lies, and how much memory it needs there."""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dex_jax.cli.arguments import options_of, prompts_of
from dex_jax.decoding.auto import choose_method
from dex_jax.decoding.dex.drafters import draft_model
from dex_jax.decoding.generate import tokens_of
from dex_jax.decoding.output import title
from dex_jax.decoding.plan import GivenExits, Method, opened, resolve
from dex_jax.decoding.request import Request
from dex_jax.decoding.session import START, Session
from dex_jax.errors import DexError
from dex_jax.hardware import USABLE, Device, hardware, platform_of
from dex_jax.io.opening import open_checkpoint
from dex_jax.io.prompts import Prompt
from dex_jax.language_model import Outline, layout_on_mesh, packing_of, resolve_dtype
from dex_jax.nn.sharding import make_mesh, nbytes
from dex_jax.nn.transformer import Staged

REMEDIES = {
    "weights": "use int8 weights, a smaller dtype or a smaller model",
    "cache": "lower the number of prompts or samples, or max_new_tokens",
    "lattice": "lower rows, explorers, or the number of prompts or samples",
    "exits": "use fewer explorers or exits with a smaller vocabulary",
}
"""The advice that lowers the need for memory, by what needs it."""

AT_ONCE = 8
"""Number of prompts that a CPU decodes together. Prefill and decoding of 40 took 35 s one by one, and 30, 30, 32 and
42 s in batches of 4, 8, 16 and 40 (SmolLM2-135M packed, two cores, 48 tokens each)."""


def batches_of(prompts: list[Prompt], args: argparse.Namespace) -> list[list[Prompt]]:
    """Split prompts into batches of the size of --batch, or of one that should answer all of them soonest."""
    on_cpu = args.mesh is None and (args.hardware or jax.default_backend()) == "cpu"
    size = args.batch or (AT_ONCE if on_cpu else len(prompts))
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


def layout_of(args: argparse.Namespace, method: Method) -> tuple[Staged | None, Mesh | None]:
    """Return the layout of weights for the exit depths of the method, and the mesh that --mesh names.

    Raises:
      DexError: the mesh cannot be made, or its stages are not the explorers.
    """
    if args.mesh is None:
        return None, None
    checkpoint, mesh = open_checkpoint(args.model), make_mesh(args.mesh)
    fingerprint = checkpoint.fingerprint()
    method, exits, _ = choose_method(method, opened(args.exits), fingerprint, mesh)
    plan = resolve(method, exits, checkpoint.config, fingerprint)
    layout = Staged(plan.depths) if plan.has_lattice and plan.stages > 1 else None
    return layout_on_mesh(checkpoint, layout, mesh), mesh


def dry_run(args: argparse.Namespace, method: Method) -> int:
    """Print the GB of weights, cache, lattice and exits on each device, and whether they fit; return exit code 0.

    Without a prompt, one short prompt is assumed. With --hardware the device need not be here.

    Raises:
      DexError: a real run would raise it too, as far as that can be known without weights.
    """
    elsewhere = None if args.hardware is None else hardware(args.hardware).device
    if elsewhere is not None and args.mesh is not None:
        raise DexError("--hardware judges one device: leave --mesh out")
    layout, mesh = layout_of(args, method)
    outline = _outline(args, args.model, elsewhere, mesh, layout)
    exits: GivenExits = opened(args.exits)
    if args.draft_model is not None:
        exits = draft_model(outline, _outline(args, args.draft_model, elsewhere))
    # A batch may be decoded by AR: one explorer holds no less.
    method, exits, _ = choose_method(method, exits, outline.fingerprint, mesh)
    plan = resolve(method, exits, outline.config, outline.fingerprint)
    plan.say(outline.fingerprint)
    prompts: list[Prompt] = prompts_of(args) if args.prompt or args.prompt_file is not None else [[0]]
    request = Request.of(options_of(args))
    ids = tokens_of(outline, batches_of(prompts, args)[0], request)
    session = Session(outline, ids, plan, request)
    sizes = held(session)
    sentence = verdict(sizes, free_memory() if elsewhere is None else elsewhere.memory)
    devices, dtype, weights = 1 if mesh is None else mesh.size, str(outline.dtype), outline.weights_kind
    if args.json:
        about = {"devices": devices, "batch": len(ids), "dtype": dtype, "weights": weights, "verdict": sentence}
        total = {"total_bytes": sum(sizes.values())}
        print(json.dumps({f"{name}_bytes": size for name, size in sizes.items()} | total | about))
        return 0
    where = "one device" if devices == 1 else f"each of {devices} devices"
    where = where if elsewhere is None else f"one {elsewhere.name}"
    packed = f", weights in {weights}" if outline.packing else ""
    what = f"{len(ids)} sequence(s) of at most {session.cache_length} positions in {dtype}, {title(plan)}"
    print(f"{outline.source}: {what}, on {where}{packed}")
    for name, size in sizes.items():
        print(f"  {name:<10} {size / 1e9:8.3f} GB")
    print(sentence)
    return 0


def _outline(
    args: argparse.Namespace,
    source: str,
    elsewhere: Device | None,
    mesh: Mesh | None = None,
    layout: Staged | None = None,
) -> Outline:
    """Return the outline of a model on the device at hand, or on the device `elsewhere`."""
    checkpoint, weights, platform = open_checkpoint(source), args.weights, None
    if elsewhere is None or elsewhere.name == "cpu":
        dtype = resolve_dtype(args.dtype)
    else:
        dtype = jnp.dtype(args.dtype or ("float16" if elsewhere.name == "t4" else "bfloat16"))
        weights, platform = weights or "dense", platform_of(elsewhere.name)
    return Outline(checkpoint, dtype, packing_of(checkpoint, dtype, mesh, weights, platform), mesh, layout)


def held(session: Session) -> dict[str, int]:
    """Return bytes on each device: of weights, committed cache, the rest of the state (the lattice), trained exits."""
    found: dict[str, Any] = {}

    def seen(program: Any, *arguments: Any, **statics: Any) -> Any:
        found[program.name] = arguments
        return jax.eval_shape(functools.partial(program.jitted, **statics), *arguments) if program is START else None

    session.compile_by(seen)
    weights, heads, state, *_ = found["run_ticks"]
    memory = state.memory
    cache, exits = nbytes((memory.keys, memory.values)), nbytes(memory.exits)
    lattice = nbytes(state) - cache - exits
    return {"weights": nbytes(weights), "cache": cache, "lattice": lattice, "exits": nbytes(heads) + exits}


def free_memory() -> int | None:
    """Return the bytes free on the first device, on a CPU what this process can get; None when unknown."""
    device = jax.devices()[0]
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    available = re.search(r"^MemAvailable: *(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    limit = _text("/sys/fs/cgroup/memory.max").strip()  # of a container
    sizes = [1024 * int(available[1])] if available else []
    return min([*sizes, *([int(limit)] if limit.isdigit() else [])], default=None)


def _text(path: str) -> str:
    """Return the text of a file, or "" where there is none."""
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def verdict(sizes: dict[str, int], memory: float | None) -> str:
    """Return a sentence on whether it fits, with room for the programs' temporaries, and on what to lower if not."""
    total = sum(sizes.values())
    if memory is None:
        return f"needs {total / 1e9:.2f} GB; the device does not say how much memory it has."
    usable = USABLE * memory
    if total <= usable:
        return f"fits: {total / 1e9:.2f} GB of the {usable / 1e9:.2f} GB that may be used."
    remedy = REMEDIES[max(sizes, key=lambda name: sizes[name])]
    return f"does not fit: {total / 1e9:.2f} GB are needed and {usable / 1e9:.2f} GB may be used; {remedy}."
