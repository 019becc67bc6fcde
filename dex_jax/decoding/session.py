"""One generation on the device: prefill in chunks of a few sizes, then the loop, some ticks at a time.

Letters: B sequences, R tokens of a chunk of the prompts, S cache length, C row counts that a tick may choose from.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding import ar
from dex_jax.decoding.costs import PLAIN_TICKS, TickCosts, costs_of
from dex_jax.decoding.dex.drafters import drafter_arrays, exit_zero
from dex_jax.decoding.dex.interface import Chunk
from dex_jax.decoding.dex.own_layers import EagleDrafter
from dex_jax.decoding.dex.row_choice import carried
from dex_jax.decoding.dex.trained_exits import Heads, exit_arrays
from dex_jax.decoding.loops import Prefilled, loop_of, mesh_loop
from dex_jax.decoding.mesh import programs as on_mesh
from dex_jax.decoding.plan import GivenHeads, Plan
from dex_jax.decoding.program import CompiledFunction, forgotten, side_by_side
from dex_jax.decoding.record import Limits, Record, until_done
from dex_jax.decoding.request import Request
from dex_jax.decoding.sizes import batch_bucket, cache_length_for, chunk_sizes, prompt_bucket
from dex_jax.distributed import to_host
from dex_jax.errors import DexError
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn import cache
from dex_jax.nn.forward import extend, last_states, states_at
from dex_jax.nn.placing import weight_specs
from dex_jax.nn.sharding import BY_SEQUENCE, EVERYWHERE, check_batch, place, zeros
from dex_jax.nn.weights import merge_model, with_wide_scales
from dex_jax.progress import notify
from dex_jax.sampling import Sampling, sampling_keys

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel, Outline


def prefill_chunk(
    weights: Any,
    heads: Heads,
    memory: Any,
    last: jax.Array,
    tokens: jax.Array,
    start: jax.Array,
    lengths: jax.Array,
    *,
    plan: Plan,
) -> tuple[Any, jax.Array]:
    """Run one chunk of the prompts and keep the hidden state of each prompt's last token: (memory, last).

    `heads` are those of `plan.cached_heads`, `last` [B, D] the states of last tokens found so far, `tokens` [B, R]
    int32 are padded on the right and begin at position `start`, and `lengths` [B] int32 are those of whole prompts.
    """
    if plan.mesh is not None:
        return on_mesh.prefill_chunk(weights, heads, memory, last, tokens, start, lengths, plan=plan)
    model = merge_model(plan.config, weights)
    states, memory = extend(model, memory, tokens, jnp.full(tokens.shape[0], start), lengths)
    hidden = states[-1]
    cached, arrays = plan.cached_heads, plan.cached_arrays(heads)
    if cached is not None and arrays is not None:
        read = jnp.concatenate([hidden, *states_at(model, tokens, states, cached.reads)], axis=-1)
        taken = cached.extend(model, arrays, memory.exits, Chunk(tokens, read, start, lengths))
        memory = memory._replace(exits=taken)
    return memory, last_states(hidden, last, start, lengths)


def start_decoding(
    weights: Any,
    heads: Heads,
    memory: Any,
    last: jax.Array,
    lengths: jax.Array,
    limits: Limits,
    sampling: Sampling | None,
    prompt: jax.Array | None = None,
    *,
    plan: Plan,
    capacity: int,
) -> Any:
    """Choose token 0 and return the state of the method's loop before its first tick.

    `memory` has no lattice yet. Drafts need the `prompt` [B, S] int32, padded on the right.
    """
    if plan.mesh is not None:
        return on_mesh.start_decoding(
            weights, heads, memory, last, lengths, limits, sampling, prompt, plan=plan, capacity=capacity
        )
    model = merge_model(plan.config, weights)
    token = ar.next_token(model, last, lengths, sampling)
    prefilled = Prefilled(memory, token, lengths, limits, sampling, prompt)
    return loop_of(plan).init(model, heads, plan, prefilled, capacity)


def run_ticks(
    weights: Any,
    heads: Heads,
    state: Any,
    limits: Limits,
    sampling: Sampling | None,
    until_tick: jax.Array,
    *,
    plan: Plan,
) -> Any:
    """Run the method's loop up to tick `until_tick`."""
    if plan.mesh is not None:
        return on_mesh.run_ticks(weights, heads, state, limits, sampling, until_tick, plan=plan)
    model = merge_model(plan.config, with_wide_scales(weights))
    return until_done(loop_of(plan).tick(model, heads, plan, limits, sampling), state, until_tick)


