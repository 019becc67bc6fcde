"""One run of one method on one prompt: what results.jsonl keeps a line of.

Three kinds of figures are never mixed: depth-side ones (`layer_steps`, `ticks`), work (`work`) and wall-clock
(`seconds`). A line of kind "depth" has counts and no seconds: it may come from a batch, from teacher forcing or from a
busy machine. A line of kind "wall" was run alone, one sequence at a time; its counts are there to explain its seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable
from typing import Any, Literal

from dex_jax.decoding.output import Output
from dex_jax.errors import DexError
from dex_jax.evaluation.check import Check
from dex_jax.io.whole_files import plain

Kind = Literal["depth", "wall"]

COSTS = {"depth": "layer_steps", "work": "work", "wall": "seconds"}
"""Kind of figure -> the field that holds it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one method on one prompt.

    Attributes:
      kind: "depth" or "wall".
      method: as on the command line: "ar", "dex", "dex_one_explorer", "layerskip", "adadecode", "del", "oracle", ...
      task: name of the task.
      prompt_id: of the item within the task, the same in every template.
      model: as `dex_jax.load` was given it.
      tokens: ids of the new tokens, an ending EOS included. The only thing that tokens are ever counted from.
      prompt_tokens: length of the prompt.
      setting: fields of the method that are not its defaults, {"exit": 12, "draft_length": 4}.
      exits: as of Stats.exits, -1 for token 0; None where the method has none (AR).
      exits_source: "shared", "default", a path; None where nothing drafts.
      depths: exit depths x_1 .. x_K = L.
      rows: rows a stage, or of a chain.
      template: name of the prompt template; "default" where there is only one.
      split: "report", or "tune" for prompts on which settings are chosen and nothing is reported.
      counted: "loop", or "forced" where exits and ticks were teacher-forced instead of run.
      round: number of the repetition, from 0; even rounds run the methods in their order, odd ones backwards.
      batch: how many sequences ran together.
      layer_steps: layers run one after the other since the prefill, as of Stats; of "oracle", a bound.
      ticks: loop steps of stages side by side; None for other methods.
      rounds: verifications on chains; None for other methods.
      drafted, accepted: tokens that exits drafted on chains, and those that were kept; None otherwise.
      work: layer x row evaluations since the prefill, see `work_of`; None where they are not counted.
      seconds: wall-clock of decoding, prefill and compilation apart; None in kind "depth".
      prefill_seconds, compile_seconds: apart from it and from one another; None in kind "depth".
      match: whether the tokens are AR's on the same prompt; None before anything was compared.
      first_divergence: index of the first new token that is not AR's; None for none.
      margin: AR's top-2 margin there over max |logit|, after noise; None for none.
      tie: whether rounding alone may decide there, by `check.CLOSE` of the dtype; None for none.
      repeated: share of the answer's 4-grams of tokens that occurred before in it; None below 4 tokens.
      parsed, correct: whether an answer could be read from the text, and was right; None where nothing is graded.
      chance: how often guessing is right; None where nothing is graded.
      temperature, seed: of sampling; 0.0 and None for greedy.
      max_new_tokens: the limit.
      device, dtype: where and in what it ran.
      versions: of dex_jax, jax, flax and python.
    """

    kind: Kind
    method: str
    task: str
    prompt_id: str
    model: str
    tokens: list[int]
    prompt_tokens: int
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    exits: list[int] | None = None
    exits_source: str | None = None
    depths: list[int] | None = None
    rows: int | None = None
    template: str = "default"
    split: Literal["report", "tune"] = "report"
    counted: Literal["loop", "forced"] = "loop"
    round: int = 0
    batch: int = 1
    layer_steps: int | None = None
    ticks: int | None = None
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    work: int | None = None
    seconds: float | None = None
    prefill_seconds: float | None = None
    compile_seconds: float | None = None
    match: bool | None = None
    first_divergence: int | None = None
    margin: float | None = None
    tie: bool | None = None
    repeated: float | None = None
    parsed: bool | None = None
    correct: bool | None = None
    chance: float | None = None
    temperature: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 0
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind == "depth" and self.seconds is not None:
            raise DexError('a run of kind "depth" has no seconds: they belong to kind "wall"')

    @property
    def new_tokens(self) -> int:
        """n."""
        return len(self.tokens)

    @property
    def name(self) -> str:
        """As `name_of` has it."""
        return name_of(self.method, self.setting)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells a run from all others of its study; a run whose key is there needs not be made again."""
        flat = json.dumps(plain(self.setting), sort_keys=True)
        return tuple(flat if name == "setting" else getattr(self, name) for name in KEY)

    def cost(self, kind: str) -> float | None:
        """The figure of a kind: "depth", "work" or "wall"; None where the run has none of that kind."""
        if kind == "wall" and self.kind != "wall":
            return None
        value = getattr(self, COSTS[kind])
        return None if value is None else float(value)


