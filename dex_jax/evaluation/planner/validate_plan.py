"""`python -m dex_jax.evaluation.planner.validate_plan`: the planner's predictions against what is then measured here.

    python -m dex_jax.evaluation.planner.validate_plan --profile profile.json --hardware cpu.json --data prompts.jsonl

Predicts the time of an AR step or a DEX tick and tokens a second for a list of configurations (both layouts, several K,
rows and batches, AR among them), then measures each of them on prompts, in turns, with the exits that the profile was
measured with. Reports relative errors of times, Kendall's tau of predicted and measured speeds, and how much slower
the planner's choice is than the fastest. What was measured in another way (on a mesh, by two processes) can be added
with --further. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.exits import resolve_method
from dex_jax.decoding.methods import AR, Dex, Method, Schedule
from dex_jax.decoding.session import Session
from dex_jax.errors import DexError, exit_code
from dex_jax.evaluation.planner import cost_model
from dex_jax.evaluation.planner.cost_model import Setting
from dex_jax.evaluation.planner.ead_profile import Profile, read_profile
from dex_jax.evaluation.planner.hardware import Hardware, hardware
from dex_jax.evaluation.planner.workload import exit_work, work_of
from dex_jax.nn.transformer import Stacked, Unrolled

if TYPE_CHECKING:
    from dex_jax.io.exits_file import TrainedExits
    from dex_jax.language_model import LanguageModel

TIME_ERROR, LEAST_TAU, MOST_REGRET = 0.25, 0.8, 0.10
"""What is asked of the planner on a CPU: times within this, a ranking at least so good, a choice at most so bad."""

FOREVER = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration: explorers 0 is AR; rows None is the default."""

    explorers: int
    rows: int | None = None
    batch: int = 1
    layout: str = "unrolled"

    @property
    def name(self) -> str:
        """For people."""
        method = "AR" if not self.explorers else f"DEX-1/{self.explorers}"
        rows = "" if self.rows is None else f", {self.rows} rows"
        return f"{method}{rows}, batch {self.batch}, {self.layout}"

    @property
    def method(self) -> Method:
        """As users name it."""
        return Dex(explorers=self.explorers, rows=self.rows) if self.explorers else AR()