def check_mesh(plan: Plan, sequences: int) -> None:
    """Raise DexError if a plan's mesh cannot run its method, drafter, exit depths or stages, or so many sequences."""
    if plan.mesh is None:
        return
    if isinstance(plan.drafter, EagleDrafter):
        raise DexError(f"the EAGLE-3 head {plan.drafter_source} drafts on one device: leave it or the mesh out")
    mesh_loop(plan).check_mesh(plan)
    check_batch(plan.mesh, sequences)


PREFILL = CompiledFunction(prefill_chunk, static=("plan",), donate=(2, 3), level=1)
START = CompiledFunction(start_decoding, static=("plan", "capacity"), donate=(2,), level=0)
RUN = CompiledFunction(run_ticks, static=("plan",), donate=(2,), level=1)
PROGRAMS = (PREFILL, START, RUN)


_READY: set[Any] = set()
"""The kinds of sessions that have all their programs ready."""


class Session:
    """One batch of B lists of token ids, which is prefilled once, then advanced some ticks at a time.

    With an Outline it can only compile.
    """

    def __init__(self, lm: LanguageModel | Outline, ids: list[list[int]], plan: Plan, request: Request):
        self.lm, self.ids, self.given = lm, ids, plan.heads
        drafts = plan.drafts
        self.sequences = len(ids)
        batch = self.sequences if lm.mesh is not None else batch_bucket(self.sequences)
        self.lengths = np.ones(batch, np.int32)
        self.lengths[: self.sequences] = [len(prompt) for prompt in ids]
        longest = int(self.lengths.max())
        bucket = prompt_bucket(longest)
        self.chunks = chunk_sizes(longest)
        positions = longest + request.max_new_tokens
        self.plan = dataclasses.replace(
            plan,
            config=lm.config.at_length(positions),
            layout=lm.layout,
            mesh=lm.mesh,
            drafter=None if plan.heads.drafter is None else exit_zero(plan.heads.drafter, positions),
            heads=GivenHeads(),
        )
        check_mesh(self.plan, self.sequences)
        self.cache_length = cache_length_for(longest, request.max_new_tokens, plan.ahead, batch)
        self.padded = np.zeros((batch, bucket), np.int32)
        for row, prompt in zip(self.padded, ids, strict=False):
            row[: len(prompt)] = prompt
        eos = np.asarray(lm.eos_ids or (NO_TOKEN,), np.int32)
        most = np.where(np.arange(batch) < self.sequences, request.max_new_tokens, 0)
        limits = Limits(*jax.device_put((most.astype(np.int32), eos)))
        self.limits = self._put(limits, on_mesh.LIMITS)
        seeds = request.seeds_of(self.sequences)
        self.seeds = None if request.temperature == 0 else seeds
        sampling = None if self.seeds is None else sampling_of(request, seeds, batch, lm.config.vocab_size)
        self.sampling = self._put(sampling, on_mesh.sampling_specs(sampling))
        self.tick, self.ticks_per_call = 0, 1
        # Drafts look the text up, [B, S] int32, which begins with the prompt.
        self.prompt = None if drafts is None else np.pad(self.padded, ((0, 0), (0, self.cache_length - bucket)))
        self.heads = Heads()
        self.state: Any = None
        self.program: Any = None  # RUN for this session, once it has run
        self.costs: TickCosts | None = None
        # Clocks of several processes differ, and all of them must choose alike, so they go by the usual costs.
        if self.plan.has_lattice and drafts is not None and drafts.rungs and jax.process_count() == 1:
            kinds = (plan.depths, drafts, type(plan.heads.drafter).__name__, plan.exits)
            mesh = None if lm.mesh is None else tuple(lm.mesh.shape.items())
            self.ran = np.zeros(len(drafts.rungs) + 1, np.int64)  # [C + 1], how often each cost has been paid
            self.costs = costs_of(drafts.rungs, lm.config, lm.dtype, lm.packing, batch, mesh, *kinds)
            self.costs.begin(self.cache_length)

    def compile(self) -> None:
        """Compile all programs of the session from shapes: nothing is allocated, and weights may be abstract."""
        sizes = (self.padded.shape, self.cache_length, self.limits.eos_ids.shape)
        kind = (self.plan, self.lm.dtype, self.lm.packing, sizes, self.sampling is None)
        if (forgotten(), kind) in _READY:  # finding the shapes takes half a second too
            return
        with side_by_side() as start:
            self.compile_by(lambda *about, **statics: start(*about, **statics).out_info)
        _READY.add((forgotten(), kind))

    def compile_by(self, by: Callable[..., Any]) -> None:
        """Call `by` for every program of the session with its arguments; it returns the shapes of what START gives."""
        weights = _shapes(self.lm.weights)
        heads = self._put_heads(jax.eval_shape(self._heads, weights))
        weights = self._put(weights, lambda: weight_specs(weights, self.plan.mesh))
        memory, last, lengths = self._blank_shapes()
        memory = memory._replace(exits=self._put(jax.eval_shape(self._empty_exits), BY_SEQUENCE))
        scalar = self._put(jax.ShapeDtypeStruct((), jnp.int32), EVERYWHERE)
        prompt = self._put(_shapes(self.prompt), BY_SEQUENCE)
        about = (self.limits, self.sampling, prompt)
        statics: dict[str, Any] = {"plan": self.plan, "capacity": self.cache_length}
        started = by(START, weights, heads, memory, last, lengths, *about, **statics)
        state = self._put(_shapes(started), lambda: on_mesh.state_specs(self.plan))
        # RUN takes longest to compile, and meanwhile PREFILL is traced.
        by(RUN, weights, heads, state, self.limits, self.sampling, scalar, plan=self.plan)
        of_prefill, seen = self._of_prefill(heads)
        for size in sorted({*self.chunks}):
            tokens = self._put(jax.ShapeDtypeStruct((len(self.lengths), size), jnp.int32), BY_SEQUENCE)
            by(PREFILL, weights, seen, memory, last, tokens, scalar, lengths, plan=of_prefill)

    def prefill(self) -> None:
        """Run the prompts and choose token 0 of each."""
        self.compile()
        notify("reading the prompt")
        memory, last, lengths = self._blank()
        self.heads = self._put_heads(self._heads(self.lm.weights))
        of_prefill, seen = self._of_prefill(self.heads)
        start = 0
        for size in self.chunks:
            tokens = self._put(jax.device_put(self.padded[:, start : start + size]), BY_SEQUENCE)
            at = self._put(jnp.int32(start), EVERYWHERE)
            start += size
            memory, last = PREFILL(self.lm.weights, seen, memory, last, tokens, at, lengths, plan=of_prefill)
        prompt = self._put(jax.device_put(self.prompt), BY_SEQUENCE)
        about = (self.limits, self.sampling, prompt)
        statics: dict[str, Any] = {"plan": self.plan, "capacity": self.cache_length}
        self.state = START(self.lm.weights, self.heads, memory, last, lengths, *about, **statics)
        if self.costs is not None and self.costs.sums:
            sums = {name: np.full(len(self.lengths), value, np.float32) for name, value in self.costs.sums.items()}
            choice = self.state.row_choice._replace(**self._put(sums, BY_SEQUENCE))
            self.state = self.state._replace(row_choice=choice)
        jax.block_until_ready(self.state)

    def _blank(self) -> tuple[cache.Memory, jax.Array, jax.Array]:
        """Return (memory, last hidden states [B, D], lengths [B]) before the prompts."""
        memory, last, _ = self._blank_shapes()
        shapes, mesh = (memory, last), self.plan.mesh
        memory, last = _zeros(shapes) if mesh is None else zeros(shapes, (on_mesh.MEMORY, BY_SEQUENCE), mesh)
        exits = self._put(self._empty_exits(), BY_SEQUENCE)
        return memory._replace(exits=exits), last, self._put(jax.device_put(self.lengths), BY_SEQUENCE)

    def _blank_shapes(self) -> tuple[cache.Memory, jax.Array, jax.Array]:
        """Return `_blank` as jax.ShapeDtypeStruct, without Memory.exits; the KV cache has no lattice yet."""
        batch, config, dtype = len(self.lengths), self.lm.config, self.lm.dtype
        array: Any = jax.ShapeDtypeStruct
        memory = cache.shapes(config, batch, self.cache_length, 0, dtype, rings=True, layout=self.lm.layout)
        if self.plan.mesh is not None:  # an array without elements is copied everywhere, whatever its sharding says
            memory = memory._replace(lattice_keys=(), lattice_values=())
        shapes = (memory, array((batch, config.width), dtype), array((batch,), jnp.int32))
        return self._put(shapes, (on_mesh.MEMORY, BY_SEQUENCE, BY_SEQUENCE))

    def _empty_exits(self) -> Any:
        """Return Memory.exits before the prompts, () for nothing."""
        cached = self.plan.cached_heads
        return () if cached is None else cached.empty(len(self.lengths), self.cache_length, self.lm.dtype)

    def _put(self, tree: Any, specs: Any) -> Any:
        """Place arrays or shapes on the mesh, if there is one, by `specs` or by a function that gives them."""
        if self.plan.mesh is None:
            return tree
        return place(tree, specs() if callable(specs) else specs, self.plan.mesh)

    def _put_heads(self, heads: Heads) -> Heads:
        return self._put(heads, lambda: on_mesh.head_specs(heads))

    def _of_prefill(self, heads: Heads) -> tuple[Plan, Heads]:
        """Return the part of plan and heads that prefill depends on, so that all methods share its programs."""
        depths = self.plan.depths[-1:]
        plan = dataclasses.replace(self.plan, method="ar", depths=depths, rows=1, decs=False, drafts=None, loop="ar")
        if plan.cached_heads is plan.drafter:
            return dataclasses.replace(plan, exits=None), Heads(drafter=heads.drafter)
        return dataclasses.replace(plan, drafter=None), Heads(exits=heads.exits)

    def _heads(self, weights: Any) -> Heads:
        """Return the trained heads as the programs take them; under jax.eval_shape, their shapes."""
        model = merge_model(self.lm.config, weights, layout=self.lm.layout)
        (trained, drafter), exits = self.given, None
        if trained is not None:
            parameters = trained.parameters
            padded = parameters if self.plan.mesh is None else on_mesh.pad_heads(parameters)
            exits = exit_arrays(model, trained.config, padded, trained.vocabulary)
        return Heads(exits, None if drafter is None else drafter_arrays(drafter, model))

    def advance(self, ticks: int) -> Record:
        """Run about `ticks` more ticks and return the record on the host."""
        costs = self.costs
        if costs is None:
            return self._run(ticks)
        if costs.due:
            # Cohorts that were drafted before leave the stages first.
            self._run(self.plan.stages, costs.of_plain_ticks())
            costs.call_seconds = self._seconds(0, costs.of_plain_ticks())[1]
            record = self._timed(PLAIN_TICKS, costs.of_plain_ticks())
        else:
            self.ticks_per_call = ticks
            record = self._timed(ticks, costs.relative())
        if record.done.all():
            costs.keep()
            costs.sums = carried(to_host(self.state.row_choice))
        return record

    def _timed(self, ticks: int, prices: np.ndarray) -> Record:
        """Run ticks and learn what they cost."""
        assert self.costs is not None
        ran = self.ran
        record, seconds = self._seconds(ticks, prices)
        self.costs.learn(self.ran - ran, seconds)
        return record

    def _seconds(self, ticks: int, prices: np.ndarray) -> tuple[Record, float]:
        start = time.perf_counter()
        return self._run(ticks, prices), time.perf_counter() - start

    def _run(self, ticks: int, prices: np.ndarray | None = None) -> Record:
        """Run at most `ticks` more ticks, which choose rows by their `prices`, [C + 1] float32."""
        self.tick += ticks
        until = self._put(np.int32(self.tick), EVERYWHERE)
        if prices is not None:
            choice = self.state.row_choice._replace(costs=self._put(prices, EVERYWHERE))
            self.state = self.state._replace(row_choice=choice)
        about = (self.lm.weights, self.heads, self.state, self.limits, self.sampling, until)
        if self.program is None:  # to find it anew for every few ticks takes a quarter as long as a tick
            self.program = RUN.compile(*about, plan=self.plan)
        self.state = self.program(*about)
        record = self.record()
        if prices is not None:
            self.ran = to_host(self.state.row_choice.ran).max(axis=0)
        return record

    def rows_run(self) -> tuple[dict[int, int], float | None]:
        """Return the number of ticks by their rows, and the seconds of a plain one, None where none was timed."""
        if self.costs is None or self.plan.drafts is None:
            return {}, None
        ran, plain = dict(zip(self.plan.drafts.rungs, self.ran[:-1].tolist(), strict=True)), self.costs.plain_seconds
        return ran, None if plain is None else plain + self.costs.call_seconds / self.ticks_per_call

    def record(self) -> Record:
        """Return what has been emitted so far, as NumPy arrays."""
        return jax.tree.map(lambda field: field[: self.sequences], to_host(self.state.record))


def _shapes(tree: Any) -> Any:
    """Return the shapes and dtypes of the arrays in `tree` as jax.ShapeDtypeStruct."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


@functools.partial(jax.jit, static_argnums=0)
def _zeros(shapes: Any) -> Any:
    """Return zeros of these shapes, by one program: one array after the other takes as long as a step."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def sampling_of(request: Request, seeds: list[int], batch: int, vocab_size: int) -> Sampling:
    """Return the Sampling of a request for B = `batch` sequences; those without a seed get the last one's key."""
    top_k = vocab_size if request.top_k is None else min(request.top_k, vocab_size)
    return Sampling(
        keys=sampling_keys([*seeds, *seeds[-1:] * (batch - len(seeds))]),
        temperature=jnp.float32(request.temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(1 if request.top_p is None else request.top_p),
    )
