"""The training stream: activations of a frozen model, made as they are used, in rows that never wait.

Every step runs one token of each of B rows through all layers. Where an item's script says so the token is forced,
elsewhere it is the model's own choice, so reading a prompt and answering it are one program. A row whose item ends
starts the next waiting item in the very next step: what the old one left in the cache lies beyond the new one's
positions, masked until it is overwritten.

On a mesh, which has the axis "data", rows are spread over it, and every device has all weights.

Letters: B rows, n steps of a chunk, H steps of history, X trained depths, L depths, D width, S longest item, N scripts.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dex_jax.config import ModelConfig
from dex_jax.decoding.program import Program
from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel
from dex_jax.nn import cache
from dex_jax.nn.forward import extend, states_at
from dex_jax.nn.sharding import EVERYWHERE
from dex_jax.nn.weights import merge_model
from dex_jax.sampling import sampling_keys
from dex_jax.training.items import NO_ITEM, Item, Scripts, no_script, script, stack_scripts
from dex_jax.training.rows import Rows, advance, choices, take_items


class Activations(NamedTuple):
    """One chunk of the stream.

    Step i and an earlier step j belong to the same item iff position[j] >= 0 and position[j] == position[i] - (i - j).
    """

    states: jax.Array  # [X, B, n, D], hidden states at the trained depths, in the model's dtype
    final: jax.Array  # [B, H + n, D], hidden state at depth L before the final norm; the first H steps are history
    token: jax.Array  # [B, H + n] int32, input token of each step; NO_ITEM where there is none
    position: jax.Array  # [B, H + n] int32, its position within its item, from 0; NO_ITEM where there is none
    # [B, n] float32, how much a step counts: 1 where the model chose the next token, its turn's forced_weight where the
    # script did, 0 where the row was idle. An item's last step counts as the part that it stands in.
    weight: jax.Array


class StreamState(NamedTuple):
    """All that the device carries from chunk to chunk."""

    memory: cache.Memory  # keys and values of S positions a row
    rows: Rows  # where the rows stand
    # the last H steps as in Activations, [B, H, D] and [B, H]
    final: jax.Array
    token: jax.Array
    position: jax.Array


class Report(NamedTuple):
    """What the host learns of a chunk."""

    slot: jax.Array  # [B] int32, each row's item when the chunk ended, as in Rows
    taken: jax.Array  # int32, how many waiting scripts have been started
    learnt: jax.Array  # int32, steps of weight above 0
    number: jax.Array  # [B, n] int32, the item number of each step


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """What the compiled program depends on beside shapes.

    Raises:
      DexError: depths that the model does not have, or sizes that make no stream.
    """

    config: ModelConfig  # of the model
    depths: tuple[int, ...]  # the X trained depths, ascending, 0..L
    steps: int  # n
    history: int  # H
    length: int  # S
    end_ids: tuple[int, ...]  # tokens that end a free part
    mesh: Mesh | None = None  # over whose axis "data" rows are spread; None leaves all where JAX puts it

    def __post_init__(self) -> None:
        layers = self.config.num_layers
        if not self.depths or any(not 0 <= depth <= layers for depth in self.depths):
            raise DexError(f"trained depths {self.depths} do not fit: give at least one from 0 to {layers}")
        if not 2 <= self.length <= self.config.context:
            raise DexError(f"items of {self.length} tokens do not fit: choose from 2 to {self.config.context}")
        if self.steps < 1 or self.history < 0:
            raise DexError(f"a chunk needs at least 1 step and 0 of history, not {self.steps} and {self.history}")


def start_rows(memory: cache.Memory, spec: StreamSpec) -> StreamState:
    """Idle rows without history over any memory, whose contents do not matter."""
    leaf = jax.tree.leaves(memory.keys)[0]
    batch = leaf.shape[-4]
    return StreamState(
        memory=memory,
        rows=Rows(jnp.full(batch, NO_ITEM, jnp.int32), *(jnp.zeros(batch, jnp.int32) for _ in range(5))),
        final=jnp.zeros((batch, spec.history, spec.config.width), leaf.dtype),
        token=jnp.full((batch, spec.history), NO_ITEM, jnp.int32),
        position=jnp.full((batch, spec.history), NO_ITEM, jnp.int32),
    )


def produce(
    weights: Any, state: StreamState, scripts: Scripts, waiting: jax.Array, key: jax.Array, *, spec: StreamSpec
) -> tuple[StreamState, Activations, Report]:
    """Runs n steps of all rows; the state is donated.

    Of the N scripts number b < B is what row b is running, where it runs anything; the rest wait, in order, `waiting`
    of them. The token at a position of an item is drawn with fold_in(fold_in(key, item number), position), so an item's
    tokens do not depend on the row or the chunk that it runs in.
    """
    model = merge_model(spec.config, weights)
    batch = state.rows.slot.shape[0]
    slot = jnp.where(state.rows.slot == NO_ITEM, NO_ITEM, jnp.arange(batch))

    def step(carry: Any, _: None) -> tuple[Any, Any]:
        memory, rows, taken = carry
        rows, taken = take_items(rows, scripts, taken, waiting)
        idle = rows.slot == NO_ITEM
        tokens, start = jnp.where(idle, 0, rows.token), jnp.where(idle, 0, rows.position)
        states, memory = extend(model, memory, tokens[:, None], start)
        final = states[-1][:, 0]
        number = jnp.where(idle, NO_ITEM, scripts.number[jnp.maximum(rows.slot, 0)])
        token, position = (jnp.where(idle, NO_ITEM, x) for x in (rows.token, rows.position))
        chosen = choices(model, final, rows, scripts, key)
        rows, weight = advance(rows, scripts, chosen, spec.end_ids)
        kept = jnp.stack([state[:, 0] for state in states_at(model, tokens[:, None], states, spec.depths)])
        return (memory, rows, taken), (kept, final, token, position, weight, number)

    carry = (state.memory, state.rows._replace(slot=slot), jnp.int32(0))
    (memory, rows, taken), out = jax.lax.scan(step, carry, None, length=spec.steps)
    states, final, token, position, weight, number = (jnp.moveaxis(x, 0, -2 if x.ndim > 2 else -1) for x in out)
    final = jnp.concatenate([state.final, final], axis=1)
    token = jnp.concatenate([state.token, token], axis=1)
    position = jnp.concatenate([state.position, position], axis=1)
    state = StreamState(memory, rows, *(x[:, spec.steps :] for x in (final, token, position)))
    activations = Activations(states, final, token, position, weight)
    report = Report(rows.slot, taken, jnp.sum(weight > 0), number)
    if spec.mesh is not None:
        # The next call takes the state as it took this one.
        places = _state(spec.mesh), Activations(_rows(spec.mesh, 1), *[_rows(spec.mesh)] * 4)
        state, activations = jax.lax.with_sharding_constraint((state, activations), places)
    return state, activations, report


def everywhere(mesh: Mesh | None, tree: Any) -> Any:
    """A tree, copied to all devices of a mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, EVERYWHERE))


