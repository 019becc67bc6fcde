"""What exits cost inside a tick: the same lattice states stepped with the exits and with free ones.

    python benchmarks/exits_cost.py --exits default --explorers 5 --output results/exits_cost

For every tick of a real decoding the step is timed, in turn, as it is, with exits that cost next to nothing (what they
propose is thrown away: the next state is the real one), and with exits of kind "shared" over the full vocabulary. So
all see the same live nodes. The final exit is in all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dex_jax
from dex_jax.decoding import loop
from dex_jax.decoding.exits import resolve_method
from dex_jax.decoding.interface import Exits
from dex_jax.decoding.network import shared_exits
from dex_jax.decoding.session import Session, network_of
from dex_jax.language_model import merge_model

LEAD = (
    "# What exits cost\n\n"
    "The time that exits take of ticks: `python benchmarks/exits_cost.py --new-tokens 8 --repeats 3 --output "
    "results/exits_cost`. Ticks that commit take longer than the median, with and without exits, so the shares of all "
    "ticks together are less than the medians would say.\n\n"
)

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "A train leaves at 9:40 and arrives at 11:05. How long is the journey?",
)
FREE_COLUMNS = 8


def free_exits(vocab_size: int) -> Exits:
    """Exits without weights: a few columns, read off the hidden state."""
    ids = jnp.arange(FREE_COLUMNS, dtype=jnp.int32)
    columns = jnp.minimum(jnp.arange(vocab_size, dtype=jnp.int32), FREE_COLUMNS)
    return Exits(
        features=lambda memory, hidden, view: hidden[:-1, ..., :FREE_COLUMNS],
        logits=lambda features: features.astype(jnp.float32),
        vocabulary=ids,
        columns=columns,
    )


def stepper(session: Session, kind: str):
    """A jitted step of the session's loop with the exits of one kind."""

    @jax.jit
    def step(weights, heads, state):
        model = merge_model(session.spec.config, session.spec.layout, weights)
        network = network_of(model, heads, session.spec)
        if kind == "free":
            network = network._replace(exits=free_exits(session.spec.config.vocab_size))
        if kind == "shared":
            network = network._replace(exits=shared_exits(model))
        return loop.step(network, state, session.limits, decs=session.spec.schedule.decs)

    return step


def measure(lm, exits: str, explorers: int, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every tick with each kind of exits, the median of `repeats`."""
    found: dict[str, list[float]] = {"trained": [], "free": [], "shared": []}
    resolved = resolve_method(dex_jax.Dex(explorers=explorers), exits, lm.config, lm.fingerprint)
    for prompt in PROMPTS:
        session = Session(lm, [lm.encode(prompt)], resolved.schedule, new_tokens, None, resolved.trained)
        session.prefill()
        steps = {kind: stepper(session, kind) for kind in found}
        state = session.state
        for step in steps.values():
            jax.block_until_ready(step(lm.weights, session.heads, state))
        while not bool(state.record.done.all()):
            for kind, step in steps.items():
                times = []
                for _ in range(repeats):
                    begin = time.perf_counter()
                    jax.block_until_ready(step(lm.weights, session.heads, state))
                    times.append(time.perf_counter() - begin)
                found[kind].append(float(np.median(times)))
            state = steps["trained"](lm.weights, session.heads, state)
    return found


def report(found: dict[str, list[float]], lm, exits: str, explorers: int) -> tuple[str, dict]:
    """(Markdown, JSON) of the times."""
    trained, free, shared = (np.array(found[kind]) * 1e3 for kind in ("trained", "free", "shared"))
    device = jax.devices()[0]
    share = float(1 - free.sum() / trained.sum())
    figures = {
        "device": f"{device.platform}:{device.device_kind}",
        "dtype": str(lm.dtype),
        "jax": jax.__version__,
        "exits": exits,
        "explorers": explorers,
        "ticks": len(trained),
        "tick_ms": {kind: float(np.median(values)) for kind, values in (("trained", trained), ("free", free))},
        "share_of_tick": share,
        "share_of_tick_shared": float(1 - free.sum() / shared.sum()),
    }
    text = (
        f"K = {explorers}, exits {exits}, batch 1, {len(trained)} ticks; {figures['device']}, {lm.dtype}, jax "
        f"{jax.__version__}.\n\n| what | |\n|---|---|\n"
        f"| median tick | {np.median(trained):.2f} ms |\n"
        f"| the same with exits that cost nothing | {np.median(free):.2f} ms |\n"
        f"| exits' share of all ticks | {share:.1%} |\n"
        f'| the same for exits="shared" (full vocabulary) | {figures["share_of_tick_shared"]:.1%} |\n'
    )
    return text, figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--explorers", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", help="writes OUTPUT.md and OUTPUT.json")
    args = parser.parse_args()
    lm = dex_jax.load(args.model)
    found = measure(lm, args.exits, args.explorers, args.new_tokens, args.repeats)
    text, figures = report(found, lm, args.exits, args.explorers)
    print(text)
    if args.output:
        Path(args.output + ".md").write_text(LEAD + text, encoding="utf-8")
        Path(args.output + ".json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
