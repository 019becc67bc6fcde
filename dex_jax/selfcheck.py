"""`python -m dex_jax.selfcheck`: does depth exploration hold on this device, and what does a tick cost here?

Prints one block to paste into a report. Exit code 0 when every check holds, 1 when one fails, 2 for bad input.
"""

from __future__ import annotations

if __name__ == "__main__":  # which imports JAX only when its arguments are read
    import sys

    from dex_jax.cli.selfcheck import main

    sys.exit(main())

import dataclasses
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.check import CLOSE, compare
from dex_jax.decoding.counting import ticks_of
from dex_jax.decoding.generate import generate
from dex_jax.decoding.output import Output
from dex_jax.decoding.plan import DEFAULT_EXPLORERS, Method, Plan, plan_for
from dex_jax.decoding.record import Limits
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session, compile_seconds
from dex_jax.hardware import published
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import NO_TOKEN, full_rows
from dex_jax.nn.transformer import Unrolled
from dex_jax.nn.weights import merge_model, weight_bytes
from dex_jax.progress import notify

PROMPTS = ("Why do cats purr?", "Name three rivers and the sea that each of them flows into.")
NEW_TOKENS = 24
WARM_TICKS, TIMED_TICKS, REPETITIONS = 4, 8, 7
CANARY_ROWS = 32_769
"""The least number of float32 rows at which jax 0.10.2 goes wrong."""


def _squared_products() -> bool:
    """Whether a vmapped product of matrix and row, squared and summed, is right in all rows: jax issue 39103."""
    rows = jnp.zeros((CANARY_ROWS, 3)).at[:, 0].set(jnp.arange(CANARY_ROWS))
    matrix = jnp.eye(3)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    # The identity leaves the row as it is, so nothing is rounded but the square.
    return bool(np.array_equal(found, np.arange(CANARY_ROWS, dtype=np.float32) ** 2))


def _arctangents() -> bool:
    """Whether arctan is right at 50 and more numbers: jax issue 39352, which not every CPU shows."""
    return all(
        np.allclose(jnp.arctan(x), np.arctan(x), atol=1e-3)
        for x in (np.linspace(-8, 8, count, dtype=np.float32) for count in (50, 64, 200))
    )


