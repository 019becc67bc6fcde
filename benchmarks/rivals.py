"""DEX's rivals at their best, in layer steps: a sweep of LayerSkip's (d, g), and whether DEL keeps up with the best.

    python benchmarks/rivals.py --data HumanEval.jsonl.gz --data question_240.jsonl --prompts 8 --output docs/rivals

Layer steps are layers run one after the other after the prefill: counts, not times, so other load does not disturb
them. Prompts take turns: the settings of LayerSkip and AdaDecode are chosen on every second one, and all figures are of
the others. A line of OUTPUT.jsonl is kept for every setting as it is done; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import dex_jax
from dex_jax import AR, DEL, AdaDecode, Dex, DexSingleExit, LayerSkip, Oracle
from dex_jax.cli.arguments import depths
from dex_jax.errors import DexError
from dex_jax.training.prompt_files import read_prompts


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Name -> method; the sweeps last."""
    found: dict[str, Any] = {
        "AR": AR(),
        "oracle": Oracle(),
        f"DEX-1/{args.explorers}": Dex(explorers=args.explorers),
        f"DEX-1/{args.explorers}, first and last exit": DexSingleExit(explorers=args.explorers),
        "DEL": DEL(),
        "DEL, no confidence rule": DEL(confidence=False),
    }
    for threshold in args.thresholds:
        found[f"AdaDecode {threshold:g}"] = AdaDecode(explorers=args.explorers, threshold=threshold)
    for depth in args.exit_depths:
        for length in args.draft_lengths:
            found[f"LayerSkip {depth}, {length}"] = LayerSkip(exit=depth, draft_length=length)
    return found


