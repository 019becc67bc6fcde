"""The flags of train_exits.py, and the configuration that they change."""

from __future__ import annotations

import argparse
import dataclasses
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dex_jax.cli.common import DEFAULT_MODEL, DTYPES, add_model, program, whole
from dex_jax.errors import DexError
from dex_jax.progress import notify

if TYPE_CHECKING:
    from dex_jax.training.exit_training import ExitTraining

SETTINGS = ("steps", "minutes", "batch", "learning_rate", "seed", "dtype")
"""Fields of `TrainConfig` that flags change."""

TRAIN_EPILOG = """\
further commands, each with --help:
  %(prog)s export FOLDER OUT.safetensors     one small file of a run's exits
  %(prog)s evaluate --exits ... --data ...   agreement and predicted speedups on prompts of your choice

examples:
  %(prog)s --model my-model --minutes 60
  %(prog)s --config configs/smollm2_135m.py
  %(prog)s --config configs/smollm2_135m.py --folder runs/mine --data self prompts.jsonl=2 --steps 2000

A run that was stopped or killed goes on when the same command is given again. Exit codes: 0 done, 2 bad input,
130 interrupted.
"""


def train_parser() -> argparse.ArgumentParser:
    """Return the parser of train_exits.py without a command."""
    p = argparse.ArgumentParser(
        prog=program("train_exits.py"),
        description="Train a drafter, or exits, for a frozen model: in so many minutes, at the end of which what they "
        "bring is measured, or as a configuration file says. Flags change what stands there.",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument_group("what").add_argument
    add("--config", metavar="FILE", help="Python file that defines `config`; see configs/ (none: --minutes)")
    add(
        "--explorers",
        type=whole(2, 1024),
        metavar="K",
        help="train exits for K explorers, each with a device of its own, instead of a drafter",
    )
    add("--folder", metavar="FOLDER", help="of the run: checkpoints, metrics, results (runs/NAME)")
    add("--model", help="alias, Hugging Face directory, hub id or .gguf file")
    add("--dtype", choices=DTYPES, help="of the model's arithmetic; trained parameters are always float32")
    add(
        "--data",
        nargs="+",
        metavar="SRC[=W]",
        help="self, python-stdlib, FILE (.jsonl, .json, .txt), text:FILE, datasets:NAME, with weights",
    )
    add(
        "--init-from",
        metavar="FROM",
        help="start from these exits (file, folder, or default: those that ship; they may have further depths)",
    )

    add("--answers", metavar="FOLDER", help="for the model's answers, which several runs may share (FOLDER/answers)")

    add = p.add_argument_group("how long and how").add_argument
    add("--minutes", type=_minutes, metavar="M", help="for all of it without --config, else of training alone")
    add("--steps", type=int, metavar="N", help="updates in all")
    add(
        "--tokens",
        type=whole(1, 2**40),
        metavar="N",
        help="in all texts, prompts among them (so many that each is read once)",
    )
    add("--batch", type=int, metavar="B", help="rows of a batch")
    add("--learning-rate", type=float, metavar="R", help="its peak")
    add("--seed", type=int, help="of parameters, the order of texts and what is sampled")
    add("--devices", type=whole(1, 2**16), default=1, metavar="N", help="to spread the rows of a batch over (1)")
    return p


def export_parser() -> argparse.ArgumentParser:
    """Return the parser of `train_exits.py export`."""
    p = argparse.ArgumentParser(
        prog=program("train_exits.py") + " export",
        description=f"Write a run's exits to one file, for {program('decode.py')} --exits. Those of a run that "
        "has not ended are from its newest checkpoint.",
    )
    p.add_argument("folder", metavar="FOLDER", help="of the run")
    p.add_argument("output", metavar="OUT.safetensors")
    p.add_argument(
        "--float32", action="store_true", help="full precision; otherwise 8-bit matrices, a quarter as large"
    )
    return p


def evaluate_parser() -> argparse.ArgumentParser:
    """Return the parser of `train_exits.py evaluate`."""
    p = argparse.ArgumentParser(
        prog=program("train_exits.py") + " evaluate",
        description="Let the model answer prompts greedily, then measure what each exit would have said: agreement, "
        "divergence, and the ticks that follow from them.",
    )
    add = p.add_argument
    add("--exits", required=True, help='folder, file, "default" (what ships with the model) or "shared" (no training)')
    add_model(add)
    data = "prompts: .jsonl, .json or .txt, each a group"
    add("--data", nargs="+", action="extend", required=True, metavar="FILE", help=data)
    add("--prompts", type=whole(1, 2**31), metavar="N", help="N prompts of each file, evenly spread (all)")
    add("--max-new-tokens", type=whole(2, 2**24), default=96, metavar="N", help="of each answer (%(default)s)")
    add("--batch", type=whole(1, 4096), default=8, metavar="B", help="prompts at a time (%(default)s)")
    add("--output", metavar="FILE.json", help="write the figures there too")
    return p


def read_config(path: str) -> ExitTraining:
    """Return the `config` of a Python file; raise DexError if there is no file, an error or no configuration in it."""
    if not Path(path).is_file():
        raise DexError(f"there is no configuration file {path}: give one such as configs/smollm2_135m.py")

    notify("importing JAX")
    from dex_jax.training.exit_training import ExitTraining

    try:
        found = runpy.run_path(path).get("config")
    except DexError as error:
        raise DexError(f"{path}: {error}") from error
    # A user's file can raise anything.
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise DexError(f"{path} cannot be run as a configuration ({why}): mend it") from error
    if not isinstance(found, ExitTraining):
        has = "defines no `config`" if found is None else f"defines `config` as {type(found).__name__}"
        raise DexError(f"{path} {has}: make it an ExitTraining")
    return found


def configured(args: argparse.Namespace) -> ExitTraining:
    """Return the configuration of --config with the changes of flags; raise DexError where they do not fit."""

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    config = read_config(args.config)
    changes = given("model", "tokens") | {"train": dataclasses.replace(config.train, **given(*SETTINGS))}
    if args.data is not None:
        changes["data"] = tuple(args.data)
    return dataclasses.replace(config, **changes)


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of the run that the flags name."""
    if args.folder is not None:
        return Path(args.folder)
    if args.config is not None:
        return Path("runs") / Path(args.config).stem
    what = "drafter" if args.explorers is None else f"exits-{args.explorers}"
    return Path("runs") / f"{Path(args.model or DEFAULT_MODEL).stem}-{what}"


def check_timed(args: argparse.Namespace) -> None:
    """Raise DexError for flags that mean nothing together, before anything is loaded."""
    if args.config is not None:
        if args.explorers is not None:
            raise DexError(
                "--explorers is for a training without --config, whose file says at which depths exits stand"
            )
        return
    if args.minutes is None:
        raise DexError("say how long with --minutes, as in --model my-model --minutes 60, or name a --config")
    for name in ("steps", "tokens", "init_from"):
        if getattr(args, name) is not None:
            raise DexError(f"--{name.replace('_', '-')} is for a training with --config: leave it out, or name a file")


def _minutes(text: str) -> float:
    try:
        if 0 < float(text) < 1e6:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
