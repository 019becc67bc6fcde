"""What a benchmark is to run: which methods, with which settings and exits. Nothing is run or written here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from dex_jax.decoding.exits import default_drafter, default_exits, resolve_method
from dex_jax.decoding.methods import is_auto
from dex_jax.errors import DexError
from dex_jax.evaluation.bench.contenders import SWEPT, Contender, contender, sweep, swept_depths
from dex_jax.evaluation.bench.results import about_exits
from dex_jax.io.exits_file import load_exits
from dex_jax.language_model import LanguageModel


class Plan:
    """The methods of a benchmark.

    Args:
      lm: the model.
      args: flags of `bench.parser`.
      notify: told what is worth knowing.

    Attributes:
      exits, drafter: as `dex_jax.generate` takes them, read once.
      sweeps: swept method -> all its settings.

    Raises:
      DexError: exits that cannot be read, or settings that the model or its exits do not have.
    """

    def __init__(self, lm: LanguageModel, args: argparse.Namespace, notify: Callable[[str], Any]):
        self.lm, self.args, self.notify = lm, args, notify
        self.exits = self._opened(args.exits, default_exits, "exits")
        self.drafter = self._opened(args.drafter, default_drafter, "drafter")
        swept = [name for name in dict.fromkeys((*args.methods, *self.timed)) if name in SWEPT]
        depths: Sequence[int] = args.exit_depths or ()
        if swept and not depths:
            depths = swept_depths(self.exits, lm.config, lm.fingerprint)
        grid = (args.explorers, depths, args.draft_lengths, args.thresholds, lm.config.num_layers)
        self.sweeps = {name: sweep(name, *grid) for name in swept}
        self._check()

    @property
    def timed(self) -> tuple[str, ...]:
        """Methods whose seconds are measured, AR first: all others are told in terms of it."""
        return tuple(dict.fromkeys(("ar", *self.args.timed))) if self.args.rounds and self.args.timed else ()

    @property
    def counted(self) -> tuple[str, ...]:
        """Methods whose counts are reported, but AR, which is always counted."""
        return tuple(name for name in dict.fromkeys(self.args.methods) if name != "ar")

    @property
    def other_grids(self) -> list[int]:
        """K of further runs of DEX."""
        main = self.args.explorers if "dex" in self.args.methods else None
        return [explorers for explorers in self.args.by_explorers if explorers != main]

    def exits_of(self, entry: Contender) -> Any:
        """What `dex_jax.generate` is to use for a method."""
        if entry.name == "ar":
            return "shared"
        return self.drafter if entry.drafter else self.exits

    def runs(self, report: int, tune: int) -> dict[str, int]:
        """Kind -> how many runs there will be, of so many prompts to report and to tune on."""
        counted = report * (1 + len(self.counted) + len(self.other_grids)) + tune
        finalists = [min(len(self.sweeps[name]), self.args.timed_settings) for name in self.timed if name in SWEPT]
        tuning = sum(count for count in finalists if count > 1) * tune
        return {
            "depth": counted + tune * sum(map(len, self.sweeps.values())),
            "wall": self.args.rounds * (report * len(self.timed) + tuning),
        }

    def about(self) -> dict[str, Any]:
        """Which exits a study has, so that no other's runs are added to it."""
        opened = ((self.exits, default_exits), (self.drafter, default_drafter))
        found = [
            shipped(self.lm.fingerprint) if exits == "default" else None if exits == "shared" else exits
            for exits, shipped in opened
        ]
        return {"exits_used": about_exits(found[0]), "drafter_used": about_exits(found[1])}

    def _check(self) -> None:
        """Resolves every method once, so that a wrong setting costs no run."""
        explorers = self.args.explorers
        names = [name for name in (*self.counted, *self.timed) if name not in SWEPT]
        entries = [contender(name, explorers) for name in names]
        entries += [contender("dex", count) for count in self.other_grids]
        entries += [entry for every in self.sweeps.values() for entry in every]
        for entry in entries:
            if not is_auto(entry.method):
                found = resolve_method(entry.method, self.exits_of(entry), self.lm.config, self.lm.fingerprint)
                if found.source == "shared" and self.exits_of(entry) != "shared":
                    raise DexError(f"the exits do not serve {entry.name} {entry.setting}: {' '.join(found.remarks)}")

    def _opened(self, exits: str, shipped: Callable[[str], Any], what: str) -> Any:
        if exits == "default" and shipped(self.lm.fingerprint) is None:
            self.notify(f'no trained {what} with this model: "shared" is used')
            return "shared"
        return exits if exits in ("default", "shared") else load_exits(exits)
