"""A comparison of DEX and its rivals on the same prompts and exits: it counts layers run one after the other, no times.

    python -m benchmarks.methods_table --data gsm8k/train.jsonl HumanEval.jsonl.gz question_240.jsonl

The settings of LayerSkip and AdaDecode are chosen on every fifth prompt; the others are reported. Every answer is
compared with AR's tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import dex_jax
from benchmarks.measuring import Figures, arguments, machine, read_ids
from dex_jax.decoding.check import compare_tokens
from dex_jax.decoding.plan import Method, find_exits
from dex_jax.errors import DexError
from dex_jax.interrupts import exit_code
from dex_jax.tables import markdown
from studies.rivals import DEL, AdaDecode, LayerSkip, layer_steps

SHARES, LENGTHS, THRESHOLDS = (0.1, 0.2, 0.3), (1, 2, 4), (0.2, 0.4, 0.6)
"""LayerSkip's exits (of the layers, moved to where exits stand) and draft lengths, AdaDecode's thresholds."""

TUNING = 5
"""One of so many prompts is for choosing settings."""

Runs = Mapping[str, dict[str, Any]]
"""The figures by prompt: numbers of tokens and of layers, and whether the tokens are AR's."""


class Way(NamedTuple):
    """A method with one setting."""

    name: str  # in the table
    setting: str  # in words; "" for the only one
    method: Method
    together: int  # sequences at a time


def ways(depths: Sequence[int], layers: int, explorers: int, batch: int) -> list[Way]:
    """Return AR, DEX of several kinds, and all settings of the rivals, for exits at `depths` below `layers`."""

    def dex(k: int, **options: Any) -> Method:
        return dex_jax.Dex(explorers=k, draft=False, **options)

    found = [Way("AR", "", dex_jax.AR(), batch), Way(f"DEX, K = {explorers}", "", dex(explorers), batch)]
    near = sorted({min(depths, key=lambda depth: (abs(depth - share * layers), depth)) for share in SHARES})
    for depth in near:
        for length in LENGTHS:
            found.append(Way("LayerSkip", f"{length} drafted at {depth}", LayerSkip(depth, length), batch))
    # A token that is sure only at a deep exit costs nearly all layers, so fewer exits can be better.
    for name, grid in (("of DEX", None), ("at " + ", ".join(map(str, near[:2])), (*near[:2], layers))):
        for share in THRESHOLDS:
            method = AdaDecode(explorers if grid is None else None, grid, share)
            found.append(Way("AdaDecode", f"exits {name}, sure by {share}", method, batch))
    # Each time that one of its sequences is verified, all exits look at the whole batch.
    found.append(Way("DEL", "", DEL(depths=(*depths, layers)), 1))
    found.append(Way(f"DEX, K = {explorers}, without DECS", "", dex(explorers, decs=False), batch))
    others = [k for k in (2, 3, 6) if k != explorers and k <= layers]
    return [*found, *(Way(f"DEX, K = {k}", "", dex(k), batch) for k in others)]


def answers(lm: Any, args: Any, way: Way, prompts: Mapping[str, list[int]], plain: Runs, figures: Figures) -> Runs:
    """Run a way on prompts, those of similar length together, and compare it with `plain`, AR's runs, unless empty."""

    def measure(some: list[str]) -> Runs:
        # Repeats fill the batch: another size would be compiled anew.
        ids = [prompts[prompt] for prompt in [*some, *[some[-1]] * (way.together - len(some))]]
        out = dex_jax.generate(lm, ids, method=way.method, exits=args.exits, max_new_tokens=args.max_new_tokens)
        found: dict[str, dict[str, Any]] = {}
        for row, prompt in enumerate(some):
            tokens = out.tokens[row, : out.lengths[row]].tolist()
            about = {"tokens": len(tokens), "layers": int(layer_steps(out.stats)[row])}
            if plain:
                same = compare_tokens(lm, ids[row], tokens, plain[prompt]["text"]).is_tie(str(lm.dtype))
            found[prompt] = about | ({"same": same} if plain else {"text": tokens})
        return found

    order = sorted(prompts, key=lambda prompt: len(prompts[prompt]))
    batches = [order[at : at + way.together] for at in range(0, len(order), way.together)]
    made = figures.each({f"{way.name}; {way.setting}; {some[0]}": some for some in batches}, measure)
    return {prompt: run for runs in made.values() for prompt, run in runs.items()}