def run(lm, prompts: list[list[int]], method: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Counts of every prompt, in the order of the prompts, and a digest of its tokens."""
    counts: dict[str, Any] = {"digest": [], "lengths": [], "layer_steps": [], "drafted": [], "accepted": []}
    for start in range(0, len(prompts), args.batch):
        exits = "shared" if isinstance(method, AR) else args.exits
        options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "exits": exits}
        out = dex_jax.generate(lm, prompts[start : start + args.batch], method=method, **options)
        for row, length in zip(out.tokens, out.lengths, strict=True):
            counts["digest"].append(hashlib.sha256(row[:length].tobytes()).hexdigest()[:16])
        counts["lengths"] += out.lengths.tolist()
        for name in ("layer_steps", "drafted", "accepted"):
            figures = getattr(out.stats, name)
            counts[name] += [None] * len(out.texts) if figures is None else figures.tolist()
        counts["exits"] = out.stats.exits_source
    return counts


def a_token(counts: dict[str, Any], chosen: slice) -> float:
    """Layer steps a token over the prompts of `chosen`."""
    tokens = sum(length - 1 for length in counts["lengths"][chosen])
    return sum(counts["layer_steps"][chosen]) / tokens if tokens else float("nan")


def best(runs: dict[str, Any], family: str, chosen: slice) -> str:
    """The setting of a family with least layer steps a token."""
    return min((name for name in runs if name.startswith(family)), key=lambda name: a_token(runs[name], chosen))


def table(runs: dict[str, Any], num_layers: int) -> str:
    """Markdown: every method, the static ones at the setting chosen on other prompts, then the sweep."""
    choosing, reporting = slice(0, None, 2), slice(1, None, 2)
    rows = [name for name in runs if not name.startswith(("LayerSkip", "AdaDecode"))]
    rows += [best(runs, family, choosing) for family in ("AdaDecode", "LayerSkip")]
    plain = runs["AR"]["digest"]
    lines = [
        "| method | layer steps a token | AR's over it | accepted drafts | tokens are AR's |",
        "|---|---|---|---|---|",
    ]
    for name in rows:
        counts, steps = runs[name], a_token(runs[name], reporting)
        drafted = sum(each or 0 for each in counts["drafted"][reporting])
        share = f"{sum(each or 0 for each in counts['accepted'][reporting]) / drafted:.2f}" if drafted else ""
        same = sum(a == b for a, b in zip(counts["digest"], plain, strict=True))
        label = f"{name} (a bound, no decoder)" if name == "oracle" else name
        lines.append(f"| {label} | {steps:.2f} | {num_layers / steps:.2f} | {share} | {same} of {len(plain)} |")
    lines.append("")
    for chosen, where in ((choosing, "the other prompts"), (reporting, "these very prompts")):
        name = best(runs, "LayerSkip", chosen)
        for rival in ("DEL", "DEL, no confidence rule"):
            ratio = a_token(runs[name], reporting) / a_token(runs[rival], reporting)
            lines.append(f"{rival} over {name}, the best static setting on {where}: {ratio:.3f}")
    lines += ["", "| LayerSkip: exit depth, draft length | layer steps a token | accepted drafts |", "|---|---|---|"]
    for name, counts in runs.items():
        if name.startswith("LayerSkip"):
            share = sum(counts["accepted"][reporting]) / max(1, sum(counts["drafted"][reporting]))
            lines.append(f"| {name.removeprefix('LayerSkip ')} | {a_token(counts, reporting):.2f} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def kept(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Runs of an earlier call, if it was the same in all but the settings.

    Raises:
      DexError: the file is of another call.
    """
    if not path.exists():
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")
        return {}
    first, *lines = path.read_text(encoding="utf-8").splitlines() or ["null"]
    if json.loads(first) != about:
        raise DexError(f"{path} holds results for other prompts or options: give another --output, or remove it")
    found = {}
    for line in lines:
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            break  # cut off while it was written
        found[item.pop("setting")] = item
    whole = [first, *(json.dumps({"setting": name, **item}) for name, item in found.items())]
    path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> int:
    numbers, shares = depths, lambda text: tuple(float(part) for part in text.split(","))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default", help="default, shared or a path (%(default)s)")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=8, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--explorers", type=int, default=5, help="of DEX and AdaDecode (%(default)s)")
    parser.add_argument("--exit-depths", type=numbers, default=(3, 6, 9, 12, 18, 24), metavar="D,...")
    parser.add_argument("--draft-lengths", type=numbers, default=(1, 2, 3, 4, 6), metavar="G,...")
    parser.add_argument("--thresholds", type=shares, default=(0.3, 0.5, 0.7, 0.9), metavar="P,...")
    parser.add_argument("--output", required=True, help="OUTPUT.jsonl keeps every prompt, OUTPUT.md the tables")
    args = parser.parse_args(argv)
    try:
        return measured(args)
    except DexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measured(args: argparse.Namespace) -> int:
    """The sweep, and the exit code: 1 if a method's tokens are not AR's."""
    lm = dex_jax.load(args.model)
    prompts = []
    for path in args.data:
        found = read_prompts(path)
        count = min(args.prompts, len(found))
        prompts += [lm.encode(found[at * len(found) // count]) for at in range(count)]
    names = ("model", "exits", "data", "prompts", "max_new_tokens", "temperature")
    about = {name: getattr(args, name) for name in names} | {"data": [Path(path).name for path in args.data]}
    results = Path(args.output + ".jsonl")
    runs, todo = kept(results, about), settings(args)
    missing, begin = [name for name in todo if name not in runs], time.monotonic()
    for number, name in enumerate(missing):
        counts = run(lm, prompts, todo[name], args)
        runs[name] = counts
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"setting": name, **counts}) + "\n")
        left = (time.monotonic() - begin) / (number + 1) * (len(missing) - number - 1) / 60
        steps = a_token(counts, slice(None))
        print(f"{name}: {steps:.2f} layer steps a token; {left:.1f} minutes left", file=sys.stderr, flush=True)
    runs = {name: runs[name] for name in todo}
    text = table(runs, lm.config.num_layers)
    print(text)
    Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if all(each["digest"] == runs["AR"]["digest"] for each in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