CASES = (
    Case(0),
    Case(0, batch=4),
    Case(0, layout="stacked"),
    Case(2),
    Case(3),
    Case(5),
    Case(5, rows=2),
    Case(5, batch=4),
    Case(5, layout="stacked"),
    Case(6, rows=4),
    Case(10),
    Case(10, rows=2),
)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One configuration, predicted and measured.

    Attributes:
      name: of the configuration.
      predicted_seconds, measured_seconds: of a step or tick.
      predicted_speed, measured_speed: tokens a second of all sequences together.
      batch: B.
    """

    name: str
    predicted_seconds: float
    measured_seconds: float
    predicted_speed: float
    measured_speed: float
    batch: int = 1

    @property
    def error(self) -> float:
        """Of the time, relative to what was measured."""
        return self.predicted_seconds / self.measured_seconds - 1


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all configurations come to.

    Attributes:
      rows: the configurations.
      tau: Kendall's, between predicted and measured speeds.
      tau_alike: the lowest among configurations of one batch: a larger one is faster whatever else it does.
      regret: how much slower the one that is predicted to be fastest of its batch is than the fastest, at worst.
    """

    rows: tuple[Compared, ...]
    tau: float
    tau_alike: float
    regret: float

    @property
    def largest_error(self) -> float:
        """Of a time."""
        return max(abs(row.error) for row in self.rows)

    @property
    def holds(self) -> bool:
        """Whether all that is asked holds."""
        return self.largest_error <= TIME_ERROR and self.tau >= LEAST_TAU and self.regret <= MOST_REGRET


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b: agreeing minus disagreeing pairs, over what they could be without ties; NaN if all tie."""
    from scipy import stats

    return float(stats.kendalltau(a, b).statistic)


def verdict_of(rows: Sequence[Compared]) -> Verdict:
    """Ranks and sums up.

    Raises:
      DexError: fewer than two configurations.
    """
    if len(rows) < 2:
        raise DexError(f"a ranking needs at least two configurations, not {len(rows)}")
    alike = [[row for row in rows if row.batch == batch] for batch in sorted({row.batch for row in rows})]
    regrets = [
        max(row.measured_speed for row in group) / max(group, key=lambda row: row.predicted_speed).measured_speed - 1
        for group in alike
    ]
    taus = [_tau(group) for group in alike if len(group) > 2]
    return Verdict(tuple(rows), _tau(rows), min(taus, default=_tau(rows)), max(regrets))


def _tau(rows: Sequence[Compared]) -> float:
    return kendall_tau([row.predicted_speed for row in rows], [row.measured_speed for row in rows])


def predict(s: Setting, profile: Profile, case: Case, schedule: Schedule) -> tuple[float, float]:
    """(seconds of a step or tick, tokens a second of all sequences).

    Raises:
      DexError: a grid or a cap that the profile does not hold.
    """
    s = dataclasses.replace(s, batch=case.batch, layout=case.layout)
    if schedule.method == "ar":
        seconds = cost_model.ar_step(s).total
        return seconds, case.batch / seconds
    ticks = profile.ticks(schedule.depths, schedule.rows)
    if ticks is None:
        raise DexError(
            f"the profile lacks {case.name} (depths {schedule.depths}, {schedule.rows} rows): measure it with "
            "these --explorers and --rows"
        )
    seconds = cost_model.tick_on_one_device(s, schedule.depths, schedule.rows, ticks).total
    return seconds, case.batch / (seconds * ticks.per_token)


class Runner:
    """Decodes prompts with one configuration, without an end at an EOS.

    Args:
      lm: the model, in the configuration's layout.
      schedule: of the configuration.
      exits: trained ones, or None.
      prompts: token ids.
      batch: B; B of the prompts at a time, repeated where there are too few.
      new_tokens: of each.
    """

    def __init__(
        self,
        lm: LanguageModel,
        schedule: Schedule,
        exits: TrainedExits | None,
        prompts: Sequence[list[int]],
        batch: int,
        new_tokens: int,
    ):
        self.lm, self.schedule, self.exits = lm, schedule, exits
        self.prompts, self.batch, self.new_tokens = prompts, batch, new_tokens

    def session(self, share: float) -> Session:
        """The session of one round, after its prefill; its prompts begin at that share of them all."""
        begin = int(share * len(self.prompts))
        chosen = [self.prompts[(begin + i) % len(self.prompts)] for i in range(self.batch)]
        session = Session(self.lm, chosen, self.schedule, self.new_tokens, None, self.exits)
        session.limits = session.limits._replace(eos_ids=jnp.asarray([-1], jnp.int32))
        session.prefill()
        return session

    def __call__(self, share: float) -> tuple[float, float, int]:
        """(seconds of a tick, tokens a tick of one sequence, cache length)."""
        session = self.session(share)
        begin = time.perf_counter()
        session.advance(FOREVER)
        jax.block_until_ready(session.state)
        seconds = time.perf_counter() - begin
        record = session.record()
        ticks = int(session.state.tick)
        return seconds / ticks, float(np.mean((record.lengths - 1) / record.ticks)), session.cache_length


def compare(
    lm: LanguageModel,
    exits: str | TrainedExits,
    profile: Profile,
    found: Hardware,
    prompts: Sequence[list[int]],
    *,
    cases: Sequence[Case] = CASES,
    new_tokens: int = 48,
    rounds: int = 5,
    notify: Callable[[str], None] = lambda line: None,
) -> list[Compared]:
    """Predicts and measures every configuration; the model is left in the unrolled layout.

    Args:
      lm: the model.
      exits: as of `dex_jax.generate`.
      profile: of the model with these exits.
      found: hardware, calibrated on this machine.
      prompts: token ids.
      cases: configurations.
      new_tokens: of each sequence.
      rounds: in each of them every configuration of a layout is measured once; medians count.
      notify: told what is going on.
    """
    compared: dict[Case, Compared] = {}
    # One layout is resident at a time, and stacks of other depths are other layouts.
    groups: dict[Any, list[Case]] = {}
    resolved = {case: resolve_method(case.method, exits, lm.config, lm.fingerprint) for case in cases}
    for case in cases:
        depths = resolved[case].schedule.depths
        if case.layout == "stacked" and len(depths) == 1:
            # AR over the stack that the first DEX of this layout has.
            others = [resolved[c].schedule.depths for c in cases if c.layout == "stacked" and c.explorers]
            depths = (others or [depths])[0]
        groups.setdefault(Stacked(depths) if case.layout == "stacked" else Unrolled(), []).append(case)
    for layout, members in groups.items():
        lm.arrange(layout)
        runners = {}
        for case in members:
            notify(f"compiling: {case.name}")
            schedule = resolved[case].schedule
            runners[case] = Runner(lm, schedule, resolved[case].trained, prompts, case.batch, new_tokens)
            runners[case](0)
        times: dict[Case, list[tuple[float, float, int]]] = {case: [] for case in members}
        begin = time.perf_counter()
        for number in range(rounds):
            spent = time.perf_counter() - begin
            left = f", {spent / number * (rounds - number):.0f} s left of this layout" if number else ""
            notify(f"{type(layout).__name__.lower()}: round {number + 1} of {rounds}{left}")
            for case, runner in runners.items():
                times[case].append(runner(number / rounds))  # so that small batches see prompts of all kinds too
        for case in members:
            seconds = statistics.median(t for t, _, _ in times[case])
            tokens = statistics.mean(n for _, n, _ in times[case])
            context = round(statistics.mean(length for _, _, length in times[case]))
            trained = resolved[case].trained
            work = exit_work(None if trained is None else trained.config, lm.config)
            s = Setting(work_of(lm.config), work, found, context=context)
            predicted = predict(s, profile, case, resolved[case].schedule)
            compared[case] = Compared(
                case.name, predicted[0], seconds, predicted[1], case.batch * tokens / seconds, case.batch
            )
    lm.arrange(Unrolled())
    return [compared[case] for case in cases]


def read_further(path: str) -> list[Compared]:
    """Configurations that were measured in another way: a JSON list of objects with the fields of `Compared`.

    Raises:
      DexError: no such file or another content.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return [Compared(**row) for row in json.load(file)]
    except (OSError, ValueError, TypeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(Compared))
        raise DexError(f"{path} is no list of objects with {fields}: {error}") from error


