"""The runs of the template study: answers in large batches, counts along them, and the loop itself on a few."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dex_jax.decoding.counting import ticks_of
from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import Dex
from dex_jax.decoding.rivals import LayerSkip
from dex_jax.evaluation.check import CLOSE, compare_tokens
from dex_jax.forced.asks import Ask, dex_asks
from dex_jax.forced.counts import DexCount, dex_counts
from dex_jax.forced.run import force
from dex_jax.forced.texts import answers, batches
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import full_rows
from dex_jax.sharding import device_name
from studies.bench.contenders import best_setting
from studies.bench.results import Results
from studies.bench.runs import Run, compared, repeated, run_key, run_of, versions
from studies.pace import Pace
from studies.templates.forced_runs import LayerSkipCount, layerskip_asks, layerskip_counts
from studies.templates.plan import Case, Plan, grade
from studies.templates.report import place

SMALLEST_BATCH = 8
LOOP_BATCH = 8
"""Of the loops themselves: more rows of a lattice at a time cost more than they save."""


class TemplateStudy:
    """Makes the runs of a study that are not in `results` yet: of items in templates (`cases`), as the plan says."""

    def __init__(
        self,
        lm: LanguageModel,
        results: Results,
        cases: Sequence[Case],
        plan: Plan,
        notify: Callable[[Any], None] = lambda event: None,
    ):
        self.lm, self.results, self.cases, self.notify = lm, results, cases, notify
        self.plan, self.settings = plan, plan.settings
        self.known: dict[tuple[str, str, str, str], Run] = {
            (run.split, run.task, run.template, run.prompt_id): run
            for run in results.runs
            if run.method == "ar" and run.dtype == str(lm.dtype)
        }

    def run(self) -> list[str]:
        """All of it; returns a sentence for each loop that did not agree."""
        if "layerskip" in self.settings.methods:
            sweep = [(d, g) for d in self.plan.exit_depths for g in self.settings.draft_lengths]
            self._answers("tune", {case.item.task: sweep for case in self.cases}, "choosing LayerSkip's setting")
        chosen = {task: [setting] for task, setting in self.chosen().items()}
        self._answers("report", chosen, "answers")
        return self._loops()

    def chosen(self) -> dict[str, tuple[int, int]]:
        """Task -> LayerSkip's best (exit, draft length) on the items that are not reported; {} without LayerSkip."""
        if "layerskip" not in self.settings.methods:
            return {}
        found = {}
        for task in dict.fromkeys(case.item.task for case in self.cases):
            setting = best_setting([run for run in self.results.runs if run.task == task], "layerskip", "depth")
            found[task] = (setting["exit"], setting["draft_length"])
        return found

    def _answers(self, split: str, settings: dict[str, list[tuple[int, int]]], what: str) -> None:
        """AR's answers of a split, DEX on reported ones, and LayerSkip with the settings of each task."""
        plan, layers = self.plan, self.lm.config.num_layers
        dex = "dex" in self.settings.methods and split == "report"
        # Of all lines that an answer makes AR's is written last.
        todo = [
            case for case in self.cases if case.split == split and self._key(case, "ar", {}) not in self.results.done
        ]
        asks: set[Ask] = set(dex_asks(plan.depths, plan.exits.config)) if dex else set()
        pairs = sorted({pair for each in settings.values() for pair in each})
        for pair in pairs:
            asks |= set(layerskip_asks(*pair, plan.exits.config, layers))
        groups = [[todo[i] for i in group] for group in batches([len(case.ids) for case in todo], self.settings.batch)]
        pace = Pace({split: sum(len(case.ids) + self.settings.max_new_tokens for case in todo)}, self.notify)
        for group in groups:
            rows = max(SMALLEST_BATCH, 1 << (len(group) - 1).bit_length())
            texts = answers(self.lm, [list(case.ids) for case in group], self.settings.max_new_tokens, rows)
            dex_found: list[DexCount] = []
            skipped: dict[tuple[int, int], list[LayerSkipCount]] = {}
            if asks:
                forced = force(self.lm, plan.exits, texts, sorted(asks), count=max(1, len(plan.depths) - 1), batch=rows)
                dex_found = dex_counts(forced, plan.depths) if dex else []
                limits = (self.settings.max_new_tokens, self.lm.eos_ids)
                skipped = {pair: layerskip_counts(forced, *pair, *limits) for pair in pairs}
            for row, (case, (_, tokens)) in enumerate(zip(group, texts, strict=True)):
                wanted = {pair: skipped[pair][row] for pair in settings.get(case.item.task, [])}
                for run in self._lines(case, list(tokens), dex_found[row] if dex else None, wanted, rows):
                    self.results.add(run)
            pace.add(split, sum(len(case.ids) + self.settings.max_new_tokens for case in group), what)

    def _key(self, case: Case, method: str, setting: dict[str, Any]) -> tuple[Any, ...]:
        return run_key(kind="depth", method=method, setting=setting, counted="loop", **self._where(case))

    @property
    def _grid(self) -> dict[str, Any]:
        return {"explorers": len(self.plan.depths)}

    def _where(self, case: Case) -> dict[str, Any]:
        return {
            "task": case.item.task,
            "prompt_id": case.item.id,
            "template": case.template.name,
            "split": case.split,
            "dtype": str(self.lm.dtype),
        }

    def _lines(
        self,
        case: Case,
        tokens: list[int],
        dex: DexCount | None,
        skipped: Mapping[tuple[int, int], LayerSkipCount],
        rows: int,
    ) -> list[Run]:
        plan, layers = self.plan, self.lm.config.num_layers
        shared: dict[str, Any] = {
            **self._where(case),
            **grade(self.lm, case, tokens),
            "model": self.settings.model,
            "tokens": tokens,
            "prompt_tokens": len(case.ids),
            "batch": rows,
            "max_new_tokens": self.settings.max_new_tokens,
            "repeated": repeated(tokens),
            "device": device_name(jax.devices()[0]),
            "versions": versions(),
        }
        counted: dict[str, Any] = {"counted": "forced", "exits_source": plan.exits_source} | shared
        lines = []
        if dex is not None:
            ticks = ticks_of(dex.exits, len(dex.exits), len(plan.depths))
            found: dict[str, Any] = {"ticks": ticks, "layer_steps": ticks * int(max(np.diff((0, *plan.depths))))}
            found |= {"exits": dex.exits.tolist(), "depths": list(plan.depths), "rows": full_rows(len(plan.depths))}
            lines.append(Run("depth", "dex", setting=self._grid, **found, **counted))
        for (depth, length), count in skipped.items():
            setting = {"exit": depth, "draft_length": length}
            found = {"exits": count.exits.tolist(), "depths": [depth, layers], "rows": length + 1}
            found |= {"layer_steps": count.layer_steps, "rounds": count.rounds}
            lines.append(Run("depth", "layerskip", setting=setting, **found, **counted))
        plain = Run("depth", "ar", layer_steps=layers * (len(tokens) - 1), depths=[layers], rows=1, **shared)
        self.known[plain.split, plain.task, plain.template, plain.prompt_id] = plain
        return [*lines, plain]

    def sampled(self) -> list[Case]:
        """The cases on which the loops themselves run: a random share of every task, at least one."""
        found = []
        for task in dict.fromkeys(case.item.task for case in self.cases):
            ours = [case for case in self.cases if case.split == "report" and case.item.task == task]
            share = self.settings.loop_share
            count = min(len(ours), max(1, round(share * len(ours)))) if share else 0
            found += random.Random(f"{self.settings.seed} {task}").sample(ours, count)
        return found

    def _loops(self) -> list[str]:
        """Runs the loops on a share of the answers; returns a sentence for each that is not as was counted."""
        sample, chosen = self.sampled(), self.chosen()
        todo: list[tuple[str, dict[str, Any], Any, list[Case]]] = []
        if "dex" in self.settings.methods and len(self.plan.depths) > 1:
            todo.append(("dex", self._grid, Dex(depths=self.plan.depths, rows="full", draft=False), sample))
        for depth, length in sorted(set(chosen.values())):
            ours = [case for case in sample if chosen[case.item.task] == (depth, length)]
            todo.append(("layerskip", {"exit": depth, "draft_length": length}, LayerSkip(depth, length), ours))
        pace = Pace({"loops": sum(len(cases) for _, _, _, cases in todo)}, self.notify)
        for name, setting, method, cases in todo:
            missing = [case for case in cases if self._key(case, name, setting) not in self.results.done]
            pace.skip("loops", len(cases) - len(missing))
            for group in batches([len(case.ids) for case in missing], LOOP_BATCH):
                members = [missing[i] for i in group]
                # A smaller last batch would be another program.
                filled = members + [members[-1]] * (LOOP_BATCH - len(members))
                output = generate(
                    self.lm,
                    [list(case.ids) for case in filled],
                    method=method,
                    exits=self.plan.exits,
                    max_new_tokens=self.settings.max_new_tokens,
                )
                for row, case in enumerate(members):
                    plain = self.known["report", case.item.task, case.template.name, case.item.id]
                    run = run_of(
                        output,
                        row,
                        kind="depth",
                        method=name,
                        setting=setting,
                        counted="loop",
                        model=self.settings.model,
                        max_new_tokens=self.settings.max_new_tokens,
                        **self._where(case),
                        **grade(self.lm, case, output.tokens[row, : output.lengths[row]].tolist()),
                    )
                    run = dataclasses.replace(run, exits_source=self.plan.exits_source)
                    check = compare_tokens(self.lm, list(case.ids), run.tokens, plain.tokens)
                    self.results.add(compared(run, check))
                pace.add("loops", len(members), "the loops themselves")
        return self._disagreements()

    def _disagreements(self) -> list[str]:
        """A sentence for each run of a loop whose tokens are not AR's or whose exits are not those counted."""
        found = []
        cases = {(c.item.task, c.template.name, c.item.id): c for c in self.cases if c.split == "report"}
        forced = {place(run): run for run in self.results.runs if run.counted == "forced"}
        for run in self.results.runs:
            counted = forced.get(place(run))
            if run.counted != "loop" or run.method == "ar" or counted is None or run.dtype != str(self.lm.dtype):
                continue
            where = f"{run.name} on {run.task}, item {run.prompt_id}, template {run.template}"
            if not run.match:
                if not run.tie:
                    found.append(f"{where}: token {run.first_divergence} is not AR's (top-2 margin {run.margin})")
                continue  # after a tie the texts are different ones
            assert run.exits is not None
            assert counted.exits is not None
            differs = np.flatnonzero(np.asarray(run.exits) != np.asarray(counted.exits))
            if len(differs) == 0:
                continue
            margin = self._margin(cases[run.task, run.template, run.prompt_id], run, int(differs[0]))
            if margin >= CLOSE[run.dtype]:
                found.append(
                    f"{where}: token {differs[0]} has exit {run.exits[differs[0]]} in the loop and "
                    f"{counted.exits[differs[0]]} as counted, with a margin of {margin:.2g} there"
                )
        return found

    def _margin(self, case: Case, run: Run, at: int) -> float:
        """How near the proposals that decided a token were to others."""
        plan, layers = self.plan, self.lm.config.num_layers
        depth, length = run.setting.get("exit", 1), run.setting.get("draft_length", 1)
        if run.method == "dex":
            asks = dex_asks(plan.depths, plan.exits.config)
        else:
            asks = layerskip_asks(depth, length, plan.exits.config, layers)
        texts = answers(self.lm, [list(case.ids)], self.settings.max_new_tokens, 1)
        forced = force(self.lm, plan.exits, texts, asks, count=max(1, len(plan.depths) - 1), batch=1)
        if run.method == "dex":
            return float(dex_counts(forced, plan.depths)[0].closest[at])
        return float(
            layerskip_counts(forced, depth, length, self.settings.max_new_tokens, self.lm.eos_ids)[0].closest[at]
        )


def answers_in(lm: LanguageModel, results: Results, cases: Sequence[Case], plan: Plan, notify: Any) -> None:
    """AR's answers alone to reported cases, in another dtype than the study's own."""
    alone = dataclasses.replace(plan, settings=dataclasses.replace(plan.settings, methods=("ar",), loop_share=0.0))
    TemplateStudy(lm, results, [case for case in cases if case.split == "report"], alone, notify).run()