def costs(runs: Runs, prompts: Sequence[str]) -> np.ndarray:
    """Return the layers a token of each prompt; NaN for an answer of one token, which has no decoding."""
    found = [(runs[prompt]["layers"], runs[prompt]["tokens"] - 1) for prompt in prompts]
    return np.array([layers / more if more else np.nan for layers, more in found])


def interval(ratios: np.ndarray) -> str:
    """Format the median over prompts, and the 95% interval of the medians of resampled prompts."""
    ratios = ratios[~np.isnan(ratios)]
    drawn = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{np.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def table(plain: Runs, found: Mapping[str, Runs]) -> str:
    """Format a line for each way: AR's layers over its own by the file of the prompt, and the first way over it."""
    prompts = sorted(next(iter(found.values())))
    kinds = {
        kind: [p for p in prompts if p.split(" ")[0] == kind] for kind in sorted({p.split(" ")[0] for p in prompts})
    }
    first, lines = next(iter(found)), []
    for name, runs in found.items():
        cells = [interval(costs(plain, some) / costs(runs, some)) for some in (*kinds.values(), prompts)]
        over = "" if name == first else interval(costs(runs, prompts) / costs(found[first], prompts))
        lines.append([name, *cells, over])
    return markdown(["AR's layers over its own", *kinds, "all", f"{first} over it"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code, 1 where tokens are not AR's."""
    parser = arguments(__doc__ or "", data=None, prompts=25, max_new_tokens=64, exits="default")
    parser.add_argument("--explorers", type=int, default=5, metavar="K", help="of DEX and AdaDecode (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="sequences at a time (%(default)s)")
    parser.add_argument("--longest", type=int, default=1024, metavar="N", help="tokens of a prompt (%(default)s)")
    return exit_code(lambda: run(parser.parse_args(argv)), "Stopped. The same command goes on from here.")


def run(args: Any) -> int:
    """Measure what is missing and write the page; return the exit code."""
    lm = dex_jax.load(args.model)
    layers, trained = lm.config.num_layers, find_exits(args.exits, lm.fingerprint).exits
    depths = list(range(1, layers)) if trained is None else [depth for depth in trained.config.depths if depth > 0]
    prompts = {name: ids for name, ids in read_ids(lm, args.data, args.prompts).items() if len(ids) <= args.longest}
    tuning = dict(list(prompts.items())[::TUNING])
    reported = {name: ids for name, ids in prompts.items() if name not in tuning}
    if not reported:
        raise DexError(f"{len(prompts)} prompts are too few to choose settings on one and report others: give more")
    about = machine(args, dtype=str(lm.dtype), weights=lm.weights_kind)
    figures = Figures(args.output, about)
    plain: Runs = {}
    found: dict[str, Runs] = {}
    groups: dict[str, list[Way]] = {}
    for way in ways(depths, layers, args.explorers, args.batch):
        groups.setdefault(way.name, []).append(way)
    for name, settings in groups.items():
        if name == "AR":
            plain = answers(lm, args, settings[0], prompts, plain, figures)
            continue
        chosen = settings[0]
        if len(settings) > 1:
            tried = [answers(lm, args, way, tuning, plain, figures) for way in settings]
            chosen = settings[int(np.argmin([np.nanmean(costs(runs, list(tuning))) for runs in tried]))]
        words = f"{name} ({chosen.setting}, the best of {len(settings)})" if len(settings) > 1 else name
        found[words] = answers(lm, args, chosen, reported, plain, figures)
    same = [run["same"] for runs in figures.runs.values() for run in runs.values() if "same" in run]
    figures.publish(
        f"{len(reported)} prompts; {sum(same)} of {len(same)} answers have AR's tokens. Medians over prompts, 95% "
        f"intervals by resampling them; settings were chosen on {len(tuning)} other prompts. Layers that run one after "
        "the other are counts, not timings.",
        table(plain, found),
    )
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
