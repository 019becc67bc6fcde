"""The teacher-forced pass: what exits give at every answer position of known texts, and what DEX would count there.

Every text runs through the model once. Only the best few tokens of each exit and its divergence leave the device, and
only the logits of one exit at one block of positions exist at a time.

An exit reads the state at its depth and, if its kind does, the features of the position before at the depth that this
position has reached. Nothing else of a run matters to it, so an *ask* is (depth of the exit, depth of the features of
the position before that it reads, L for the true final ones).

Letters: N answer positions, X trained depths, P asks, Q depths that asks read, C best tokens kept, L layers, K stages,
B texts of a batch, R padded length, A longest answer, D width, M rows of a block, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.plan import Plan
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.attention import KeyValues, capped
from dex_jax.nn.exits import Context, ExitHeads, head_at, initial_heads, parameters_of
from dex_jax.nn.forward import depth_states
from dex_jax.nn.layers import linear
from dex_jax.nn.targets import Vocabulary, targets
from dex_jax.nn.weights import merge_model

PromptAndAnswer = tuple[Sequence[int], Sequence[int]]
"""The token ids of a prompt, and those of its answer."""

Ask = tuple[int, int]

BLOCK = 256
"""Number of positions at which the logits of one exit exist at a time."""

LENGTH_STEP = 64


class ExitOutputs(NamedTuple):
    """The best tokens of exits at N positions, and their divergence there."""

    best: Any  # [N, P, C] int32, full ids of the best tokens, best first
    divergence: Any  # [N, P] float32, KL from the final distribution over draft vocabulary and rest, in nats


@dataclasses.dataclass(frozen=True, eq=False)
class Forced:
    """The outputs of exits at every answer position of some texts, one text after the other, N positions in all."""

    layers: int  # L
    exits: ExitsConfig  # their kind, and X depths
    asks: tuple[Ask, ...]  # P, in the order of the arrays
    grids: tuple[tuple[int, ...], ...]  # depths x_1 < ... < x_K = L of the grids that `asks` serve
    outputs: ExitOutputs  # arrays on the host; C >= K - 1 for every grid unless V' is smaller
    answer_tokens: np.ndarray  # [N] int32, the answers' tokens
    held: np.ndarray  # [N] bool, whether the draft vocabulary holds the target
    lengths: tuple[int, ...]  # the number of positions of each text

    def of(self, texts: Sequence[int]) -> Forced:
        """Return the same for some of the texts, by number."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in texts])
        return dataclasses.replace(
            self,
            outputs=jax.tree.map(lambda field: field[at], self.outputs),
            answer_tokens=self.answer_tokens[at],
            held=self.held[at],
            lengths=tuple(self.lengths[i] for i in texts),
        )


def force(
    lm: LanguageModel,
    exits: TrainedExits,
    texts: Sequence[PromptAndAnswer],
    grids: Sequence[tuple[int, ...]] = (),
    *,
    batch: int = 8,
) -> Forced:
    """Ask every exit with true features at every answer position, and make all other asks of DEX on some grids.

    For kind "attn" and more than three stages one thing is an approximation: the context layer sees a node's
    ancestors as committed, except its parent, even where they are not committed yet.

    Args:
      lm: the model.
      exits: at trained depths below L; they are cast to the model's dtype.
      texts: (prompt, answer) of token ids; an answer ends with its first EOS.
      grids: x_1 < ... < x_K = L each, all but the last among the trained depths.
      batch: B.

    Raises:
      DexError: exits that do not fit the model, no texts, or texts without a prompt or an answer or too long.
    """
    _check_exits(lm.config, exits)
    checked = [_checked(lm, number, *text) for number, text in enumerate(texts, 1)]
    if not checked or batch < 1:
        raise DexError(
            f"there is nothing to measure: {len(checked)} texts in batches of {batch}, give at least one of each"
        )
    layers = lm.config.num_layers
    asks = {(depth, layers) for depth in exits.config.depths}
    if exits.config.needs_previous:
        asks |= {pair for grid in grids for pair in itertools.combinations(grid[:-1], 2)}
    size = lm.config.vocab_size if exits.vocabulary is None else len(exits.vocabulary)
    count = min(size, max([1, *(len(grid) - 1 for grid in grids)]))
    statics = Statics(lm.config, exits.config, tuple(sorted(asks)), count)
    parameters = {name: jnp.asarray(value, lm.dtype) for name, value in exits.parameters.items()}
    draft = None if exits.vocabulary is None else jnp.asarray(exits.vocabulary, jnp.int32)

    longest = max(len(answer) for _, answer in checked)
    found: dict[int, ExitOutputs] = {}
    for chosen in batches([len(prompt) + len(answer) for prompt, answer in checked], batch):
        ids, at = _padded([checked[i] for i in chosen], batch, longest)
        rows = answer_rows(statics, lm.weights, parameters, jnp.asarray(ids), jnp.asarray(at))
        index = np.concatenate([row * longest + np.arange(len(checked[i][1])) for row, i in enumerate(chosen)])
        blocks = []
        for first in range(0, len(index), BLOCK):
            part = index[first : first + BLOCK]
            block = jnp.asarray(np.pad(part, (0, BLOCK - len(part))))
            outputs = jax.device_get(ask_exits_along(statics, lm.weights, parameters, draft, rows, block))
            blocks.append(ExitOutputs(*(field[: len(part)] for field in outputs)))
        joined = _joined(blocks)
        bounds = np.cumsum([0, *(len(checked[i][1]) for i in chosen)])
        for row, i in enumerate(chosen):
            found[i] = ExitOutputs(*(field[bounds[row] : bounds[row + 1]] for field in joined))
    answer_tokens = np.concatenate([np.asarray(answer, np.int32) for _, answer in checked])
    return Forced(
        layers=layers,
        exits=exits.config,
        asks=statics.asks,
        grids=tuple(grids),
        outputs=_joined([found[i] for i in range(len(checked))]),
        answer_tokens=answer_tokens,
        held=np.ones(len(answer_tokens), bool)
        if exits.vocabulary is None
        else np.isin(answer_tokens, exits.vocabulary),
        lengths=tuple(len(answer) for _, answer in checked),
    )


