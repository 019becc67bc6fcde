"""What exits of an 8B model would take to train, by the estimate that train_exits.py prints, as a page of Markdown.

    python benchmarks/training_cost.py > results/training_cost.md
    python benchmarks/training_cost.py --measured runs/smollm2_135m > results/training_cost.md

With --measured, the estimate for the machine at hand stands beside what a run in that folder took: give the folder of a
run of --config on this machine, while nothing else runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import statistics
from pathlib import Path

from dex_jax.config import ExitsConfig, ModelConfig, RopeScaling
from dex_jax.language_model import outline, resolve_dtype
from dex_jax.training.estimate import (
    MACHINES,
    REACHED,
    REACHED_OF_MEASURED,
    USABLE,
    Machine,
    TrainingCost,
    duration,
    gigabytes,
    parameter_count,
    this_machine,
    training_cost,
)
from dex_jax.training.exit_training import ExitTraining
from dex_jax.training.journal import read_journal

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LLAMA_8B = ModelConfig(
    family="llama",
    vocab_size=128_256,
    num_layers=32,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    mlp_width=14_336,
    context=131_072,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 8.0),
)
LLAMA_3B = dataclasses.replace(LLAMA_8B, num_layers=28, width=3072, num_heads=24, mlp_width=8192, tied=True)
TOKENS = (1_000_000, 10_000_000)
SHOWN = ("a100", "v5e-8", "t4")


def cost_of(
    config: ExitTraining, model: ModelConfig, exits: ExitsConfig, machine: Machine, tokens: int
) -> TrainingCost:
    return training_cost(
        model,
        exits,
        machine,
        batch=config.train.batch,
        chunk=config.chunk,
        length=config.sources.length,
        steps=-(-tokens // (config.train.batch * config.chunk)),
        dtype=resolve_dtype(config.train.dtype),
    )


def kinds_of(config: ExitTraining) -> dict[str, ExitsConfig]:
    attn = dataclasses.replace(config.exits, kind="attn", fused=False, hidden=4096, heads=32, head_dim=128, window=32)
    return {"linear": config.exits, "attn": attn}


def row(config: ExitTraining, what: str, model: ModelConfig, exits: ExitsConfig, machine: Machine) -> str:
    costs = [cost_of(config, model, exits, machine, tokens) for tokens in TOKENS]
    fits = costs[0].fits(machine)
    sizes = [costs[0].model_bytes, costs[0].cache_bytes, costs[0].exits_bytes, costs[0].activation_bytes]
    memory = " + ".join(gigabytes(size) for size in sizes)
    verdict = "yes" if fits else "**no**"
    times = [duration(cost.seconds) if fits else "-" for cost in costs]
    total = f"{gigabytes(costs[0].total_bytes)} of {gigabytes(machine.memory or 0)}"
    return f"| {what} | {machine.name} | {memory} | {total} | {verdict} | {' | '.join(times)} |"


def arithmetic(config: ExitTraining, exits: ExitsConfig, machine: Machine) -> list[str]:
    cost = cost_of(config, LLAMA_8B, exits, machine, TOKENS[0])
    batch, chunk = config.train.batch, config.chunk
    flops, bandwidth = machine.flops * machine.reached, machine.bandwidth * machine.reached
    compute, read = cost.model_flops / flops, cost.token_bytes / bandwidth
    parameters = parameter_count(exits)
    learn, move = cost.exits_flops / flops, 28 * parameters / bandwidth / (batch * chunk)
    counted = f"{flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s"
    return [
        f"- {parameters / 1e6:.0f} million parameters in training, 16 bytes each: the number, its gradient, two "
        "moments.",
        f"- {machine.name}: {counted} are counted on, {machine.reached:.0%} of the published peaks.",
        f"- The model: {cost.model_flops / 1e9:.1f} GFLOP a token take {micro(compute)}. Weights and caches are read "
        f"once for {batch} rows: {cost.token_bytes / 1e6:.0f} MB a token take {micro(read)}. The longer one counts.",
        f"- The exits: {cost.exits_flops / 1e9:.1f} GFLOP a token take {micro(learn)}. The optimizer moves "
        f"{28 * parameters / 1e9:.1f} GB for {batch * chunk:,} tokens, {micro(move)} a token. The longer one counts.",
        f"- Together {micro(cost.seconds / cost.tokens)} a token, {duration(cost.seconds)} for a million tokens.",
    ]


def micro(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def measured_row(folder: str | None, file: str) -> str:
    if folder is None:
        return "| (not measured yet: run with `--measured FOLDER`) | | | | | |"
    config = runpy.run_path(file)["config"]
    lines = [record for record in read_journal(folder) if record["kind"] == "train"]
    if not lines:
        raise SystemExit(f"error: {folder} has no journal of a training")
    tokens, minutes = lines[-1]["tokens"], sum(line["seconds"] for line in lines) / 60
    speed = statistics.median(line["tokens_per_second"] for line in lines)
    dtype = resolve_dtype(config.train.dtype)
    machine = this_machine(dtype)
    model = outline(config.model, config.train.dtype).config
    estimate = cost_of(config, model, config.exits, machine, tokens).seconds
    what = f"{Path(file).stem}, kind {config.exits.kind}, {len(config.exits.depths)} exits"
    counted = f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s"
    times = " | ".join(f"{time:.0f} min" for time in (minutes, tokens / speed / 60, estimate / 60))
    return f"| {what} | {machine.name}, {dtype} ({counted}) | {tokens:,} | {times} |"


def report(measured: str | None, measured_config: str) -> str:
    config = runpy.run_path(str(CONFIGS / "llama3_8b.py"))["config"]
    exits = config.exits
    depths = ", ".join(map(str, exits.depths))
    rows = [
        row(config, f"8B, {kind}", LLAMA_8B, each, MACHINES[name])
        for kind, each in kinds_of(config).items()
        for name in SHOWN
    ]
    a100, v5e, t4 = (MACHINES[name] for name in SHOWN)
    costs = {kind: cost_of(config, LLAMA_8B, each, a100, TOKENS[0]) for kind, each in kinds_of(config).items()}
    assert all(cost.total_bytes < USABLE * 40e9 for cost in costs.values())
    largest = costs["attn"]
    a_chip = (largest.model_bytes + largest.exits_bytes) / v5e.devices + largest.cache_bytes + largest.activation_bytes
    assert a_chip < USABLE * 16e9 < largest.model_bytes
    smaller = dataclasses.replace(exits, width=LLAMA_3B.width, depths=exits.depths[:-1])
    small = cost_of(config, LLAMA_3B, smaller, t4, TOKENS[0])
    assert small.fits(t4)
    columns = ["what", "machine", "GB: model + caches + exits + activations", "GB in all", "fits"]
    header = [*columns, *(f"{tokens // 10**6}M tokens" for tokens in TOKENS)]
    parts = [
        "# What exits of an 8B model take to train",
        "Every number above the last table is an **estimate**: nothing of this size has been run. It is the estimate "
        "that `train_exits.py` prints before it starts (`dex_jax/training/estimate.py`). It counts on "
        f"{REACHED:.0%} of each machine's published arithmetic and bandwidth, and leaves out compilation, evaluation "
        "and checkpoints. `python benchmarks/training_cost.py > results/training_cost.md` makes this page from "
        "`configs/llama3_8b.py`.",
        "Shapes of Llama 3.1 8B in bfloat16 (float16 on the T4, which has no bfloat16), exits at depths "
        f"{depths}, a draft vocabulary of {exits.draft_size:,} tokens, {config.train.batch} rows of at most "
        f'{config.sources.length} tokens, {config.chunk} steps between two updates. "linear" is fused with the '
        'previous position; "attn" has an mlp of 4096, 32 heads of 128 and a window of 32. A run fits if it takes no '
        f"more than {USABLE:.0%} of the memory.",
        "\n".join([f"| {' | '.join(header)} |", "|---" * len(header) + "|", *rows]),
        "- **A100**: the 80 GB model. The memory of the 40 GB one is enough for both as well.",
        "- **v5e-8**: no chip holds the model alone, so it is spread over all eight (`--mesh 1x8`). Weights and exits "
        f"are then split and rows are not: at most {gigabytes(a_chip)} GB a chip of 16. The time assumes that "
        "arithmetic and reading split evenly, and does not count what the chips tell each other, so take it as the "
        "least that could be.",
        f"- **T4**: an 8B model does not fit, as its weights alone take {gigabytes(largest.model_bytes)} GB in two "
        "bytes a number, and 8-bit weights are not offered here. What does fit is a smaller model: with the shapes of "
        f"Llama 3.2 3B, linear exits at {len(smaller.depths)} depths and the same rows it takes "
        f"{gigabytes(small.total_bytes)} GB and {duration(small.seconds)} for a million tokens. Exits of an 8B model "
        "are trained on a larger machine, and used wherever the model itself fits.",
        "## The arithmetic, one A100, linear",
        "\n".join(arithmetic(config, exits, a100)),
        "## The arithmetic, one A100, attn",
        "\n".join(arithmetic(config, kinds_of(config)["attn"], a100)),
        "## The estimate beside a run",
        "Measured, not estimated: tokens, and the times in the fourth and fifth columns. The speed of the machine is "
        f"measured when the estimate is made, and {REACHED_OF_MEASURED:.0%} of it counted on.",
        "| run | device (its speed) | tokens | all time of the journal | at its median speed | estimate |\n"
        "|---|---|---|---|---|---|\n" + measured_row(measured, measured_config),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", metavar="FOLDER", help="of a run of --config on this machine")
    parser.add_argument("--config", default=str(CONFIGS / "smollm2_135m.py"), help="of that run (%(default)s)")
    args = parser.parse_args()
    print(report(args.measured, args.config))


if __name__ == "__main__":
    main()