CANARIES = {"39103": _squared_products, "39352": _arctangents}
"""jax issue -> whether this device computes what some version of JAX has compiled to wrong results, without a word."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check: what was asked, whether it holds, and the particulars."""

    name: str
    holds: bool
    detail: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What a self-check found."""

    facts: dict[str, Any]  # label -> value, in the order in which they are printed
    findings: list[Finding]  # the checks

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(finding.holds for finding in self.findings)

    def text(self) -> str:
        """The block to paste."""
        lines = [f"{label}: {'unknown' if value is None else value}" for label, value in self.facts.items()]
        lines += [f"{'ok  ' if f.holds else 'FAIL'} {f.name}: {f.detail}" for f in self.findings]
        rule = "-" * 8
        return "\n".join([f"{rule} dex_jax selfcheck {rule}", *lines, "all checks hold" if self.holds else "FAILED"])

    def json(self) -> str:
        """The same as one JSON object: facts, findings, holds."""
        return json.dumps(dataclasses.asdict(self) | {"holds": self.holds})


def selfcheck(lm: LanguageModel, new_tokens: int = NEW_TOKENS) -> Report:
    """Runs every check and measurement on a loaded model.

    Args:
      lm: any model; without a tokenizer the prompts are token ids.
      new_tokens: tokens per prompt, less where the context is short.
    """
    explorers = min(DEFAULT_EXPLORERS, lm.config.num_layers)
    method = Dex(explorers=explorers, rows=full_rows(explorers), draft=False)
    plan = plan_for(method, lm.config.num_layers)
    prompts = _prompts(lm)
    new_tokens = min(new_tokens, lm.config.context - max(map(len, prompts)))
    before = compile_seconds()
    findings = [_canaries()]
    greedy: list[Output] = []

    def decode(chosen: Method, prompt: list[int], temperature: float) -> Output:
        # One prompt at a time: the programs that are timed below are then the ones that are checked.
        options: dict[str, Any] = {"exits": "shared", "max_new_tokens": new_tokens, "temperature": temperature}
        return generate(lm, [prompt], method=chosen, **options)

    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        notify(f"decoding ({name})")
        explored = [decode(method, prompt, temperature) for prompt in prompts]
        plain = [decode(AR(), prompt, temperature) for prompt in prompts]
        findings.append(_same_tokens(lm, f"DEX and AR give the same tokens, {name}", explored, plain, temperature))
        findings.append(_counted_ticks(name, explored, plan))
        greedy = greedy or explored
    notify("timing")
    times = _step_and_tick(lm, prompts[0], (plan_for(AR(), lm.config.num_layers), plan), new_tokens)
    drafted = decode(Dex(explorers=explorers), prompts[0], 0.0)
    findings.append(_same_tokens(lm, "with drafts the tokens are the same, greedy", [drafted], greedy[:1], 0.0))
    findings.append(_counted_ticks("with drafts", [drafted], drafted.stats.plan))
    measured = {
        "AR step (ms)": round(times.step, 2),
        "DEX tick (ms)": round(times.tick, 2),
        "weights read in an AR step": _reading(lm, times.step),
        "kernels of an AR step, of a DEX tick": times.kernels,
        "final head, 1 row (ms)": round(_head_time(lm, 1), 2),
        f"exit heads, {explorers - 1} rows (ms)": round(_head_time(lm, explorers - 1), 2) if explorers > 1 else None,
        "peak memory (GB)": _peak_memory(),
    }
    return _report(lm, plan, findings, measured, before)


def quick_check(lm: LanguageModel) -> Report:
    """Only whether DEX gives AR's tokens here and counts its ticks right: greedy, one prompt, no times.

    It runs the exits that a user gets, so that what it compiles is used again.

    Args:
      lm: any model; without a tokenizer the prompt is token ids.
    """
    before = compile_seconds()
    prompts = _prompts(lm)[:1]
    options: dict[str, Any] = {"max_new_tokens": min(NEW_TOKENS, lm.config.context - len(prompts[0]))}
    notify("decoding (DEX)")
    explored = [generate(lm, prompts, method=Dex(explorers=min(DEFAULT_EXPLORERS, lm.config.num_layers)), **options)]
    notify("decoding (AR)")
    plain = [generate(lm, prompts, method=AR(), **options)]
    plan = explored[0].stats.plan
    findings = [
        _canaries(),
        _same_tokens(lm, "DEX and AR give the same tokens, greedy", explored, plain, 0.0),
        _counted_ticks("greedy", explored, plan),
    ]
    return _report(lm, plan, findings, {}, before)


def _prompts(lm: LanguageModel) -> list[list[int]]:
    if lm.tokenizer is not None:
        return [lm.encode(prompt) for prompt in PROMPTS]
    return [[(7 * i + start) % lm.config.vocab_size for i in range(9)] for start in range(len(PROMPTS))]


def _canaries() -> Finding:
    wrong = [issue for issue, holds in CANARIES.items() if not holds()]
    detail = f"jax issues {', '.join(CANARIES)}" if not wrong else f"wrong results, see jax issue {', '.join(wrong)}"
    return Finding("what some version of jax has miscompiled is right here", not wrong, detail)


def _same_tokens(
    lm: LanguageModel, name: str, outputs: list[Output], references: list[Output], temperature: float
) -> Finding:
    tolerance = CLOSE[str(lm.dtype)]
    holds, tokens, partings = True, 0, []
    for number, (output, reference) in enumerate(zip(outputs, references, strict=True), 1):
        (check,) = compare(lm, output, reference, temperature=temperature)
        tokens += int(reference.lengths[0])
        if check.identical:
            continue
        assert check.top2_margin is not None
        rounding = check.top2_margin < tolerance
        holds &= rounding
        partings.append(
            f"prompt {number} differs from token {check.first_divergence} on, where the top-2 margin is "
            f"{check.top2_margin:.1e} ({'rounding' if rounding else 'too wide to be rounding'})"
        )
    return Finding(name, holds, "; ".join(partings) or f"{tokens} tokens, {len(outputs)} prompt(s)")


def _counted_ticks(name: str, outputs: list[Output], plan: Plan) -> Finding:
    ticks = [int(np.asarray(out.stats.ticks)[0]) for out in outputs]
    predicted = [ticks_of(out.stats.exits[0], int(out.lengths[0]), plan.stages) for out in outputs]
    return Finding(f"ticks are K + sum(exits[1:n-1]), {name}", ticks == predicted, f"{ticks} and {predicted}")


class Timed(NamedTuple):
    """What an AR step and a DEX tick take."""

    step: float  # milliseconds
    tick: float
    kernels: str | None  # launched by each; None without a profiler that sees them


def _step_and_tick(lm: LanguageModel, prompt: list[int], schedules: tuple[Plan, Plan], new_tokens: int) -> Timed:
    """Medians of an AR step and of a DEX tick, in turns so that both see the same machine."""
    sessions = []
    for plan in schedules:
        session = Session(lm, [prompt], plan, Request(max_new_tokens=new_tokens))
        # Nothing may end early: a loop that is done takes no time.
        most, eos = session.limits
        session.limits = Limits(jnp.full_like(most, session.cache_length + 1), jnp.full_like(eos, NO_TOKEN))
        session.prefill()
        session.advance(WARM_TICKS)
        sessions.append(session)
    seconds: list[list[float]] = [[], []]
    for _ in range(REPETITIONS):
        for session, found in zip(sessions, seconds, strict=True):
            begin = time.perf_counter()
            session.advance(TIMED_TICKS)
            found.append((time.perf_counter() - begin) / TIMED_TICKS)
    step, tick = (1e3 * float(np.median(found)) for found in seconds)
    seen = [_launched(session) for session in sessions] if jax.default_backend() != "cpu" else [0]
    return Timed(step, tick, ", ".join(f"{each:.0f}" for each in seen) if all(seen) else None)


def _launched(session: Session) -> float:
    """Kernels that a tick launches, as JAX's profiler sees them; 0 where it sees none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            session.advance(TIMED_TICKS)
        profiles = map(jax.profiler.ProfileData.from_file, map(str, Path(folder).rglob("*.xplane.pb")))
        return sum(map(_kernels, profiles)) / TIMED_TICKS


