"""generate() and stream(): prompts in, text and counts out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.auto import reconsider, settle
from dex_jax.decoding.dex.drafters import draft_model as as_drafter
from dex_jax.decoding.methods import SPARE, Dex, Method
from dex_jax.decoding.output import Output, Stats
from dex_jax.decoding.record import PREFILL_EXIT, Record
from dex_jax.decoding.resolve import GivenExits, Resolved, opened, resolve
from dex_jax.decoding.session import Session, compile_seconds
from dex_jax.decoding.sizes import ALONE, batch_bucket, cache_length_for
from dex_jax.decoding.stopping import StopStrings
from dex_jax.distributed import from_first, lost_processes
from dex_jax.errors import DexError, whole_number
from dex_jax.host_memory import return_free_memory
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.transformer import Staged
from dex_jax.progress import notify
from dex_jax.prompts import Prompt
from dex_jax.sampling import Sampling, sampling_keys
from dex_jax.sharding import device_name

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel, Outline

TICKS_PER_CALL = 64

MOST_SEQUENCES = 4096
"""What a batch may hold: far more than any device decodes at once."""

SEEDS = 2**63
"""Seeds lie below it."""

SMALLEST_TEMPERATURE = 1e-6
"""Below it float32 logits overflow when divided, and sampling is greedy long before."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A checked request: what to run, and what its Output repeats."""

    session: Session
    method: Resolved
    choice: str | None
    ids: list[list[int]]
    seeds: list[int] | None
    stops: StopStrings
    ticks_per_update: int


def prepare(
    lm: Outline | LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: Method | None = None,
    max_new_tokens: int = 128,
    exits: GivenExits = "default",
    draft_model: LanguageModel | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    num_samples: int = 1,
    stop: str | Sequence[str] | None = None,
    chat: bool = True,
    ticks_per_update: int = 4,
) -> Prepared:
    """Checks prompts and options, which `stream` explains, and builds the session that runs them."""
    whole_number(ticks_per_update=ticks_per_update)
    if draft_model is not None:
        if exits != "default":
            raise DexError("a draft model stands at depth 0, and exits are given too: leave one of them out")
        exits = as_drafter(lm, draft_model)
    exits = opened(exits)
    encode = functools.partial(encode_prompts, lm, prompts, chat, num_samples, max_new_tokens)
    ids = encode() if lm.mesh is None else from_first(encode)
    sampling, seeds = sampling_of(temperature, top_k, top_p, seed, len(ids), lm.config.vocab_size)
    batch = batch_bucket(len(ids))
    length = cache_length_for(max(map(len, ids)), max_new_tokens, SPARE, batch)
    model = (lm.config, lm.layout, lm.dtype, lm.fingerprint)
    settled, choice = settle(Dex() if method is None else method, exits, *model, batch, length, lm.mesh, lm.packing)
    resolved = _resolve(lm, settled, exits)
    session = Session(lm, ids, resolved, max_new_tokens, sampling)
    return Prepared(session, resolved, choice, ids, seeds, StopStrings(stop, lm.tokenizer), ticks_per_update)


P = ParamSpec("P")
R = TypeVar("R")


