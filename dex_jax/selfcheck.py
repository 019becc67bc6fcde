"""`python -m dex_jax.selfcheck`: checks that depth exploration holds on this device, and its speed here.

Prints one block to paste into a report. Exit code 0 when every check holds, 1 when one fails, 2 for bad input.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dex_jax.cli.common import add_model
from dex_jax.interrupts import exit_code
from dex_jax.progress import notify, phases

if TYPE_CHECKING:
    from dex_jax.decoding.output import Output
    from dex_jax.language_model import LanguageModel

PROMPT, IDS = "Why do cats purr?", [7, 14, 21, 28]
"""The prompt that is continued, and token ids in its place where a model has no tokenizer."""

NEW_TOKENS = 32
CANARY_ROWS = 32_769
"""The least number of float32 rows at which jax 0.10.2 goes wrong."""


class Finding(NamedTuple):
    """The result of one check: its name, whether it holds, and the particulars."""

    name: str
    holds: bool
    detail: str


def selfcheck(lm: LanguageModel) -> tuple[dict[str, str], list[Finding]]:
    """Check a model with the exits that a user gets: (facts about the machine and its speed, the findings).

    Several explorers and one, greedy and sampled, have to give AR's tokens and to count their ticks right. JAX also has
    to compute rightly what some version of it has miscompiled.
    """
    from dex_jax.decoding.generate import generate
    from dex_jax.decoding.plan import DEFAULT_EXPLORERS
    from dex_jax.decoding.request import AR, Dex

    prompt = IDS if lm.tokenizer is None else lm.encode(PROMPT)
    new_tokens = min(NEW_TOKENS, lm.config.context - len(prompt))
    methods = {f"K = {k}": Dex(explorers=k) for k in {1, min(DEFAULT_EXPLORERS, lm.config.num_layers)}}
    facts, findings = _facts(lm), [canaries()]

    def decode(what: str, method: AR | Dex, temperature: float) -> Output:
        notify(f"decoding ({what})")
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature}
        out = generate(lm, [prompt], method=method, **options)
        if not temperature:
            seconds = generate(lm, [prompt], method=method, **options).stats.decode_seconds  # what is new takes longer
            speed, tick = (int(out.lengths[0]) - 1) / seconds, 1e3 * seconds / max(1, _ticks(out))
            facts[what] = f"{speed:.1f} tokens a second, {tick:.2f} ms a tick"
        return out

    for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        plain = decode("AR", AR(), temperature)
        for what, method in methods.items():
            out = decode(what, method, temperature)
            named = f"{what}, {how}"
            findings += [same_tokens(lm, named, out, plain, temperature), counted_ticks(named, out)]
    return facts, findings


def canaries() -> Finding:
    """Check that this device computes rightly what some version of JAX has silently compiled to wrong results."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    # A vmapped product of matrix and row, squared and summed: jax issue 39103. The identity leaves the row as it is, so
    # nothing is rounded but the square.
    count = np.arange(CANARY_ROWS, dtype=np.float32)
    rows, matrix = jnp.zeros((CANARY_ROWS, 3)).at[:, 0].set(count), jnp.eye(3)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    # arctan of 50 and more numbers, which not every CPU gets wrong: jax issue 39352.
    several = [np.linspace(-8, 8, size, dtype=np.float32) for size in (50, 64, 200)]
    right = {
        "39103": np.array_equal(found, count**2),
        "39352": all(np.allclose(jnp.arctan(x), np.arctan(x), atol=1e-3) for x in several),
    }
    wrong = [issue for issue, holds in right.items() if not holds]
    detail = f"wrong results, see jax issue {', '.join(wrong)}" if wrong else f"jax issues {', '.join(right)}"
    return Finding("what some version of jax has miscompiled is right here", not wrong, detail)


def same_tokens(lm: LanguageModel, what: str, out: Output, plain: Output, temperature: float) -> Finding:
    """Check that an output has AR's tokens, up to a divergence by rounding."""
    from dex_jax.decoding.check import compare

    (check,) = compare(lm, out, plain, temperature)
    holds, detail = check.is_tie(str(lm.dtype)), f"{plain.lengths[0]} tokens"
    if not check.identical:
        margin = f"{check.top2_margin:.1e}, {'rounding' if holds else 'too wide to be rounding'}"
        detail = f"they part at token {check.first_divergence}, where the top-2 margin is {margin}"
    return Finding(f"the tokens are AR's, {what}", holds, detail)


def counted_ticks(what: str, out: Output) -> Finding:
    """Check that the number of ticks is the one that the exits of the tokens tell."""
    from dex_jax.decoding.record import ticks_of

    ticks, told = _ticks(out), ticks_of(out.stats.exits[0], int(out.lengths[0]), out.stats.plan.stages)
    return Finding(f"ticks are K + sum(exits[1:n-1]), {what}", ticks == told, f"{ticks} and {told}")


def _ticks(out: Output) -> int:
    return 0 if out.stats.ticks is None else int(out.stats.ticks[0])


def report(facts: dict[str, str], findings: list[Finding]) -> str:
    """Return the block to paste."""
    lines = [f"{label}: {value}" for label, value in facts.items()]
    lines += [f"{'ok  ' if holds else 'FAIL'} {name}: {detail}" for name, holds, detail in findings]
    end = "all checks hold" if all(finding.holds for finding in findings) else "FAILED"
    return "\n".join(["-------- dex_jax selfcheck --------", *lines, end])


def _facts(lm: LanguageModel) -> dict[str, str]:
    import jax

    devices, model = jax.devices(), f"{Path(lm.source).name}, {lm.config.num_layers} layers"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("dex-jax", "jax", "jaxlib", "flax", "numpy"))
    return {
        "versions": ", ".join(versions),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "model": f"{model}, {lm.parameter_bytes / 1e9:.3f} GB in {lm.weights_kind}, {lm.dtype}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code: 1 where a check fails, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m dex_jax.selfcheck",
        description="Checks depth exploration decoding on this device and times it; takes about two minutes.",
    )
    add_model(parser.add_argument)
    args = parser.parse_args(arguments)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    with phases():
        notify("importing JAX")
        from dex_jax.language_model import load

        facts, findings = selfcheck(load(args.model, args.dtype, weights=args.weights))
    print(report(facts, findings))
    return 0 if all(finding.holds for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
