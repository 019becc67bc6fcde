"""What benchmarks/two_processes.py makes of its figures: gains beside what the cost model predicts, and the page."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

WITHIN = 0.15
"""Asked: how far the measured gain may be from a predicted one."""

FEWEST = 6
"""Groups of prompts below which no interval is told."""


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """95% of the medians of samples drawn anew from the prompts."""
    from dex_jax.evaluation.resampling import bootstrap

    found = bootstrap(np.asarray(values), resamples=draws)
    return found.low, found.high


def predictions(
    found: dict[str, Any],
    hardware_file: str | None,
    model: str,
    profile_file: str | None,
    alone_file: str | None = None,
) -> list[dict]:
    """A row for each latency and batch: gains measured and predicted; times of a step and a tick with --hardware."""
    rows = []
    keys = sorted({(group["latency"], group["batch"]) for group in found["groups"]})
    for latency, batch in keys:
        mine = [group for group in found["groups"] if (group["latency"], group["batch"]) == (latency, batch)]
        gains = [group["seconds"]["ar"] / group["seconds"]["dex"] for group in mine]
        steps, ticks = (sum(group[name] for group in mine) for name in ("steps", "ticks"))
        going = [
            gain * group["ticks"] / group["steps"] * group["tokens"] / group["ticks_of_all"]
            for gain, group in zip(gains, mine, strict=True)
        ]
        row = {
            "latency": latency,
            "batch": batch,
            "groups": len(mine),
            "gain": statistics.median(gains),
            "interval": interval(gains),
            "worst": min(gains),
            "going": statistics.median(going),
            "going_interval": interval(going),
            "step": sum(group["seconds"]["ar"] for group in mine) / steps,
            "tick": sum(group["seconds"]["dex"] for group in mine) / ticks,
            "ticks_a_step": ticks / steps,
            "by_ticks": steps / ticks / largest_part(model, mine[0]["depths"]),
            "identical": sum(group["identical"] for group in mine),
            "ticks_per_token": sum(group["ticks_of_all"] for group in mine) / sum(group["tokens"] for group in mine),
            "predicted": None,
        }
        if hardware_file is not None:
            link = found["links"][str(latency)]
            files = (hardware_file, alone_file or hardware_file)
            row["predicted"] = predicted(row, mine, link, files, model, profile_file)
            if not latency:
                row["later"] = {
                    added: predicted(
                        row,
                        mine,
                        link | {"permute": link["permute"] + float(added) / 1e3},
                        files,
                        model,
                        profile_file,
                    )
                    for added in found["skipped"]
                }
        rows.append(row)
    return rows


def largest_part(model: str, depths: list[int]) -> float:
    """Of the weights that a step reads, the share of the fuller stage; the last one has the unembedding too."""
    from dex_jax.evaluation.workload import work_of
    from dex_jax.language_model import outline

    work = work_of(outline(model, "float32").config)
    parts = work.layer * np.diff([0, *depths]) + np.array([*[0] * (len(depths) - 1), work.vocabulary * work.width])
    return float(parts.max() / parts.sum())


def predicted(
    row: dict[str, Any],
    groups: list[dict],
    link: dict[str, float],
    files: tuple[str, str],
    model: str,
    profile: str | None,
) -> dict[str, float]:
    """What the cost model says of a step of the pipeline and of a tick, in seconds, and the gain that follows.

    Also of the pipeline that cuts its batch into as many parts as is fastest, which the library does not have.

    Args:
      row: what was measured of a latency and a batch.
      groups: its groups of prompts.
      link: between the two processes.
      files: hardware of a process while both compute, and while the other waits. One stage of the pipeline computes at
        a time; of DEX's ticks with one sequence, those after a miss have no work for the second stage.
      model: its name.
      profile: file whose ticks are taken instead of the measured ones.
    """
    from dex_jax.decoding.exits import resolve_method
    from dex_jax.decoding.methods import Dex
    from dex_jax.decoding.session import capacity_for, prompt_bucket
    from dex_jax.evaluation import cost_model
    from dex_jax.evaluation.ead_profile import read_profile
    from dex_jax.evaluation.hardware import Link, hardware
    from dex_jax.evaluation.workload import exit_work, work_of
    from dex_jax.language_model import outline

    lm = outline(model, "float32")
    exits = groups[0]["exits"]
    depths, rows = tuple(groups[0]["depths"]), groups[0]["rows"]
    trained = resolve_method(Dex(depths=depths), exits, lm.config, lm.fingerprint).trained
    measured = Link("measured", link["permute"], link["bandwidth"])
    both, alone = (
        dataclasses.replace(hardware(file), count=2, hosts=2, link=measured, network=measured) for file in files
    )
    contexts = [prompt_bucket(g["prompt_tokens"]) + capacity_for(g["max_new_tokens"]) for g in groups]
    s = cost_model.Setting(
        work_of(lm.config),
        exit_work(None if trained is None else trained.config, lm.config),
        both,
        batch=row["batch"],
        context=round(statistics.mean(contexts)),
    )
    known = None if profile is None else read_profile(profile).ticks(depths, rows)
    ticks = known or cost_model.Ticks(row["ticks_per_token"])
    other_waits = dataclasses.replace(s, hardware=alone)
    step = cost_model.pipelined_step(other_waits, 2, most_parts=1).total
    share = 1 / ticks.per_token if row["batch"] == 1 else 1.0
    tick = share * cost_model.tick(s, depths, rows, ticks).total
    tick += (1 - share) * cost_model.tick(other_waits, depths, rows, ticks).total
    return {
        "step": step,
        "tick": tick,
        "gain": step / (tick * row["ticks_a_step"]),
        "cut_step": cost_model.pipelined_step(s, 2).total,
        "ticks_per_token": ticks.per_token,
    }


def further(rows: list[dict], path: str) -> None:
    """The configurations without added latency, for `validate_plan --further`."""
    compared = []
    for row in rows:
        if row["latency"] or row["predicted"] is None:
            continue
        batch, guess = row["batch"], row["predicted"]
        for name, key, tokens, expected in (
            ("pipelined AR", "step", 1.0, 1.0),
            ("DEX-1/2", "tick", 1 / row["ticks_per_token"], 1 / guess["ticks_per_token"]),
        ):
            compared.append(
                {
                    "name": f"{name}, batch {batch}, two processes",
                    "predicted_seconds": guess[key],
                    "measured_seconds": row[key],
                    "predicted_speed": batch * expected / guess[key],
                    "measured_speed": batch * tokens / row[key],
                    "batch": batch,
                }
            )
    Path(path).write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")


def not_measured(skipped: dict[str, str], rows: list[dict]) -> list[str]:
    """What is said of latencies that the machine cannot add."""
    from dex_jax.tables import markdown

    if not skipped:
        return []
    reasons = "; ".join(sorted(set(skipped.values())))
    parts = [f"Added latency of {', '.join(skipped)} ms was not measured: this machine does not allow it ({reasons})."]
    guesses = [
        [added, str(row["batch"]), *(f"{guess[key] * 1e3:.1f}" for key in ("step", "tick")), f"{guess['gain']:.2f}"]
        for row in rows
        for added, guess in row.get("later", {}).items()
    ]
    if guesses:
        parts += [
            "The cost model predicts for it:",
            markdown(["ms added", "batch", "step ms", "tick ms", "gain"], guesses),
        ]
    return parts


def verdicts(rows: list[dict]) -> list[str]:
    """What holds of what was asked: a gain above 1, within 15% of what the ticks and the cost model predict."""
    lines = []
    for row in rows:
        guess = row["by_ticks"] if row["predicted"] is None else row["predicted"]["gain"]
        apart = row["gain"] / guess - 1
        what = "ticks alone" if row["predicted"] is None else "the ticks and the cost model"
        met = ["DOES NOT HOLD", "holds"]
        lines.append(
            f"- {row['latency']:g} ms added, batch {row['batch']}: DEX is {row['gain']:.2f} times as fast: "
            f"{met[row['gain'] > 1]}; {apart:+.0%} of what {what} predict: {met[abs(apart) <= WITHIN]}."
        )
    return [f"Asked: a gain above 1, within {WITHIN:.0%} of what is predicted.", "\n".join(lines)]


def going_on(rows: list[dict]) -> list[str]:
    """What batches gain before their first sequence ends."""
    lines = []
    for row in rows:
        if row["batch"] == 1:
            continue
        low, high = row["going_interval"]
        where = f"{row['latency']:g} ms added, batch {row['batch']}"
        few = "" if row["groups"] < FEWEST else f", 95% interval {low:.2f} to {high:.2f}"
        lines.append(f"- {where}: {row['going']:.2f} times as fast (median of {row['groups']} groups{few}).")
    if not lines:
        return []
    return [
        "A batch ends with its slowest sequence, and with DEX some take more ticks than others. While all of its "
        "sequences go on, which is what a server has that fills the places of those that end, a tick gives tokens at "
        "the mean pace:",
        "\n".join(lines),
    ]


def page(found: dict[str, Any], rows: list[dict]) -> str:
    """Markdown."""
    from dex_jax.tables import markdown

    alone, together = found["sharing"]["alone"][0], found["sharing"]["together"]
    shared = [
        [name, f"{alone[key] / 1e9:.1f}", *(f"{each[key] / 1e9:.1f}" for each in together), f"{ratio:.2f}"]
        for name, key in (("GB/s read", "bytes"), ("Gflop/s", "operations"))
        for ratio in [sum(each[key] for each in together) / alone[key]]
    ]
    about = found["about"]
    table, guesses = [], []
    for row in rows:
        low, high = row["interval"]
        guess = row["predicted"]
        where = [f"{row['latency']:g}", str(row["batch"])]
        gain = f"**{row['gain']:.2f}**" + (f" ({low:.2f} - {high:.2f})" if row["groups"] >= FEWEST else "")
        counts = [f"{row['ticks_per_token']:.2f}", f"{row['by_ticks']:.2f}"]
        model = "-" if guess is None else f"{guess['gain']:.2f} ({row['gain'] / guess['gain'] - 1:+.0%})"
        times = [f"{row['step'] * 1e3:.1f}", f"{row['tick'] * 1e3:.1f}"]
        same = f"{row['identical']} of {row['groups']}"
        table.append([*where, str(row["groups"]), gain, f"{row['worst']:.2f}", *counts, model, *times, same])
        if guess is not None:
            guesses.append([*where, *(f"{guess[key] * 1e3:.1f}" for key in ("step", "tick", "cut_step"))])
    header = ["ms added", "batch", "groups", "gain (95%)", "worst", "ticks a token", "ticks predict", "model predicts"]
    parts = [
        "# Two processes: DEX-1/2 against pipelined AR",
        f"Two processes on a core each, float32; {about['model']}'s stages end at depths "
        f"{', '.join(map(str, found['groups'][0]['depths']))}, and the last has the unembedding too; exits "
        f"{found['groups'][0]['exits']}, {about['max_new_tokens']} new tokens, greedy, both methods in turns, median "
        f"of {about['rounds']}; gain: AR's time over DEX's for the same tokens, median of groups of prompts. "
        "Written by `python benchmarks/two_processes.py`.",
        markdown([*header, "step ms", "tick ms", "identical"], table),
        "*Ticks predict*: the gain if a tick took as much of a step as the fuller stage has of the weights, with exits "
        "and messages that cost nothing. *Model predicts*: the cost model for these ticks, with the measured link; in "
        "brackets what was measured beside it.",
        *verdicts(rows),
        *going_on(rows),
        *not_measured(found["skipped"], rows),
        "What two busy cores share, each figure by a process pinned to its core:",
        markdown(["", "alone", "first of two", "second of two", "both over one"], shared),
        "Messages between the two:",
        markdown(
            ["ms added", "permute us", "gather us", "sum us", "GB/s"],
            [
                [
                    latency,
                    *(f"{link[key] * 1e6:.0f}" for key in ("permute", "gather", "sum")),
                    f"{link['bandwidth'] / 1e9:.2f}",
                ]
                for latency, link in found["links"].items()
            ],
        ),
    ]
    if guesses:
        parts += [
            "Predicted milliseconds. A pipeline that cuts its batch in two would keep both processes busy; the "
            "library's does not, and the last column says what that would come to.",
            markdown(["ms added", "batch", "step", "tick", "step, batch cut"], guesses),
        ]
    return "\n\n".join(parts) + "\n"