KEY = ("kind", "split", "task", "template", "prompt_id", "method", "setting", "counted", "round", "dtype", "seed")


def name_of(method: str, setting: dict[str, Any]) -> str:
    """Method and setting in words: "layerskip exit=12 draft_length=4"."""
    return " ".join([method, *(f"{name}={value}" for name, value in sorted(setting.items()))])


def run_key(**fields: Any) -> tuple[Any, ...]:
    """The key of a run that is still to be made; see `Run.key`."""
    stub: dict[str, Any] = {"model": "", "tokens": [], "prompt_tokens": 0}
    return Run(**(stub | fields)).key


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    found = {name: importlib.metadata.version(name) for name in ("dex-jax", "jax", "flax")}
    return found | {"python": platform.python_version()}


def run_of(output: Output, row: int, *, kind: Kind, **given: Any) -> Run:
    """The line of sequence `row` of an Output, of kind "depth", which keeps counts alone, or "wall".

    `given` are the other fields of Run that an Output does not know: method, task, prompt_id, model, setting, ...

    Raises:
      DexError: kind "wall" of a batch.
    """
    stats, length, batch = output.stats, int(output.lengths[row]), len(output.lengths)
    if kind == "wall" and batch > 1:
        raise DexError(f"seconds of {batch} sequences at once are nobody's: time them one at a time")

    def at(name: str) -> int | None:
        figures = getattr(stats, name)
        return None if figures is None else int(figures[row])

    tokens = output.tokens[row, :length].tolist()
    times = {}
    if kind == "wall":
        times = {
            "seconds": stats.decode_seconds,
            "prefill_seconds": stats.prefill_seconds,
            "compile_seconds": stats.compile_seconds,
        }
    counts = {name: at(name) for name in ("layer_steps", "ticks", "rounds", "drafted", "accepted")}
    schedule = stats.schedule
    fields: dict[str, Any] = {
        "tokens": tokens,
        "prompt_tokens": len(output.prompt_tokens[row]),
        "exits": None if schedule.method == "ar" else stats.exits[row, :length].tolist(),
        "exits_source": stats.exits_source,
        "depths": list(schedule.depths),
        "rows": schedule.rows,
        "batch": batch,
        **counts,
        "work": work_of(schedule, length, counts),
        **times,
        "repeated": repeated(tokens),
        "seed": None if output.seeds is None else output.seeds[row],
        "device": stats.device,
        "dtype": stats.dtype,
        "versions": versions(),
    }
    return Run(kind=kind, **(fields | given))


def compared(run: Run, check: Check) -> Run:
    """A run with what the comparison of its tokens with AR's has shown."""
    margin = check.top2_margin
    # A margin between two -inf is none.
    margin = float(margin) if margin is not None and math.isfinite(margin) else None
    tie = None if check.identical else check.is_tie(run.dtype)
    return dataclasses.replace(
        run, match=check.identical, first_divergence=check.first_divergence, margin=margin, tie=tie
    )


def work_of(schedule: Any, length: int, counts: dict[str, int | None]) -> int | None:
    """Layer x row evaluations of a sequence since its prefill, rows that only fill up a shape apart.

    AR runs L layers for each of n - 1 tokens. On a chain every row of a round runs every layer once: L (drafted +
    rounds). In DEX every stage has W rows at every tick, live or not, as explorers run whether they have something to
    run or not: W L a tick, an upper end where ticks choose how many. None for the oracle, which is no decoder.
    """
    last, rounds = schedule.depths[-1], counts.get("rounds")
    if schedule.method == "oracle":
        return None
    if schedule.method == "ar":
        return last * (length - 1)
    if schedule.policy is not None:
        return last * ((counts.get("drafted") or 0) + (rounds or 0))
    return last * schedule.rows * (counts.get("ticks") or 0)


def repeated(tokens: list[int], length: int = 4) -> float | None:
    """Share of `length`-grams that occurred earlier in the same list; None if it has no such gram.

    Examples:
      >>> repeated([1, 2, 1, 2, 1, 2, 1])
      0.5
    """
    grams = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def reported(runs: Iterable[Run], kind: str) -> list[Run]:
    """Runs that figures of a kind ("depth", "work" or "wall") are made of: split "report", with such a cost."""
    wanted = "wall" if kind == "wall" else "depth"
    return [run for run in runs if run.split == "report" and run.kind == wanted and run.cost(kind) is not None]
