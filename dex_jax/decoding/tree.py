"""The token tree of one serial round: rows in arrays, and the pure functions that grow and follow it.

Row 0 is the root, the last token emitted; the rows of a level come after those of the level before. Everything is
written for one sequence and is meant to be vmapped over a batch. Letters: N rows, P levels with the root's, C
candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.lattice import NO_NODE, NO_TOKEN


class Tree(NamedTuple):
    """Candidate tokens under a root.

    Attributes:
      token: [N] int32, NO_TOKEN in rows that are not used.
      parent: [N] int32 row, NO_NODE for the root and for rows that are not used.
      score: [N] float32, log-probability of the path from the root as its proposers saw it; -inf in unused rows.
      ancestors: [N, N] bool, the rows that each row attends to: itself and its ancestors.
    """

    token: jax.Array
    parent: jax.Array
    score: jax.Array
    ancestors: jax.Array


class Candidates(NamedTuple):
    """Proposed children of rows that a tree has.

    Attributes:
      token: [C] int32.
      parent: [C] int32 row.
      score: [C] float32 of the path with it, -inf for none.
    """

    token: jax.Array
    parent: jax.Array
    score: jax.Array


def plant(root: jax.Array, rows: int) -> Tree:
    """A tree of N = `rows` that holds nothing but the root, an int32 token."""
    first = jnp.arange(rows) == 0
    return Tree(
        token=jnp.where(first, root, NO_TOKEN),
        parent=jnp.full(rows, NO_NODE, jnp.int32),
        score=jnp.where(first, 0.0, -jnp.inf),
        ancestors=jnp.eye(rows, dtype=bool),
    )


def grow(tree: Tree, candidates: Candidates, first: jax.Array, width: jax.Array, most: int) -> Tree:
    """Puts the best `width` candidates into the rows from `first` on, ties by the order in which they come.

    Candidates of one parent with one token are one candidate, with the better of their scores. Rows up to
    first + `most`, which is at least `width`, must be there and not be used yet.
    """
    missing = max(0, most - candidates.token.shape[0])
    token, parent, score = (
        jnp.pad(field, (0, missing), constant_values=blank)
        for field, blank in zip(candidates, (NO_TOKEN, NO_NODE, -jnp.inf), strict=True)
    )
    same = (token[:, None] == token[None, :]) & (parent[:, None] == parent[None, :])
    alike = same & (score > -jnp.inf)[None, :]
    best = jnp.max(jnp.where(alike, score[None, :], -jnp.inf), axis=1)
    earlier = jnp.tril(jnp.ones(same.shape, bool), k=-1)
    score = jnp.where(jnp.any(alike & earlier, axis=1) | (score == -jnp.inf), -jnp.inf, best)
    chosen = jnp.argsort(-score, stable=True)[:most]
    found = (score[chosen] > -jnp.inf) & (jnp.arange(most) < width)
    above = jnp.where(found, parent[chosen], NO_NODE)
    itself = first + jnp.arange(most)[:, None] == jnp.arange(tree.token.shape[0])[None]
    seen = tree.ancestors[jnp.maximum(above, 0)] & found[:, None]

    def put(rows: jax.Array, fresh: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(rows, fresh, first, axis=0)

    return Tree(
        token=put(tree.token, jnp.where(found, token[chosen], NO_TOKEN)),
        parent=put(tree.parent, above),
        score=put(tree.score, jnp.where(found, score[chosen], -jnp.inf)),
        ancestors=put(tree.ancestors, seen | itself),
    )


def depth_in(tree: Tree) -> jax.Array:
    """[..., N] int32, how far below the root each row stands."""
    return jnp.sum(tree.ancestors, axis=-1, dtype=jnp.int32) - 1


def sort_rows(tree: Tree) -> Tree:
    """The same tree with the best-scoring rows first: no row is better than its parent, so the root stays first."""
    order = jnp.argsort(-tree.score, stable=True)
    place = jnp.argsort(order, stable=True)
    parent = tree.parent[order]
    return Tree(
        token=tree.token[order],
        parent=jnp.where(parent == NO_NODE, NO_NODE, place[jnp.maximum(parent, 0)]).astype(jnp.int32),
        score=tree.score[order],
        ancestors=tree.ancestors[order][:, order],
    )


def child_of(tree: Tree, row: jax.Array, token: jax.Array) -> jax.Array:
    """The child of `row` that holds `token`, as int32 row, NO_NODE when there is none."""
    here = (tree.parent == row) & (tree.token == token) & (row != NO_NODE)
    return jnp.where(jnp.any(here), jnp.argmax(here), NO_NODE).astype(jnp.int32)


def follow(tree: Tree, final: jax.Array, levels: int) -> tuple[jax.Array, jax.Array]:
    """The rows whose token the final layer gives, from the root down.

    Args:
      tree: of the round.
      final: [N] int32, the final layer's token after each row.
      levels: P.

    Returns:
      (path [P] int32 rows, the root first, repeating its last row; int32, how many of them match, the root among them).
    """

    def one_level(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        row, going = carry
        child = child_of(tree, row, final[row])
        going = going & (child != NO_NODE)
        row = jnp.where(going, child, row)
        return (row, going), jnp.where(going, row, NO_NODE)

    _, below = jax.lax.scan(one_level, (jnp.int32(0), jnp.bool_(True)), None, length=levels - 1)
    count = 1 + jnp.sum(below != NO_NODE, dtype=jnp.int32)
    path = jnp.concatenate([jnp.zeros(1, jnp.int32), below])
    return jnp.where(path == NO_NODE, path[count - 1], path), count
