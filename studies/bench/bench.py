"""The runs of the benchmark: counts from batches, seconds from one sequence at a time, each a line of results.jsonl."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dex_jax.decoding.generate import generate, sampling_of, stream
from dex_jax.decoding.session import PROGRAMS
from dex_jax.decoding.sizes import prompt_bucket
from dex_jax.evaluation.check import compare_tokens
from dex_jax.language_model import LanguageModel
from dex_jax.progress import Standing
from studies.bench.contenders import SWEPT, Contender, best_setting, by_setting, contender
from studies.bench.plan import Plan
from studies.bench.results import Results
from studies.bench.runs import Run, compared, name_of, run_key, run_of
from studies.pace import Pace

SHORT = 256
"""Prompts up to here share batches: to pad them costs less than another compilation."""

PROGRAMS_HELD = 60
"""Compiled programs after which the old ones are dropped."""


class Case(NamedTuple):
    """One prompt."""

    task: str
    id: str  # of the item in the task
    ids: tuple[int, ...]  # of tokens
    split: str  # "report" or "tune"
    seed: int  # of sampling


class Bench:
    """A benchmark on its way: prompts (`cases`), the methods of a plan, and in `results` the runs of earlier calls."""

    def __init__(
        self,
        lm: LanguageModel,
        results: Results,
        cases: Sequence[Case],
        plan: Plan,
        notify: Callable[[str | Standing], None],
    ):
        self.lm, self.results, self.cases, self.plan, self.notify = lm, results, list(cases), plan, notify
        self.settings = plan.settings
        self.plain: dict[tuple[str, str], list[int]] = {}
        self.said: set[str] = set()
        self.warm: set[tuple[str, int]] = set()
        self.pace = Pace(plan.runs(len(self.of("report")), len(self.of("tune"))), notify)

    def of(self, split: str) -> list[Case]:
        """Prompts of a split by length, so that those of one padded length stand together."""
        return sorted((case for case in self.cases if case.split == split), key=lambda case: len(case.ids))

    def count(self) -> None:
        """Counts of AR, of the sweeps and of every method at its best setting."""
        self._count(contender("ar", self.settings.explorers), [*self.of("tune"), *self.of("report")])
        for entry in (entry for entries in self.plan.sweeps.values() for entry in entries):
            self._count(entry, self.of("tune"))
        for name in self.plan.counted:
            self._count(self._best(name, "depth"), self.of("report"))
        for explorers in self.plan.other_grids:
            self._count(contender("dex", explorers), self.of("report"))

    def time(self) -> None:
        """Seconds of the timed methods, each prompt with all of them in turn."""
        if not self.plan.timed:
            return
        chosen = [self._best(name, "depth") for name in self.plan.timed if name not in SWEPT]
        for name in self.plan.timed:
            if name in SWEPT:
                entries = self._finalists(name)
                if len(entries) > 1:
                    self._time(entries, self.of("tune"))
                chosen.append(self._best(name, "wall" if len(entries) > 1 else "depth"))
        self._time(chosen, self.of("report"))

    def _best(self, name: str, kind: str) -> Contender:
        if name not in SWEPT:
            return contender(name, self.settings.explorers)
        # A folder may hold settings of an earlier, wider sweep.
        entries = {entry.words: entry for entry in self.plan.sweeps[name]}
        tried = [run for run in self.results.runs if run.name in entries]
        return entries[name_of(name, best_setting(tried, name, kind))]

    def _finalists(self, name: str) -> list[Contender]:
        order = [name_of(name, setting) for setting, _ in by_setting(self.results.runs, name, "depth")]
        entries = sorted(self.plan.sweeps[name], key=lambda entry: order.index(entry.words))
        return entries[: self.settings.timed_settings]

    def _count(self, entry: Contender, cases: Sequence[Case]) -> None:
        """Counts of one method on prompts, in batches."""
        missing = [case for case in cases if self._key(entry, case, "depth") not in self.results.done]
        self.pace.skip("depth", len(cases) - len(missing))
        # DEL's sequences end their drafts in different steps, and each time all exits look at the whole batch.
        for batch in _batches(missing, 1 if entry.name == "del" else self.settings.batch):
            # Repeats fill the batch up to a size that is compiled anyway.
            filled = [*batch, *[batch[-1]] * (_size(len(batch)) - len(batch))]
            with self._remarks():
                out = generate(self.lm, [list(case.ids) for case in filled], **self._options(entry, filled))
            for row, case in enumerate(batch):
                self._keep(entry, case, run_of(out, row, kind="depth", **self._about(entry, case)))
            self.pace.add("depth", len(batch), f"counting {entry.words}")
            self._forget_some()
        if entry.name == "ar":
            for run in self.results.runs:
                if run.method == "ar" and run.kind == "depth":
                    self.plain[run.task, run.prompt_id] = run.tokens

    def _time(self, entries: Sequence[Contender], cases: Sequence[Case]) -> None:
        """Seconds of methods on prompts: A B B A ..., so that what slows the machine down slows all of them."""
        bucket = None
        for case in cases:
            if _bucket(case) != bucket:
                self._forget_some()
                bucket = _bucket(case)
            for number in range(self.settings.rounds):
                for entry in entries if number % 2 == 0 else entries[::-1]:
                    if self._key(entry, case, "wall", number) in self.results.done:
                        self.pace.skip("wall", 1)
                        continue
                    self._warm_up(entry, case)
                    with self._remarks():
                        out = generate(self.lm, [list(case.ids)], **self._options(entry, [case]))
                    self._keep(entry, case, run_of(out, 0, kind="wall", round=number, **self._about(entry, case)))
                    self.pace.add("wall", 1, f"timing {entry.words}")

    def _warm_up(self, entry: Contender, case: Case) -> None:
        """Compiles what a run needs and runs its first ticks, once for each padded length."""
        key = (entry.words, _bucket(case))
        if key in self.warm:
            return
        with self._remarks():
            updates: Iterator[Any] = stream(self.lm, [list(case.ids)], **self._options(entry, [case]))
            for _ in range(2):
                next(updates, None)
        self.warm.add(key)

    def _options(self, entry: Contender, cases: Sequence[Case]) -> dict[str, Any]:
        return {
            "method": entry.method,
            "exits": self.plan.exits_of(entry),
            "max_new_tokens": self.settings.max_new_tokens,
            "temperature": self.settings.temperature,
            "seed": [case.seed for case in cases],
        }

    def _about(self, entry: Contender, case: Case) -> dict[str, Any]:
        return {
            "method": entry.name,
            "setting": entry.setting,
            "task": case.task,
            "prompt_id": case.id,
            "split": case.split,
            "model": self.settings.model,
            "temperature": self.settings.temperature,
            "max_new_tokens": self.settings.max_new_tokens,
        }

    def _keep(self, entry: Contender, case: Case, run: Run) -> None:
        """Compares with AR's tokens and appends."""
        reference = self.plain.get((case.task, case.id))
        if reference is not None:
            vocab_size = self.lm.config.vocab_size
            sampling, _ = sampling_of(self.settings.temperature, None, None, case.seed, 1, vocab_size)
            check = compare_tokens(self.lm, list(case.ids), run.tokens, reference, sampling)
            run = compared(run, check)
        self.results.add(run)

    def _key(self, entry: Contender, case: Case, kind: str, number: int = 0) -> tuple[Any, ...]:
        return run_key(
            kind=kind,
            method=entry.name,
            task=case.task,
            prompt_id=case.id,
            setting=entry.setting,
            split=case.split,
            round=number,
            dtype=str(self.lm.dtype),
            seed=case.seed if self.settings.temperature > 0 else None,
        )

    @contextlib.contextmanager
    def _remarks(self) -> Iterator[None]:
        """What `generate` has to say, said once."""
        heard = io.StringIO()
        try:
            with contextlib.redirect_stderr(heard):
                yield
        finally:
            for line in heard.getvalue().splitlines():
                if line.strip() and line not in self.said:
                    self.said.add(line)
                    self.notify(line)

    def _forget_some(self) -> None:
        """Drops compiled programs once there are many: a process can hold only so many."""
        if sum(program.held for program in PROGRAMS) > PROGRAMS_HELD:
            for program in PROGRAMS:
                program.forget()
            self.warm.clear()


def _bucket(case: Case) -> int:
    return prompt_bucket(len(case.ids))


def _size(count: int) -> int:
    """The power of two at or above."""
    return 1 << (count - 1).bit_length()


def _batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Up to `size` cases at a time, short ones together and the others by padded length."""
    groups: dict[int, list[Case]] = {}
    for case in cases:
        groups.setdefault(max(_bucket(case), SHORT), []).append(case)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