def _takes_what(prepare: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Gives a function of (lm, prompts, **options) the signature of `prepare`, where every option stands once."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        returns = inspect.signature(function).return_annotation
        function.__signature__ = inspect.signature(prepare).replace(return_annotation=returns)  # type: ignore[attr-defined]
        return function

    return decorate


@_takes_what(prepare)
def generate(lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> Output:
    """Generates continuations of a batch of prompts.

    What it is doing meanwhile is told to whoever is `dex_jax.progress.listening`.

    Args:
      lm: from `dex_jax.load`.
      prompts: strings (the chat template is applied unless chat=False), lists of messages, or lists of token ids;
        one string alone is a batch of one.
      **options: those of `stream`.

    Returns:
      Output; with any method and any exits its tokens are those of AR under the same seed.

    Raises:
      DexError: bad options or prompts, or no memory for them; the sentence says which and what to do.

    Examples:
      >>> out = generate(lm, ["Why is the sky blue?"], max_new_tokens=32)   # doctest: +SKIP
      >>> out.texts[0], int(out.stats.ticks[0])   # doctest: +SKIP
    """
    updates = stream(lm, prompts, **{"ticks_per_update": TICKS_PER_CALL, **options})
    (output,) = collections.deque(updates, maxlen=1)
    return output


@_takes_what(prepare)
def stream(lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Output]:
    """As `generate`, yielding the Output so far after every few ticks; the last one is complete.

    Args:
      lm: from `dex_jax.load`.
      prompts: see `generate`.
      method: AR(), Dex(...) or one of your own; None is Dex(), which chooses what should be fastest on the device at
        hand, and on a mesh is one explorer a stage.
      max_new_tokens: at most so many tokens per sequence, the first one of the prefill included.
      exits: "shared" (the model's own final norm and unembedding at every depth, and no drafter), "default" (what ships
        for the model), a path, or what `load_exits` gave: a drafter or exits at depths, the other of which is the
        default one then. Also an EAGLE-3 head as drafter: its folder, its hub id, or what `load_eagle` gave. Exits
        never change tokens.
      draft_model: a small model of the same vocabulary, on one device, that drafts instead of exits.
      temperature: 0 is greedy; above, tokens are sampled with noise that belongs to their positions.
      top_k: keep the k most likely tokens; None keeps all.
      top_p: keep the smallest set that holds this probability, in (0, 1]; None keeps all.
      seed: row b of the batch gets seed + b; a list of B seeds is taken as it is.
      num_samples: repeats each prompt n times, one row after the other.
      stop: strings that end a sequence; they are cut from the text.
      chat: whether string prompts go through the chat template.
      ticks_per_update: how many ticks run on the device between two yields; `generate` takes 64 unless told.

    Yields:
      Output, with `finished` telling which rows have ended.

    Raises:
      DexError: as `generate`.
    """
    run = prepare(lm, prompts, **options)
    run.method.say(lm.fingerprint)
    times = dict.fromkeys(("compile", "prefill", "decode"), 0.0)
    with _timed(times, "prefill"):
        run.session.prefill()
    notify("decoding")
    output = _output(run, run.session.record(), times)
    yield output
    while not output.finished.all():
        with _timed(times, "decode"):
            record = run.session.advance(run.ticks_per_update)
        output = _output(run, record, times)
        yield output
    session = run.session
    if run.choice is not None and lm.mesh is None:
        about = (lm.config, lm.dtype, session.sequences, session.cache_length, lm.packing)
        reconsider(session.pace, *about)
    if session.cache_length > ALONE:
        del run, session  # what they held of a long text would stay with the process
        return_free_memory()


@_takes_what(prepare)
def precompile(lm: Outline | LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> float:
    """Checks prompts and options and compiles what `stream` would run with them; returns the seconds it took.

    With an Outline this happens before any weight is loaded, so that bad input costs nothing and what compilation needs
    of memory does not come on top of the weights. Options, except ticks_per_update, and errors are those of `stream`.
    """
    run = prepare(lm, prompts, **options)
    before = compile_seconds()
    run.session.compile()
    return compile_seconds() - before


def _resolve(lm: Outline | LanguageModel, method: Method, exits: GivenExits) -> Resolved:
    """`resolve`; on a mesh, whose stages hold layers already, a grid that nothing else settles is theirs."""
    resolved = resolve(method, exits, lm.config, lm.fingerprint)
    schedule, given = resolved.schedule, isinstance(method, Dex) and method.depths is not None
    free = schedule.has_lattice and resolved.exits is None and not given
    if not (free and isinstance(lm.layout, Staged) and len(lm.layout.depths) == schedule.stages):
        return resolved
    return dataclasses.replace(resolved, schedule=dataclasses.replace(schedule, depths=lm.layout.depths))


@contextlib.contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    """Adds the seconds of a block to times[phase], and what was compilation to times["compile"] instead."""
    begin, compiled = time.perf_counter(), compile_seconds()
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DexError(
                "the device ran out of memory: lower the number of prompts or samples, max_new_tokens, rows or "
                "explorers, or use a smaller dtype (decode.py --dry-run shows what each needs)"
            ) from error
        if isinstance(error, jax.errors.JaxRuntimeError) and (lost := lost_processes()):
            raise DexError(f"{' and '.join(lost)} no longer answers: start all processes again") from error
        raise
    finally:
        compiling = compile_seconds() - compiled
        times["compile"] += compiling
        times[phase] += time.perf_counter() - begin - compiling


def encode_prompts(
    lm: Outline | LanguageModel, prompts: Prompt | Sequence[Prompt], chat: bool, num_samples: int, max_new_tokens: int
) -> list[list[int]]:
    """Token ids of every sequence, prompts in their order and each `num_samples` times.

    A DexError where there is no prompt, one that cannot be encoded, or one that leaves no room for the new tokens.
    """
    whole_number(max_new_tokens=max_new_tokens, num_samples=num_samples)
    batch: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not batch:
        raise DexError("there is no prompt: give at least one")
    if isinstance(batch[0], (int, np.integer, dict)):
        raise DexError("prompts is a list of prompts: put a list of token ids or of messages into a list of its own")
    if len(batch) * num_samples > MOST_SEQUENCES:
        raise DexError(
            f"{len(batch)} prompts with {num_samples} samples of each are more than the {MOST_SEQUENCES} sequences "
            "that one call takes: give fewer prompts or a smaller num_samples"
        )
    ids = [lm.encode(prompt, chat) for prompt in batch]
    for number, prompt in enumerate(ids, 1):
        if len(prompt) + max_new_tokens > lm.config.context:
            raise DexError(
                f"prompt {number} has {len(prompt)} tokens, which with {max_new_tokens} new ones passes the model's "
                f"context of {lm.config.context}: shorten the prompt or lower max_new_tokens"
            )
    return [prompt for prompt in ids for _ in range(num_samples)]


def sampling_of(
    temperature: float, top_k: int | None, top_p: float | None, seed: int | Sequence[int], batch: int, vocab_size: int
) -> tuple[Sampling | None, list[int] | None]:
    """(what the loops sample with, seed of each sequence); None for greedy decoding.

    A DexError names an option out of its range, or seeds of another number than sequences.
    """
    if not (np.isfinite(temperature) and temperature >= 0):
        raise DexError(f"temperature must be 0 (greedy) or above, not {temperature}")
    if 0 < temperature < SMALLEST_TEMPERATURE:
        raise DexError(f"temperature {temperature} is too small to divide by: use 0, which is greedy")
    if top_k is not None:
        whole_number(top_k=top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise DexError(f"top_p must lie in (0, 1], not {top_p}")
    seeds = [int(seed) + row for row in range(batch)] if isinstance(seed, (int, np.integer)) else list(seed)
    if not all(isinstance(each, (int, np.integer)) and -SEEDS <= each < SEEDS for each in seeds):
        raise DexError("a seed is a whole number of at most 63 bits: give one, or one for each sequence")
    if len(seeds) != batch:
        raise DexError(f"there are {len(seeds)} seeds for {batch} sequences: give one number, or one for each")
    if temperature == 0:
        return None, None
    return (
        Sampling(
            keys=sampling_keys(seeds),
            temperature=jnp.float32(temperature),
            top_k=jnp.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
            top_p=jnp.float32(1 if top_p is None else top_p),
        ),
        seeds,
    )


def _output(run: Prepared, record: Record, times: dict[str, float]) -> Output:
    tokens, exits = np.array(record.tokens), np.array(record.exits)
    lengths, finished, ticks = np.array(record.lengths), np.array(record.done), np.array(record.ticks)
    texts, schedule = [], run.method.schedule
    for row in range(len(run.ids)):
        text, kept = run.stops.apply(tokens[row, : lengths[row]].tolist())
        if kept is not None:
            lengths[row], finished[row] = kept, True
            tokens[row, kept:], exits[row, kept:] = NO_TOKEN, PREFILL_EXIT
            ticks[row] = schedule.loop.ticks(exits[row], kept, schedule.stages)
        texts.append(text)
    width = int(lengths.max())
    given_out: Any = (tokens, exits, lengths, ticks, finished, record.counts)
    counts = schedule.loop.counts(schedule, Record(*given_out))
    fields = {name: counts.pop(name) for name in ("ticks", "depth_side_speedup") if name in counts}
    mesh = run.session.lm.mesh
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    many = "" if mesh is None else f"{mesh.size} x "
    stats = Stats(
        schedule=schedule,
        choice=run.choice,
        exits_source=run.method.source,
        drafter_source=run.method.drafter_source,
        exits=exits[:, :width],
        **fields,
        counts=counts,
        compile_seconds=times["compile"],
        prefill_seconds=times["prefill"],
        decode_seconds=times["decode"],
        device=many + device_name(device),
        dtype=str(run.session.lm.dtype),
        weights=run.session.lm.weights_kind,
    )
    return Output(texts, tokens[:, :width], lengths, run.ids, finished, run.seeds, stats, run.session.lm.tokenizer)