def _rows(mesh: Mesh, axis: int = 0) -> Any:
    """Where arrays lie whose rows are along `axis`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def _state(mesh: Mesh) -> StreamState:
    rows, copies = _rows(mesh), NamedSharding(mesh, EVERYWHERE)
    # There is no lattice, and XLA does not split an empty array.
    return StreamState(cache.Memory(rows, rows, copies, copies), rows, rows, rows, rows)


PRODUCE = Program(produce, static=("spec",), donate=(1,))

Cursor = dict[str, int]


class Stream:
    """The host's side: hands items to rows between chunks.

    `spec` is what is compiled, `batch` is B, `weights` are the model's, where the stream runs.
    """

    def __init__(
        self,
        lm: LanguageModel,
        items: Callable[[int], Item | None],
        *,
        batch: int,
        steps: int,
        history: int,
        length: int,
        depths: tuple[int, ...],
        seed: int = 0,
        mesh: Mesh | None = None,
    ):
        """A stream that starts with item 0; `restart` with a cursor starts it elsewhere.

        Args:
          lm: the frozen model.
          items: the item of each number from 0, the same at every call; None from some number on ends the stream.
          batch: B, at least 1.
          steps, history, length, depths: as of StreamSpec.
          seed: of the sampled tokens.
          mesh: devices that rows are spread over, with the axis "data".

        Raises:
          DexError: as StreamSpec, or a batch that does not divide among the mesh.
        """
        if mesh is not None and batch % mesh.shape["data"]:
            raise DexError(f"{batch} rows do not divide among {mesh.shape['data']} devices: change the batch")
        self.spec = StreamSpec(lm.config, tuple(depths), steps, history, length, lm.eos_ids, mesh)
        self.batch = batch
        self.weights = everywhere(mesh, lm.weights)
        self._items = items
        self._texts: list[list[int]] | None = None  # of `read`
        # How many items are at hand in each chunk beside those that run; rows idle when they are used up.
        self._places = 2 * batch
        self._no_script = no_script(length)
        self._running: list[Scripts | None]
        self._state = self._idle(cache.allocate(lm.config, batch, length, 0, lm.dtype))
        self._begin({"item": 0, "seed": seed})

    @property
    def cursor(self) -> Cursor:
        """{"item": the first item that no row has started, "seed"}: JSON-able, where `restart` goes on."""
        return {"item": self._next_item - len(self._waiting), "seed": self._seed}

    @property
    def done(self) -> bool:
        """Whether the items have come to their end and no row runs any."""
        self._fill()
        return not self._waiting and all(script is None for script in self._running)

    def restart(self, cursor: Cursor | None = None) -> None:
        """Drops half-done items and history: the next chunk starts new items from `cursor`, None being where it is.

        A stream restarted at a cursor and a new one restarted there give the same chunks, bit for bit.
        """
        self._state = self._idle(self._state.memory)
        self._begin(self.cursor if cursor is None else cursor)

    def next(self) -> tuple[Activations, int]:
        """(one chunk, how many of its steps are learnt from); idle throughout once the stream is done."""
        self._fill()
        places = [*self._running, *self._waiting, *[None] * (self._places - len(self._waiting))]
        scripts = stack_scripts([self._no_script if place is None else place for place in places])
        given = jax.tree.map(jnp.asarray, scripts), jnp.int32(len(self._waiting)), self._key
        asked = everywhere(self.spec.mesh, given)
        self._state, activations, report = PRODUCE(self.weights, self._state, *asked, spec=self.spec)
        report = jax.device_get(report)
        self._running = [None if slot == NO_ITEM else places[slot] for slot in report.slot]
        for _ in range(int(report.taken)):
            self._waiting.popleft()
        if self._texts is not None:
            token, run = np.asarray(activations.token)[:, self.spec.history :], report.number != NO_ITEM
            for number, each in zip(report.number[run], token[run], strict=True):
                self._texts[number].append(int(each))
        return activations, int(report.learnt)

    def read(self, items: Sequence[Item], seed: int) -> list[list[int]]:
        """The tokens of some other items, each run to its end; the stream is restarted where it stood."""
        begin, own = self.cursor, self._items
        texts: list[list[int]] = [[] for _ in items]
        self._items = lambda number: items[number] if number < len(items) else None
        self._texts = texts
        self.restart({"item": 0, "seed": seed})
        while not self.done:
            self.next()
        self._items, self._texts = own, None
        self.restart(begin)
        return texts

    def _idle(self, memory: cache.Memory) -> StreamState:
        state = start_rows(memory, self.spec)
        return state if self.spec.mesh is None else jax.device_put(state, _state(self.spec.mesh))

    def _begin(self, cursor: Cursor) -> None:
        self._next_item, self._seed = int(cursor["item"]), int(cursor["seed"])
        self._key = sampling_keys([self._seed])[0]
        self._running = [None] * self.batch
        self._waiting: deque[Scripts] = deque()
        self._ended = False

    def _fill(self) -> None:
        while len(self._waiting) < self._places and not self._ended:
            item = self._items(self._next_item)
            if item is None:
                self._ended = True
                return
            self._waiting.append(script(item, self._next_item, self.spec.length))
            self._next_item += 1
