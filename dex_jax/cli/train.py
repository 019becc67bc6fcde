"""The train_exits.py program, which trains; `train_results` holds its other commands."""

from __future__ import annotations

import argparse
import functools
import sys
from typing import TYPE_CHECKING, Any

from dex_jax.cli.common import DEFAULT_MODEL, program
from dex_jax.cli.train_arguments import check_timed, configured, evaluate_parser, export_parser, folder_of, train_parser
from dex_jax.cli.train_results import evaluate, export
from dex_jax.errors import DexError
from dex_jax.interrupts import exit_code
from dex_jax.progress import phases

if TYPE_CHECKING:
    from dex_jax.io.exits_file import TrainedExits
    from dex_jax.training.exit_training import ExitTraining

COMMANDS = {"export": (export_parser, export), "evaluate": (evaluate_parser, evaluate)}


def main(argv: list[str] | None = None) -> int:
    """Run train_exits.py with command-line arguments and return the exit code; unknown flags raise SystemExit(2)."""
    argv = sys.argv[1:] if argv is None else argv
    parser, command = COMMANDS.get(argv[0] if argv else "", (train_parser, _train))
    args = parser().parse_args(argv if command is _train else argv[1:])

    def run() -> None:
        try:
            command(args)
        except RuntimeError as error:
            # JAX has no exception class of its own for this.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            lower = ": lower --batch" if hasattr(args, "batch") else ""
            raise DexError(f"the device has too little memory for this{lower}") from error

    return exit_code(run, "Stopped. To go on, run the same command again.")


def _train(args: argparse.Namespace) -> None:
    check_timed(args)
    if args.config is None:
        _train_timed(args)
        return
    with phases():
        config = configured(args)

    from dex_jax.io.exits_file import FILE_NAME
    from dex_jax.language_model import load
    from dex_jax.training.exit_training import train_exits

    folder, mesh = folder_of(args), _mesh(args.devices, config.train.batch)
    initial = None if args.init_from is None else _exits_to_start_from(args.init_from, config)
    lm, tell = load(config.model, config.train.dtype), functools.partial(print, flush=True)
    train_exits(config, lm, folder, mesh=mesh, initial=initial, answers=args.answers, tell=tell)
    print(f'The exits are in {folder / FILE_NAME}. Use them: {_decode(config.model)} --exits {folder} --prompt "..."')


def _train_timed(args: argparse.Namespace) -> None:
    with phases():
        from dex_jax.io.exits_file import FILE_NAME
        from dex_jax.language_model import load
        from dex_jax.training import timed

        mesh, lm = _mesh(args.devices, args.batch or args.devices), load(args.model or DEFAULT_MODEL, args.dtype)
    folder, tell = folder_of(args), functools.partial(print, flush=True)
    asked = {name: getattr(args, name) for name in ("batch", "learning_rate", "seed", "dtype")}
    given = {name: value for name, value in asked.items() if value is not None}
    options = {"explorers": args.explorers, "data": args.data or timed.DATA, "answers": args.answers}
    ways = timed.train_for(lm, args.minutes, folder, given=given, mesh=mesh, tell=tell, **options)
    decode, file = _decode(args.model or DEFAULT_MODEL), folder / FILE_NAME
    if not ways:
        more = "" if args.explorers is None else f" --explorers {args.explorers}"
        turns = "" if args.explorers is None else " (one device takes turns with them, and is slower)"
        print(f'What was trained is in {file}. Use it{turns}: {decode} --exits {folder}{more} --prompt "..."')
        return
    print(f"\n{timed.table(ways)}\n")
    plain, without, trained = (way.name for way in ways)
    ratio = {way.name: f"{way.over_plain:.2f} times as fast as plain decoding" for way in ways}
    brings = "What was trained brings no more than decode.py without it"
    said = {
        plain: f'Nothing was faster than plain decoding: {decode} --method ar --prompt "..."',
        without: f'{brings}, {ratio[without]}: {decode} --prompt "..."',
        trained: f'With the drafter in {file} decoding is {ratio[trained]}: {decode} --exits {folder} --prompt "..."',
    }
    print(said[timed.best(ways)])


def _decode(model: str) -> str:
    """Return the command that decodes with a model, without a prompt."""
    return program("decode.py") + ("" if model == DEFAULT_MODEL else f" --model {model}")


def _exits_to_start_from(name: str, config: ExitTraining) -> TrainedExits:
    from dex_jax.io.exits_file import default_drafter, default_exits, load_exits
    from dex_jax.io.opening import open_checkpoint

    if name != "default":
        return load_exits(name)
    fingerprint = open_checkpoint(config.model).fingerprint()
    shipped = default_drafter(fingerprint) if config.exits.is_drafter else default_exits(fingerprint)
    if shipped is None:
        raise DexError(f"--init-from default: no exits ship for {config.model}; leave it out, or name others")
    return shipped


def _mesh(devices: int, batch: int) -> Any:
    """Return a mesh of so many devices, None for one; raise DexError if they cannot share a batch or are not there."""
    if batch % devices:
        raise DexError(f"--devices {devices} cannot share a batch of {batch} rows: choose a --batch that they divide")
    if devices == 1:
        return None
    import jax

    if devices > jax.device_count():
        raise DexError(f"--devices {devices}, and there are {jax.device_count()}: name fewer")
    return jax.make_mesh((devices,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
