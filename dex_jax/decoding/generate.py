"""The functions generate() and stream(), which take prompts and return text and counts."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dex_jax.decoding.auto import choose_method
from dex_jax.decoding.dex.drafters import draft_model
from dex_jax.decoding.loops import loop_of
from dex_jax.decoding.output import Output, Stats
from dex_jax.decoding.plan import opened, resolve
from dex_jax.decoding.program import compile_seconds
from dex_jax.decoding.record import PREFILL_EXIT, Record
from dex_jax.decoding.request import Dex, Request, explained
from dex_jax.decoding.session import Session
from dex_jax.decoding.sizes import SMALL_CACHE
from dex_jax.decoding.stopping import StopStrings
from dex_jax.distributed import await_end, from_first
from dex_jax.errors import DexError
from dex_jax.host_memory import return_free_memory
from dex_jax.io.prompts import Prompt
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.sharding import device_name
from dex_jax.progress import notify

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel, Outline

TICKS_PER_CALL = 16
"""The most ticks between two outputs, and their number where nobody reads what comes before the last one."""

FIRST_TICKS, UPDATE_SECONDS = 4, 0.05
"""The ticks before the first output after token 0, and the time that those between two later ones should take."""

MOST_SEQUENCES = 4096
"""The most sequences that a batch may hold: far more than any device decodes at once."""


@explained
def generate(lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> Output:
    """Generate continuations of a batch of prompts.

    Whoever is `dex_jax.progress.listening` is told what it is doing meanwhile.

    Args:
      lm: from `dex_jax.load`.
      prompts: strings (the chat template is applied unless chat=False), lists of messages, or lists of token ids;
        one string alone is a batch of one.
      **options: every field of `Request`.

    Returns:
      Output; with any method and any exits its tokens are those of AR under the same seed.

    Raises:
      DexError: bad options or prompts, or no memory for them; the sentence says which and what to do.

    Examples:
      >>> out = generate(lm, ["Why is the sky blue?"], max_new_tokens=32)   # doctest: +SKIP
      >>> out.texts[0], int(out.stats.ticks[0])   # doctest: +SKIP
    """
    (output,) = collections.deque(stream(lm, prompts, **{"ticks_per_update": TICKS_PER_CALL, **options}), maxlen=1)
    return output


@explained
def stream(lm: LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[Output]:
    """Generate as `generate` does, yielding the Output so far after every few ticks; the last one is complete.

    Args:
      lm: from `dex_jax.load`.
      prompts: see `generate`.
      **options: every field of `Request`.

    Yields:
      Output, with `finished` telling which rows have ended.

    Raises:
      DexError: as `generate`.
    """
    request = Request.of(options)
    session = prepare(lm, prompts, request)
    stops = StopStrings(request.stop, lm.tokenizer)
    session.plan.say(lm.fingerprint)
    times = dict.fromkeys(("compile", "prefill", "decode"), 0.0)
    with _timed(times, "prefill"):
        session.prefill()
    notify("decoding")
    output = _output(session, stops, session.record(), times)
    yield output
    ticks = request.ticks_per_update or FIRST_TICKS
    while not output.finished.all():
        before = times["decode"]
        with _timed(times, "decode"):
            record = session.advance(ticks)
        if request.ticks_per_update is None:
            ticks = int(np.clip(ticks * UPDATE_SECONDS / (times["decode"] - before), 1, TICKS_PER_CALL))
        output = _output(session, stops, record, times)
        yield output
    if times["compile"] or len(session.lengths) * session.cache_length > SMALL_CACHE:
        del session  # otherwise the process keeps the memory of compilers, of long texts, or of many
        return_free_memory()


@explained
def precompile(lm: Outline | LanguageModel, prompts: Prompt | Sequence[Prompt], **options: Any) -> float:
    """Check prompts and options, compile what `stream` would run with them, and return the seconds it took.

    With an Outline this happens before any weight is loaded, so that bad input costs nothing and the memory that
    compilation needs does not come on top of the weights. Errors are those of `stream`.

    Args:
      lm: a model, or what is known of it before it is loaded.
      prompts: see `generate`.
      **options: every field of `Request`.
    """
    session = prepare(lm, prompts, Request.of(options))
    before = compile_seconds()
    session.compile()
    return compile_seconds() - before


def prepare(lm: Outline | LanguageModel, prompts: Prompt | Sequence[Prompt], request: Request) -> Session:
    """Build the session of a request: encode its prompts and plan it, but run nothing."""
    ids = tokens_of(lm, prompts, request) if lm.mesh is None else from_first(lambda: tokens_of(lm, prompts, request))
    exits = request.exits if request.draft_model is None else draft_model(lm, request.draft_model)
    method = Dex() if request.method is None else request.method
    method, exits, choice = choose_method(method, opened(exits), lm.fingerprint, lm.mesh, len(ids))
    plan = resolve(method, exits, lm.config, lm.fingerprint)
    free = plan.has_lattice and plan.exits is None and getattr(method, "depths", None) is None
    if free and lm.layout is not None and len(lm.layout.depths) == plan.stages:
        plan = dataclasses.replace(plan, depths=lm.layout.depths)  # the layout alone says which grid
    if plan.has_lattice and plan.stages > 1 and lm.mesh is None:
        turns = (
            f"{plan.stages} explorers take turns on one device: ticks count as if each had a device of its own, the "
            "clock does not, and one explorer (--explorers 1) is faster here"
        )
        plan = dataclasses.replace(plan, remarks=(*plan.remarks, turns))
    return Session(lm, ids, dataclasses.replace(plan, choice=choice), request)


def tokens_of(lm: Outline | LanguageModel, prompts: Prompt | Sequence[Prompt], request: Request) -> list[list[int]]:
    """Return the token ids of every sequence: prompts in their order, each `num_samples` times.

    Raise DexError for no prompt or too many, one that cannot be encoded, or one that leaves no room for new tokens.
    """
    if isinstance(prompts, (bytes, dict, int)) or prompts is None:
        raise DexError(f"prompts is a list of prompts, not {type(prompts).__name__}: put each prompt into a list")
    batch: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if not batch:
        raise DexError("there is no prompt: give at least one")
    if isinstance(batch[0], (int, np.integer, dict)):
        raise DexError("prompts is a list of prompts: put a list of token ids or of messages into a list of its own")
    if len(batch) * request.num_samples > MOST_SEQUENCES:
        raise DexError(
            f"{len(batch)} prompts with {request.num_samples} samples of each are more than the {MOST_SEQUENCES} "
            "sequences that one call takes: give fewer prompts or a smaller num_samples"
        )
    ids = [lm.encode(prompt, request.chat) for prompt in batch]
    for number, prompt in enumerate(ids, 1):
        if len(prompt) + request.max_new_tokens > lm.config.context:
            raise DexError(
                f"prompt {number} has {len(prompt)} tokens, which with {request.max_new_tokens} new ones passes the "
                f"model's context of {lm.config.context}: shorten the prompt or lower max_new_tokens"
            )
    return [prompt for prompt in ids for _ in range(request.num_samples)]


@contextlib.contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    """Add the seconds of a block to times[phase], but those of compilation to times["compile"]; explain its errors."""
    started, compiled = time.perf_counter(), compile_seconds()
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise DexError(
                "the device ran out of memory: lower the number of prompts or samples, max_new_tokens, rows or "
                "explorers, or use a smaller dtype (decode.py --dry-run shows what each needs)"
            ) from error
        if isinstance(error, jax.errors.JaxRuntimeError):
            await_end()
        raise
    finally:
        compiling = compile_seconds() - compiled
        times["compile"] += compiling
        times[phase] += time.perf_counter() - started - compiling


def _output(session: Session, stops: StopStrings, record: Record, times: dict[str, float]) -> Output:
    lm, plan, loop = session.lm, session.plan, loop_of(session.plan)
    tokens, exits = np.array(record.tokens), np.array(record.exits)
    lengths, finished, ticks = np.array(record.lengths), np.array(record.done), np.array(record.ticks)
    texts = []
    for row in range(session.sequences):
        text, kept = stops.apply(tokens[row, : lengths[row]].tolist())
        if kept is not None:
            lengths[row], finished[row] = kept, True
            tokens[row, kept:], exits[row, kept:] = NO_TOKEN, PREFILL_EXIT
            ticks[row] = loop.ticks(exits[row], kept, plan.stages)
        texts.append(text)
    width = int(lengths.max())
    given_out: Any = (tokens, exits, lengths, ticks, finished, record.counts)
    counts = loop.counts(plan, Record(*given_out))
    fields = {name: counts.pop(name) for name in ("ticks", "depth_side_speedup") if name in counts}
    device = jax.devices()[0] if lm.mesh is None else lm.mesh.devices.flat[0]
    many = "" if lm.mesh is None else f"{lm.mesh.size} x "
    rows_run, row_seconds = session.rows_run()
    stats = Stats(
        plan=plan,
        rows_run=rows_run,
        row_seconds=row_seconds,
        exits=exits[:, :width],
        **fields,
        counts=counts,
        compile_seconds=times["compile"],
        prefill_seconds=times["prefill"],
        decode_seconds=times["decode"],
        device=many + device_name(device),
        dtype=str(lm.dtype),
        weights=lm.weights_kind,
    )
    return Output(texts, tokens[:, :width], lengths, session.ids, finished, session.seeds, stats, lm.tokenizer)