def _kernels(profile: Any) -> int:
    """Those in a jax.profiler.ProfileData: GPUs have a line for each stream, TPUs one for all operations."""
    lines = [line for plane in profile.planes if plane.name.startswith("/device:") for line in plane.lines]
    return sum(len(list(line.events)) for line in lines if line.name.startswith("Stream") or line.name == "XLA Ops")


def _reading(lm: LanguageModel, milliseconds: float) -> str:
    """How fast a step that takes so long reads the weights; of devices that are known, as a share of their peak."""
    sizes = weight_bytes(lm.config, lm.dtype, lm.packing)
    rate = (sum(sizes.values()) - (0 if lm.config.tied else sizes["embed"])) / milliseconds * 1e3
    device = published(jax.devices()[0].device_kind)
    if device is None:
        return f"{rate / 1e9:,.1f} GB/s"
    peak = f"{rate / device.bandwidth:.0%} of {device.name}'s {device.bandwidth / 1e9:,.0f}"
    return f"{rate / 1e9:,.1f} GB/s, {peak}"


def _head_time(lm: LanguageModel, rows: int) -> float:
    """Median milliseconds of the final norm and unembedding over `rows` rows."""
    head = jax.jit(lambda weights, x: jnp.argmax(merge_model(lm.config, Unrolled(), weights).logits(x), axis=-1))
    x = jnp.ones((rows, lm.config.width), lm.dtype)
    jax.block_until_ready(head(lm.weights, x))
    found = []
    for _ in range(3 * REPETITIONS):
        begin = time.perf_counter()
        jax.block_until_ready(head(lm.weights, x))
        found.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(found))


def _report(lm: LanguageModel, plan: Plan, findings: list[Finding], measured: dict[str, Any], before: float) -> Report:
    devices = jax.devices()
    versions = {name: _version(name) for name in ("dex-jax", "jax", "jaxlib", "flax", "numpy")}
    facts = {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "model": f"{Path(lm.source).name}, {lm.config.num_layers} layers, {lm.parameter_bytes / 1e9:.3f} GB",
        "dtype": str(lm.dtype),
        "plan": f"DEX-1/{plan.stages}, exits at {', '.join(map(str, plan.depths))}, {plan.rows} rows",
        **measured,
        "compile (s)": round(compile_seconds() - before, 1),
    }
    return Report(facts, findings)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _peak_memory() -> float | None:
    """Peak GB of the device, or of this process where the device does not say; None when neither is known."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return round(stats["peak_bytes_in_use"] / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3)
