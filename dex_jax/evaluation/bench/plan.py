"""What a benchmark is to run: which methods, with which settings and exits. Nothing is run or written here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dex_jax.decoding.resolve import default_drafter, default_exits, resolve
from dex_jax.errors import DexError
from dex_jax.evaluation.bench.contenders import SWEPT, Contender, contender, sweep, swept_depths
from dex_jax.evaluation.bench.results import about_exits
from dex_jax.io.exits_file import load_exits
from dex_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a benchmark is asked for, beside its prompts.

    Attributes:
      model: as `dex_jax.load` was given it, for the record.
      exits, drafter: path, "default" or "shared"; the drafter is that of one explorer.
      methods: to count.
      timed: methods whose seconds are measured.
      explorers: K of DEX and AdaDecode.
      by_explorers: K of further runs of DEX.
      max_new_tokens, temperature: of each answer.
      batch: sequences at a time where only counts matter.
      rounds: timed runs of every method and prompt; 2 is A B B A.
      exit_depths: of the sweeps; empty for up to four among the shallower.
      draft_lengths, thresholds: of LayerSkip's and AdaDecode's sweeps.
      timed_settings: how many of the best counted settings are also timed.
    """

    model: str
    exits: str = "default"
    drafter: str = "default"
    methods: tuple[str, ...] = ("ar", "dex", "layerskip", "adadecode", "del")
    timed: tuple[str, ...] = ("ar", "dex_serial", "layerskip")
    explorers: int = 5
    by_explorers: tuple[int, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    batch: int = 8
    rounds: int = 2
    exit_depths: tuple[int, ...] = ()
    draft_lengths: tuple[int, ...] = (1, 2, 3, 5)
    thresholds: tuple[float, ...] = (0.2, 0.4, 0.6)
    timed_settings: int = 3


class Plan:
    """The methods of a benchmark.

    Args:
      lm: the model.
      settings: what is asked for.
      notify: told what is worth knowing.

    Attributes:
      exits, drafter: as `dex_jax.generate` takes them, read once.
      sweeps: swept method -> all its settings.

    Raises:
      DexError: exits that cannot be read, or settings that the model or its exits do not have.
    """

    def __init__(self, lm: LanguageModel, settings: Settings, notify: Callable[[str], Any]):
        self.lm, self.settings, self.notify = lm, settings, notify
        self.exits = self._opened(settings.exits, default_exits, "exits")
        self.drafter = self._opened(settings.drafter, default_drafter, "drafter")
        swept = [name for name in dict.fromkeys((*settings.methods, *self.timed)) if name in SWEPT]
        depths: Sequence[int] = settings.exit_depths
        if swept and not depths:
            depths = swept_depths(self.exits, lm.config, lm.fingerprint)
        grid = (settings.explorers, depths, settings.draft_lengths, settings.thresholds, lm.config.num_layers)
        self.sweeps = {name: sweep(name, *grid) for name in swept}
        self._check()

    @property
    def timed(self) -> tuple[str, ...]:
        """Methods whose seconds are measured, AR first: all others are told in terms of it."""
        return (
            tuple(dict.fromkeys(("ar", *self.settings.timed))) if self.settings.rounds and self.settings.timed else ()
        )

    @property
    def counted(self) -> tuple[str, ...]:
        """Methods whose counts are reported, but AR, which is always counted."""
        return tuple(name for name in dict.fromkeys(self.settings.methods) if name != "ar")

    @property
    def other_grids(self) -> list[int]:
        """K of further runs of DEX."""
        main = self.settings.explorers if "dex" in self.settings.methods else None
        return [explorers for explorers in self.settings.by_explorers if explorers != main]

    def exits_of(self, entry: Contender) -> Any:
        """What `dex_jax.generate` is to use for a method."""
        if entry.name == "ar":
            return "shared"
        return self.drafter if entry.drafter else self.exits

    def runs(self, report: int, tune: int) -> dict[str, int]:
        """Kind -> how many runs there will be, of so many prompts to report and to tune on."""
        counted = report * (1 + len(self.counted) + len(self.other_grids)) + tune
        finalists = [min(len(self.sweeps[name]), self.settings.timed_settings) for name in self.timed if name in SWEPT]
        tuning = sum(count for count in finalists if count > 1) * tune
        return {
            "depth": counted + tune * sum(map(len, self.sweeps.values())),
            "wall": self.settings.rounds * (report * len(self.timed) + tuning),
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
        explorers = self.settings.explorers
        names = [name for name in (*self.counted, *self.timed) if name not in SWEPT]
        entries = [contender(name, explorers) for name in names]
        entries += [contender("dex", count) for count in self.other_grids]
        entries += [entry for every in self.sweeps.values() for entry in every]
        for entry in entries:
            found = resolve(entry.method, self.exits_of(entry), self.lm.config, self.lm.fingerprint)
            if found.source == "shared" and self.exits_of(entry) != "shared":
                raise DexError(f"the exits do not serve {entry.name} {entry.setting}: {' '.join(found.remarks)}")

    def _opened(self, exits: str, shipped: Callable[[str], Any], what: str) -> Any:
        if exits == "default" and shipped(self.lm.fingerprint) is None:
            self.notify(f'no trained {what} with this model: "shared" is used')
            return "shared"
        return exits if exits in ("default", "shared") else load_exits(exits)