def first_exits(forced: Forced, depths: Sequence[int], born: int, decs: bool = True) -> np.ndarray:
    """Return the first of exits 1..K-1 that gives each next token under a node that was `born` at an exit 1..K.

    With `decs` an exit passes over what the exits before it proposed. The result is [N] int32, K where none gives it.
    """
    stages, layers = len(depths), forced.layers
    right, held = [], np.full((len(forced.answer_tokens), stages - 1), NO_TOKEN, np.int32)
    for k in range(1, stages):
        # The parent has done so many stages when its child has done k.
        done = k + born if forced.exits.needs_previous else stages
        ask = (depths[k - 1], depths[done - 1] if done < stages else layers)
        best = forced.outputs.best[:, forced.asks.index(ask)]
        free = ~(best[:, :, None] == held[:, None, : k - 1 if decs else 0]).any(axis=-1)
        token = np.take_along_axis(best, free.argmax(axis=1)[:, None], axis=1)[:, 0]
        held[:, k - 1] = np.where(free.any(axis=1), token, NO_TOKEN)
        right.append(held[:, k - 1] == forced.answer_tokens)
    found = np.stack([*right, np.ones(len(forced.answer_tokens), bool)]).argmax(axis=0)
    return (found + 1).astype(np.int32)


def dex_exits(forced: Forced, depths: Sequence[int], decs: bool = True) -> list[np.ndarray]:
    """Return `Stats.exits` [n] of DEX on each text, for `depths` among the grids and rows that never prune."""
    stages, start, every = len(depths), 0, []
    first = {born: first_exits(forced, depths, born, decs) for born in range(1, stages + 1)}
    for length in forced.lengths:
        exits, born = np.full(length, PREFILL_EXIT, np.int32), stages
        for i in range(1, length):
            exits[i] = born = int(first[born][start + i])
        every.append(exits)
        start += length
    return every


def forced_exits(
    lm: LanguageModel, prompt: Sequence[int], tokens: Sequence[int], schedule: Plan, exits: TrainedExits | None = None
) -> np.ndarray:
    """Return the exit that first gives each of n tokens emitted greedily after a prompt: [n] int32 as Stats.exits.

    With rows that never prune, the loop's `exits` and ticks equal these counts (but see `force`); with fewer rows they
    are never smaller. `exits` are trained ones, x_1 .. x_{K-1} among their depths; None for the model's own head.
    """
    depths = schedule.depths
    if len(depths) == 1:
        return np.asarray([PREFILL_EXIT, *[1] * (len(tokens) - 1)], np.int32)
    exits = untrained_exits(lm, depths[:-1]) if exits is None else exits
    return dex_exits(force(lm, exits, [(prompt, tokens)], [depths], batch=1), depths, schedule.decs)[0]


