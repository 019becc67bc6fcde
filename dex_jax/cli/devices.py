"""--mesh and --layout: on which devices a model lies, and how."""

from __future__ import annotations

import argparse

from jax.sharding import Mesh

from dex_jax.decoding.methods import Method, with_stages
from dex_jax.decoding.resolve import resolve, unmeasured
from dex_jax.errors import DexError
from dex_jax.io import open_checkpoint
from dex_jax.language_model import layout_on_mesh
from dex_jax.nn.transformer import Layout, Stacked, Staged
from dex_jax.sharding import STAGE, make_mesh


def layout_of(args: argparse.Namespace, method: Method) -> tuple[Layout | None, Mesh | None]:
    """The layout and the mesh that --layout and --mesh name, for the exit depths of the method.

    Raises:
      DexError: a mesh that cannot be had, or whose stages are not the explorers.
    """
    if args.mesh is None and args.layout != "stacked":
        return None, None
    checkpoint = open_checkpoint(args.model)
    mesh = None if args.mesh is None else make_mesh(args.mesh)
    if mesh is not None and args.layout == "stacked":
        raise DexError("--layout stacked is for one device: leave it out with --mesh")
    fingerprint = checkpoint.fingerprint()
    method = unmeasured(with_stages(method, None if mesh is None else mesh.shape[STAGE]), args.exits, fingerprint)
    schedule = resolve(method, args.exits, checkpoint.config, fingerprint).schedule
    if mesh is None:
        return Stacked(schedule.depths), None
    layout = Staged(schedule.depths) if schedule.has_lattice and schedule.stages > 1 else None
    return layout_on_mesh(checkpoint, layout, mesh), mesh