def table(verdict: Verdict) -> str:
    """Markdown."""
    from dex_jax.tables import markdown

    rows = [
        [
            row.name,
            f"{row.predicted_seconds * 1e3:.2f}",
            f"{row.measured_seconds * 1e3:.2f}",
            f"{row.error:+.0%}",
            f"{row.predicted_speed:.1f}",
            f"{row.measured_speed:.1f}",
        ]
        for row in verdict.rows
    ]
    header = ["configuration", "tick ms, predicted", "measured", "error", "tok/s, predicted", "measured"]
    return (
        f"{markdown(header, rows)}\n\nLargest error of a time {verdict.largest_error:.0%} (asked: {TIME_ERROR:.0%}), "
        f"Kendall's tau {verdict.tau:.2f} (asked: {LEAST_TAU}; {verdict.tau_alike:.2f} at least among those of one "
        f"batch), its choice for a batch is at most {verdict.regret:.0%} slower than the best (asked: "
        f"{MOST_REGRET:.0%}): {'holds' if verdict.holds else 'DOES NOT HOLD'}."
    )


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    from dex_jax.language_model import DTYPES

    p = argparse.ArgumentParser(
        prog="python -m dex_jax.evaluation.planner.validate_plan", description=__doc__.splitlines()[0]
    )
    add = p.add_argument
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", choices=list(DTYPES), help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    add("--exits", default="default", help="those of the profile (%(default)s)")
    add("--profile", required=True, metavar="FILE", help="of python -m dex_jax.evaluation.planner.profile")
    add("--hardware", required=True, metavar="FILE", help="of python -m dex_jax.evaluation.planner.calibrate")
    add("--data", required=True, metavar="FILE", help="prompts; best other ones than the profile's")
    add("--prompts", type=int, default=12, metavar="N", help="evenly spread (%(default)s)")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="of each (%(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="measurements of each configuration (%(default)s)")
    add("--further", metavar="FILE.json", help="configurations that were measured in another way")
    add("--output", metavar="FILE.json", help="write all figures there too")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 when all that is asked holds, 1 when not, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: 0 if run(args).holds else 1, "Stopped; nothing is written.")


def run(args: argparse.Namespace) -> Verdict:
    """Compares as the flags say, prints a table and returns the verdict.

    Raises:
      DexError: numbers that are too small, or what the flags name cannot be read or does not fit.
    """
    from dex_jax.cli.common import remember_compilations
    from dex_jax.cli.train_results import spread
    from dex_jax.io.whole_files import write_json
    from dex_jax.language_model import load
    from dex_jax.training.prompt_files import read_prompts

    if min(args.prompts, args.max_new_tokens - 1, args.rounds) < 1:
        raise DexError("--prompts and --rounds must be at least 1, --max-new-tokens at least 2")
    profile, found = read_profile(args.profile), hardware(args.hardware)
    further = [] if args.further is None else read_further(args.further)
    prompts = spread(read_prompts(args.data), args.prompts)
    remember_compilations()
    lm = load(args.model, args.dtype)
    compared = compare(
        lm,
        args.exits,
        profile,
        found,
        [lm.encode(prompt) for prompt in prompts],
        new_tokens=args.max_new_tokens,
        rounds=args.rounds,
        notify=lambda line: print(line, file=sys.stderr, flush=True),
    )
    verdict = verdict_of([*compared, *further])
    print(table(verdict))
    if args.output is not None:
        sums = {"largest_error": verdict.largest_error, "holds": verdict.holds}
        write_json(args.output, dataclasses.asdict(verdict) | sums)
    return verdict


if __name__ == "__main__":
    sys.exit(main())
