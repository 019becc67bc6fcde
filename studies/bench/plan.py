"""What a benchmark is to run: which methods, with which settings and exits. Nothing is run or written here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from msgspec import Meta

from dex_jax.cli.common import depths
from dex_jax.decoding.resolve import default_drafter, default_exits, resolve
from dex_jax.errors import DexError
from dex_jax.foreign import check_fields
from dex_jax.io.exits_file import load_exits
from dex_jax.language_model import DTYPES, LanguageModel
from studies.bench.contenders import METHODS, SWEPT, Contender, contender, sweep, swept_depths
from studies.bench.results import about_exits
from studies.bench.tasks import TASKS
from studies.flags import Count, NotNegative, Several, flag, names

Name = Annotated[str, Meta(pattern=f"^({'|'.join(METHODS)})$")]

Names = Annotated[tuple[Name, ...], Meta(min_length=1)]


def _spelt(text: str) -> tuple[str, ...]:
    return names(text.replace("-", "_"))  # decode.py spells methods with hyphens


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a benchmark is asked for: each field is a flag, described in its help.

    Raises:
      DexError: naming the first that makes no sense.
    """

    output: str
    model: str = flag("smollm2-135m", "alias, Hugging Face directory, hub id or .gguf file")
    dtype: str | None = flag(None, "float32 on CPUs, bfloat16 on GPUs and TPUs unless given", type=str, choices=DTYPES)
    exits: str = flag("default", 'folder, file, "default" or "shared"')
    drafter: str = flag("default", 'of one explorer: folder, file, "default" or "shared"')
    methods: Names = flag(
        ("ar", "dex", "layerskip", "adadecode", "del"), f"to count, of {', '.join(METHODS)}", type=_spelt
    )
    timed: tuple[Name, ...] = flag(("ar", "dex_one_explorer", "layerskip"), "methods to time, or none", type=_spelt)
    explorers: Count = flag(5, "of DEX and AdaDecode", metavar="K")
    by_explorers: tuple[int, ...] = flag((), "also count DEX with these K", type=depths, metavar="K,...")
    tasks: Annotated[tuple[str, ...], Meta(min_length=1)] = flag(
        ("gsm8k", "humaneval", "spec_bench"), f"of {', '.join(TASKS)}, prompts:FILE", type=names, metavar="NAME,..."
    )
    data: str | None = flag(None, "folder with a folder for each task; without it tasks come from the hub", type=str)
    prompts: Count = flag(20, "of each task, evenly spread")
    tune_prompts: NotNegative = flag(4, "further ones to choose settings on")
    longest_prompt: Count = flag(1024, "longer ones, in tokens, are left out")
    no_chat: bool = flag(False, "use prompts as they are, without the chat template")
    max_new_tokens: Several = flag(64, "of each answer")
    temperature: float = flag(0.0, "0 is greedy")
    seed: int = flag(0, "of sampling; each prompt has its own")
    batch: Count = flag(8, "sequences at a time where only counts matter")
    rounds: NotNegative = flag(2, "timed runs of every method and prompt; 2 is A B B A")
    exit_depths: tuple[int, ...] = flag((), "of the sweeps, up to four among the shallower unless given", type=depths)
    draft_lengths: tuple[int, ...] = flag((1, 2, 3, 5), "LayerSkip's sweep", type=depths, metavar="G,...")
    thresholds: tuple[float, ...] = flag((0.2, 0.4, 0.6), "AdaDecode's sweep", type=_shares, metavar="P,...")
    timed_settings: Count = flag(3, "best counted settings that are also timed")
    no_plots: bool = flag(False, "no PNG files, and no need of matplotlib")

    def __post_init__(self) -> None:
        check_fields(self, flags=True)
        if self.swept and self.tune_prompts < 1:
            raise DexError(
                f"the setting of {self.swept[0]} is chosen on tuning prompts: --tune-prompts must be above 0"
            )

    @property
    def swept(self) -> list[str]:
        """Methods whose setting is chosen by a sweep."""
        ran = (*self.methods, *(self.timed if self.rounds else ()))
        return [name for name in dict.fromkeys(ran) if name in SWEPT]


class Plan:
    """The methods of a benchmark.

    Attributes:
      exits, drafter: as `dex_jax.generate` takes them, read once.
      sweeps: swept method -> all its settings.

    Raises:
      DexError: exits that cannot be read, or settings that the model or its exits do not have.
    """

    def __init__(self, lm: LanguageModel, settings: Settings):
        self.lm, self.settings = lm, settings
        self.exits = self._opened(settings.exits, default_exits, "exits")
        self.drafter = self._opened(settings.drafter, default_drafter, "drafter")
        drafting: Sequence[int] = settings.exit_depths
        if settings.swept and not drafting:
            drafting = swept_depths(self.exits, lm.config, lm.fingerprint)
        grid = (settings.explorers, drafting, settings.draft_lengths, settings.thresholds, lm.config.num_layers)
        self.sweeps = {name: sweep(name, *grid) for name in settings.swept}
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
            print(f'no trained {what} with this model: "shared" is used', file=sys.stderr)
            return "shared"
        return exits if exits in ("default", "shared") else load_exits(exits)