def untrained_exits(lm: LanguageModel, depths: tuple[int, ...]) -> TrainedExits:
    """Return exits of kind "shared", the model's own final norm and unembedding at some depths."""
    config = ExitsConfig("shared", depths, lm.config.width, norm_eps=lm.config.norm_eps)
    model = merge_model(lm.config, lm.weights)
    parameters = parameters_of(initial_heads(config, model.final_scale))
    return TrainedExits(config, parameters, None, lm.fingerprint, {}, "shared")


def batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Yield the numbers of texts to run together, by length; all batches but the last are full.

    Examples:
      >>> list(batches([100, 120, 10, 200, 110], 2))
      [[2, 0], [4, 1], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _checked(lm: LanguageModel, number: int, prompt: Sequence[int], answer: Sequence[int]) -> PromptAndAnswer:
    """Return the text up to the answer's first EOS.

    Raise DexError for no prompt or no answer, too many tokens for the model, or ids that it does not have.
    """
    end = next((i + 1 for i, token in enumerate(answer) if token in lm.eos_ids), len(answer))
    if not len(prompt) or not end:
        raise DexError(f"text {number} has no {'answer' if len(prompt) else 'prompt'}: give at least one token of each")
    if len(prompt) + end > lm.config.context:
        raise DexError(
            f"text {number} has {len(prompt) + end} tokens, which passes the model's context of {lm.config.context}: "
            "shorten it"
        )
    ids = [int(token) for token in (*prompt, *answer[:end])]
    if not all(0 <= token < lm.config.vocab_size for token in ids):
        raise DexError(f"text {number} holds token ids outside the model's vocabulary of {lm.config.vocab_size}")
    return ids[: len(prompt)], ids[len(prompt) :]


def _padded(texts: Sequence[PromptAndAnswer], batch: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids [B, R], answer positions [B, A]); rows and positions beyond a text's end hold anything."""
    length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    ids = np.zeros((batch, -(-length // LENGTH_STEP) * LENGTH_STEP), np.int32)
    at = np.zeros((batch, longest), np.int32)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer) - 1] = [*prompt, *answer[:-1]]
        at[row] = np.minimum(len(prompt) - 1 + np.arange(longest), ids.shape[1] - 1)
    return ids, at


def _joined(parts: Sequence[ExitOutputs]) -> ExitOutputs:
    return jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


def _check_exits(model: ModelConfig, found: TrainedExits) -> None:
    exits, vocabulary = found.config, found.vocabulary
    if exits.width != model.width or exits.depths[-1] >= model.num_layers:
        raise DexError(
            f"exits of width {exits.width} at depths {exits.depths} do not fit a model of width {model.width} and "
            f"{model.num_layers} layers: use those that were trained for it"
        )
    size = None if vocabulary is None else len(vocabulary)
    if size != exits.draft_size:
        raise DexError(f"the exits need a draft vocabulary of {exits.draft_size} tokens and were given {size}")
    if vocabulary is not None and not (
        np.all(np.diff(vocabulary) > 0) and vocabulary[0] >= 0 and vocabulary[-1] < model.vocab_size
    ):
        raise DexError("the draft vocabulary must hold ascending token ids of the model's vocabulary, without repeats")


@dataclasses.dataclass(frozen=True)
class Statics:
    """The static values that the compiled programs depend on, beside shapes."""

    config: ModelConfig
    exits: ExitsConfig
    asks: tuple[Ask, ...]
    count: int  # C

    @property
    def sources(self) -> tuple[int, ...]:
        """The Q depths of the features of the position before that asks read."""
        return tuple(sorted({source for _, source in self.asks}))


class AnswerStates(NamedTuple):
    """The arrays that exits read at the answer positions of a batch."""

    states: jax.Array  # [X, B A, D], hidden states at the trained depths
    final: jax.Array  # [B A, D], features after the final norm at depth L
    previous: jax.Array | None  # [Q, B A, D], features of the position before; None for exits that do not read them
    context: jax.Array | None  # [Q, B A, D], from the context layer; None unless the kind is "attn"


@functools.partial(jax.jit, static_argnums=0)
def answer_rows(
    statics: Statics, weights: Any, parameters: dict[str, jax.Array], ids: jax.Array, at: jax.Array
) -> AnswerStates:
    """Run ids [B, R] and gather what exits read at positions `at` [B, A]."""
    config, exits = statics.config, statics.exits
    model = merge_model(config, weights)
    batch, length = ids.shape
    states = depth_states(model, ids, (*exits.depths, config.num_layers))
    final = model.normed(states[-1])

    def gathered(x: jax.Array) -> jax.Array:
        return x[..., jnp.arange(batch)[:, None], at, :].reshape(*x.shape[:-3], -1, x.shape[-1])

    if not exits.needs_previous:
        return AnswerStates(gathered(states[:-1]), gathered(final), None, None)
    heads = ExitHeads(exits, lambda name, shape, kind: parameters[name])
    own = heads.base(states[:-1].reshape(len(exits.depths), batch * length, -1)).reshape(states[:-1].shape)
    # Row p holds the features of position p - 1.
    before = jnp.pad(jnp.stack([*own, final])[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])
    places = [(*exits.depths, config.num_layers).index(source) for source in statics.sources]
    previous, context = gathered(before[np.asarray(places)]), None
    if heads.context is not None:
        read = previous.reshape(len(places), *at.shape, -1)
        # If the parent has not finished, the newest committed position is the one before it.
        newest = jnp.asarray([1 if source == config.num_layers else 2 for source in statics.sources])
        context = _contexts(heads.context, model.embed_tokens(ids), before[-1], read, at, newest)
        context = context.reshape(previous.shape)
    return AnswerStates(gathered(states[:-1]), gathered(final), previous, context)


def _contexts(
    context: Context, embedded: jax.Array, true: jax.Array, previous: jax.Array, at: jax.Array, newest: jax.Array
) -> jax.Array:
    """Run the context layer at positions `at` [B, A] for the features `previous` of each depth: [Q, B, A, D].

    `embedded` and `true` [B, R, D] are token embeddings and the true features before each position, `newest` [Q] int32
    says how far back the newest committed position is.
    """
    batch, length, _ = embedded.shape
    everywhere = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    keys, values = context.keys_values(context.enter_rows(embedded, true), everywhere)
    tokens = jnp.take_along_axis(embedded, at[:, :, None], axis=1)
    itself = jnp.broadcast_to(jnp.eye(at.shape[1], dtype=bool)[None], (batch, at.shape[1], at.shape[1]))
    distance = at[:, :, None] - everywhere[:, None, :]

    def one_depth(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        before, nearest = pair
        seen = (distance >= nearest) & (distance <= context.config.window)
        return context.output(context.enter_rows(tokens, before), at, KeyValues(keys, values, seen), itself)

    return jax.lax.map(one_depth, (previous, newest))


@functools.partial(jax.jit, static_argnums=0)
def ask_exits_along(
    statics: Statics,
    weights: Any,
    parameters: dict[str, jax.Array],
    draft: jax.Array | None,
    rows: AnswerStates,
    block: jax.Array,
) -> ExitOutputs:
    """Run all asks at the rows `block` [M] int32, with one ask's logits at a time; `draft` is [V'] int32 or None."""
    model = merge_model(statics.config, weights)
    unembed, cap = model.vocabulary_kernel, statics.config.logit_cap
    vocabulary = Vocabulary(unembed, None if draft is None else unembed[draft], draft, cap)
    kernel = unembed if vocabulary.draft_unembed is None else vocabulary.draft_unembed
    goal = targets(rows.final[block], vocabulary)

    def one_ask(_: None, place: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
        exit_, source = place
        read = (rows.previous, rows.context)
        previous, context = (None if each is None else each[source][block][None] for each in read)
        head = head_at(statics.exits, parameters, exit_)
        features = head.features(rows.states[exit_][block][None], previous, context)[0]
        logits = capped(linear(features[:, :-1], kernel, out_dtype=jnp.float32), cap)
        rest = features[:, -1].astype(jnp.float32)
        log_all = jax.nn.logsumexp(logits, axis=-1)
        expected = jnp.sum(goal.inside * logits, axis=-1)
        if draft is not None:
            log_all = jnp.logaddexp(log_all, rest)
            expected = expected + jnp.where(goal.outside > 0, goal.outside * rest, 0.0)
        # If the values are used too, XLA sorts the whole vocabulary on CPUs, and the program takes six times as long.
        column = jax.lax.top_k(logits, statics.count)[1]
        best = column if draft is None else draft[column]
        return None, (best, log_all - expected - goal.entropy)

    places = [(statics.exits.depths.index(depth), statics.sources.index(source)) for depth, source in statics.asks]
    _, outputs = jax.lax.scan(one_ask, None, jnp.asarray(places, jnp.int32))
    return ExitOutputs(*(jnp.moveaxis(x, 0, 1) for x in outputs))
