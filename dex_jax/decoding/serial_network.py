"""The transformer and its drafter as the callables of serial rounds."""

from __future__ import annotations

from typing import Any

from dex_jax.config import ExitsConfig
from dex_jax.decoding.drafter import draft_rows, no_drafts
from dex_jax.decoding.network import commit_rows, run_tree
from dex_jax.decoding.serial import Confirmed, Drafter, TreeNetwork
from dex_jax.decoding.trained_exits import ExitArrays, read_chunk, shared_columns
from dex_jax.nn.transformer import Transformer


def tree_network(model: Transformer, config: ExitsConfig | None, arrays: ExitArrays | None, rows: int) -> TreeNetwork:
    """The callables of `model`.

    Args:
      model: any layout.
      config, arrays: of a drafter, see ExitsConfig.is_drafter; None for none.
      rows: N, of the trees.
    """

    def run(memory: Any, token: Any, position: Any, ancestors: Any, prefix: Any) -> Any:
        return run_tree(model, memory, token, position, ancestors, prefix)

    def commit(memory: Any, fresh: Any, path: Confirmed) -> Any:
        memory = commit_rows(model, memory, fresh, path.row, path.prefix, path.hidden)
        return memory._replace(exits=commit_drafts(model, config, arrays, memory.exits, path))

    drafter = None if config is None or arrays is None else tree_drafter(model, config, arrays, rows)
    return TreeNetwork(model.config.vocab_size, run, commit, model.logits, drafter)


def commit_drafts(
    model: Transformer, config: ExitsConfig | None, arrays: ExitArrays | None, memory: Any, path: Confirmed
) -> Any:
    """What a drafter remembers of the prefix, `memory.exits`, with the rows of a path; as it is without a drafter."""
    if config is None or arrays is None:
        return memory
    ends = path.prefix + path.length
    return read_chunk(model, config, arrays, memory, path.token, path.hidden, path.prefix, ends)


def tree_drafter(model: Transformer, config: ExitsConfig, arrays: ExitArrays, rows: int) -> Drafter:
    """The callables of a drafter alone, arguments as of `tree_network`."""
    dtype = model.embed[...].dtype
    logits, rest = shared_columns(model, arrays)
    return Drafter(
        begin=lambda batch: no_drafts(config, batch, rows, dtype),
        run=lambda memory, drafts, *level: draft_rows(model, config, arrays, memory.exits, drafts, *level),
        logits=logits,
        rest=rest,
        vocabulary=arrays.vocabulary,
    )
