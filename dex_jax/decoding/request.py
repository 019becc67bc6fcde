"""The options of a generation, each defined once with its default, its bounds and its sentence.

The signature and the help of `generate`, the flags of decode.py and the table in docs/api.md are made from the
fields below. Nothing here imports JAX, so that `decode.py --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import numbers
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dex_jax.errors import DexError, is_integer, whole_number

MOST_SEEDS = 2**63
"""The bound of seeds, which are at least -MOST_SEEDS and below MOST_SEEDS."""

SMALLEST_TEMPERATURE = 1e-6
"""The least temperature above 0: below it float32 logits overflow when divided, and sampling is greedy long before."""

MOST_ROWS = 4096
"""The most rows of a stage, and samples of a prompt from the command line: more is a slip."""

F = TypeVar("F", bound=Callable[..., Any])


def option(default: Any, says: str, flag: str | None = None, metavar: str | None = None, off: str | None = None) -> Any:
    """Return a dataclass field with its sentence.

    `flag` is that of decode.py, None where it has none, and `metavar` the name of its value in the help, which ends
    before "In Python"; a switch that is on by default has `off` instead, the sentence of the flag that turns it off.
    """
    return dataclasses.field(default=default, metadata={"says": says, "flag": flag, "metavar": metavar, "off": off})


@dataclasses.dataclass(frozen=True)
class AR:
    """Plain autoregressive decoding: every token runs through all layers, one after the other; reports K = 1."""


@dataclasses.dataclass(frozen=True)
class Dex:
    """Depth Exploration Decoding (arXiv 2606.29223): exits and drafts propose tokens, the final layer decides them.

    docs/api.md lists the options; they are checked when a plan is made for a model.
    """

    explorers: int | None = option(
        None,
        "K, how many exit depths there are, evenly spaced at ceil(k L / K). Unless given, it is 1, "
        "or AR where that should be faster, and 5 without drafts.",
        "--explorers",
        "K",
    )
    depths: tuple[int, ...] | None = option(
        None, "The exit depths themselves, ascending and ending at the final layer.", "--depths", "X,...,L"
    )
    rows: int | str | None = option(
        None,
        "W, how many nodes a stage runs at most, the most probable ones. They are chosen unless given; "
        '"full", without drafts only, never prunes.',
        "--rows",
        "W",
    )
    decs: bool = option(
        True,
        "Whether an exit may not repeat a token that its node's children hold.",
        "--no-decs",
        off="Let exits repeat tokens that a node's children already hold.",
    )
    draft: Any = option(
        True,
        "Whether exit 0 drafts below new nodes; False is the paper's method. A TreeShape says how much is drafted.",
        "--no-draft",
        off="Draft nothing before the first layer: the paper's method.",
    )


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of `generate` and `stream`, checked.

    Raises:
      DexError: an option of another type or out of its range; the sentence names it.
    """

    method: Any = option(
        None,
        "AR(), Dex(...) or a method of your own; unless given it is Dex(), which chooses what should be fastest here.",
    )
    max_new_tokens: int = option(
        128, "The most tokens of a sequence, the one that the prompt gives included.", "--max-new-tokens", "N"
    )
    exits: Any = option(
        "default",
        'The heads that guess: "default" (what ships for the model), "shared" (the model\'s own head at every depth), '
        "a .safetensors file, a training's folder, or the folder or hub id of an EAGLE-3 head. They change how fast "
        "text comes, never the text. In Python, what `load_exits` gave is taken too.",
        "--exits",
        "EXITS",
    )
    draft_model: Any = option(
        None,
        "A small model of the same vocabulary that drafts instead of exits. In Python, a loaded one.",
        "--draft-model",
        "NAME",
    )
    temperature: float = option(
        0.0, "0 is greedy; above, tokens are sampled with noise that belongs to their positions.", "--temperature", "T"
    )
    top_k: int | None = option(None, "Keeps the k most likely tokens; all unless given.", "--top-k", "K")
    top_p: float | None = option(
        None, "Keeps the smallest set of tokens that holds this probability; all unless given.", "--top-p", "P"
    )
    seed: int | Sequence[int] = option(
        0, "Row b of the batch gets seed + b. In Python, a list gives every row its own.", "--seed", "S"
    )
    num_samples: int = option(1, "Repeats each prompt n times, one row after the other.", "--num-samples", "N")
    stop: str | Sequence[str] | None = option(
        None, "Ends a sequence before this text, or before any of several texts.", "--stop", "TEXT"
    )
    chat: bool = option(
        True,
        "Whether string prompts go through the model's chat template.",
        "--no-chat",
        off="Use prompts as they are, without the chat template.",
    )
    ticks_per_update: int | None = option(
        None,
        "How many ticks run on the device between two outputs of `stream`; as many as take a twentieth of a second, 16 "
        "at most, unless given.",
    )

    def __post_init__(self) -> None:
        check_method(self.method)
        whole_number(max_new_tokens=self.max_new_tokens, num_samples=self.num_samples)
        if self.ticks_per_update is not None:
            whole_number(ticks_per_update=self.ticks_per_update)
        if not isinstance(self.exits, (str, os.PathLike)) and not hasattr(self.exits, "source"):
            raise DexError(
                f'exits are "default", "shared", a path, or what dex_jax.load_exits gave, not {_short(self.exits)}'
            )
        if self.draft_model is not None:
            if not hasattr(self.draft_model, "weights"):
                raise DexError(
                    f"draft_model is a loaded model, not {_short(self.draft_model)}: give dex_jax.load(...) of it"
                )
            if self.exits != "default":
                raise DexError("a draft model stands at depth 0, and exits are given too: leave one of them out")
        if not (_is_real(self.temperature) and math.isfinite(self.temperature) and self.temperature >= 0):
            raise DexError(f"temperature must be 0 (greedy) or above, not {_short(self.temperature)}")
        if 0 < self.temperature < SMALLEST_TEMPERATURE:
            raise DexError(f"temperature {self.temperature} is too small to divide by: use 0, which is greedy")
        if self.top_k is not None:
            whole_number(top_k=self.top_k)
        if self.top_p is not None and not (_is_real(self.top_p) and 0 < self.top_p <= 1):
            raise DexError(f"top_p must lie in (0, 1], not {_short(self.top_p)}")
        seeds: Any = self.seed if _is_list(self.seed) else [self.seed]
        if not all(is_integer(seed) and -MOST_SEEDS <= int(seed) < MOST_SEEDS for seed in seeds):
            raise DexError("a seed is a whole number of at most 63 bits: give one, or one for each sequence")
        stops: Any = self.stop if _is_list(self.stop) else [] if self.stop is None else [self.stop]
        if not all(isinstance(each, str) and each for each in stops):
            raise DexError(f"stop is a text that is not empty, or a list of such texts, not {_short(self.stop)}")
        if not isinstance(self.chat, bool):
            raise DexError(f"chat is True or False, not {_short(self.chat)}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """Build a request of named options; raise DexError for an unknown name, with the nearest known one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise DexError(f"there is no option {name}: {hint}")
        return cls(**options)

    def seeds_of(self, sequences: int) -> list[int]:
        """Return a seed for each of so many `sequences`; raise DexError where a list of another length was given."""
        if not _is_list(self.seed):
            return [int(self.seed) + row for row in range(sequences)]  # type: ignore[arg-type]
        seeds = [int(seed) for seed in self.seed]  # type: ignore[union-attr]
        if len(seeds) != sequences:
            raise DexError(f"there are {len(seeds)} seeds for {sequences} sequences: give one number, or one for each")
        return seeds


def check_method(method: Any) -> None:
    """Raise DexError unless `method` is None, AR, Dex or another object with a `plan_for`."""
    if isinstance(method, type) or not (method is None or isinstance(method, (AR, Dex)) or hasattr(method, "plan_for")):
        raise DexError(f"a method is an object such as dex_jax.Dex() or dex_jax.AR(), not {_short(method)}")


def explained(function: F) -> F:
    """Give a function of (lm, prompts, **options) the signature of all options, and its docstring their sentences."""
    fields = dataclasses.fields(Request)
    signature, keyword = inspect.signature(function), inspect.Parameter.KEYWORD_ONLY
    given = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields]
    function.__signature__ = signature.replace(parameters=[*given, *options])  # type: ignore[attr-defined]
    sentences = (f"{field.name}: {field.metadata['says']}" for field in fields)
    lines = "\n      ".join(textwrap.fill(each, 112, subsequent_indent=" " * 8) for each in sentences)
    assert function.__doc__ is not None
    function.__doc__ = function.__doc__.replace("**options: every field of `Request`.", lines)
    return function


def table() -> Iterator[str]:
    """Yield the lines of the table of all options in docs/api.md."""
    yield "| option | default | flag | what it does |"
    yield "|---|---|---|---|"
    for owner in (Request, Dex):
        for field in dataclasses.fields(owner):
            name = field.name if owner is Request else f"Dex({field.name}=)"
            flag = f"`{field.metadata['flag']}`" if field.metadata["flag"] else ""
            yield f"| `{name}` | `{field.default!r}` | {flag} | {field.metadata['says']} |"


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and (isinstance(value, Sequence) or hasattr(value, "tolist"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
