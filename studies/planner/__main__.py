"""Writes results/planner.md: the planner's assumptions, what the paper's cases come to, and what else there is.

    python -m studies.planner                         # tables and the assumed profiles, seconds, nothing is measured
    python -m studies.planner --compile               # compiles for TPUs too (libtpu; minutes), kept in a JSON file

EAD profiles of large models are assumptions here: figures of this repository's own small models (results/exits.json,
results/layerskip.md), stretched to the depth of the large one.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
from pathlib import Path

from dex_jax.decoding.methods import even_depths
from dex_jax.evaluation.planner import cost_model
from dex_jax.evaluation.planner.cost_model import Parts, Setting
from dex_jax.evaluation.planner.ead_profile import FORMAT, Profile, read_profile
from dex_jax.evaluation.planner.predictions import Prediction, cost_by_batch, others, plan
from dex_jax.evaluation.planner.workload import SHAPES, described_exits, work_of
from dex_jax.hardware import DEVICES, LINKS, REACHED_BANDWIDTH, REACHED_FLOPS, USABLE, Hardware, hardware
from dex_jax.io.whole_files import write_json
from dex_jax.lattice import default_rows
from dex_jax.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
COMPILED = RESULTS / "planner" / "compiled.json"
CONTEXT = 1024

LINKED = {
    "NVLink": "",
    "PCI Express 5": ",link=pcie5",
    "a host each, InfiniBand": ",hosts={count}",
    "a host each, data-centre network": ",hosts={count},network=dcn",
}

TO_COMPILE = (
    ("llama-2-70b", "v6e:2x4", 8),
    ("llama-2-70b", "v5p:2x2x2", 8),
    ("qwen3-32b", "v5p:2x2x1", 4),
    ("qwen3-32b", "v6e:2x2", 4),
    ("llama-3-8b", "v5e:2x4", 8),
)


def stretched(depths: list[int], share: list[float], layers: int) -> dict:
    """An EAD of a model as deep as depths[-1], its depths in proportion at `layers`."""
    found: dict[int, float] = {}
    for depth, part in zip(depths, share, strict=True):
        at = max(1, round(depth * layers / depths[-1]))
        found[at] = found.get(at, 0.0) + part
    total = sum(found.values())
    return {"depths": list(found), "share": [part / total for part in found.values()]}


def trained_exits_ead() -> tuple[list[int], list[float], int]:
    """(depths, shares, L) of the exits that ship for SmolLM2-135M, mean of the measured groups."""
    figures = json.loads((RESULTS / "exits.json").read_text())["groups"]["mean"]
    return [*figures["depths"], 30], figures["ead"], 30


def layerskip_ead() -> tuple[list[int], list[float], int]:
    """(depths, shares, L) of the model trained by the LayerSkip recipe: the first table of results/layerskip.md."""
    text = (RESULTS / "layerskip.md").read_text().split("## Without")[0]
    rows = re.findall(r"^\|\s*(\d+) \|\s*[\d.]+ \|\s*[\d.]+ \|\s*([\d.]+) \|$", text, re.MULTILINE)
    return [int(depth) for depth, _ in rows], [float(share) for _, share in rows], len(rows)


def write_assumptions(folder: Path) -> dict[tuple[str, str], Path]:
    """(model, exits) -> the file of its assumed profile."""
    sources = {
        "attn:16384": (
            trained_exits_ead(),
            "the exits that ship for SmolLM2-135M (results/exits.md, mean of two sets)",
        ),
        "shared": (layerskip_ead(), "the 8-layer model of results/layerskip.md, trained by the LayerSkip recipe"),
    }
    files = {}
    for model, (exits, ((depths, share, _), where)) in itertools.product(
        ("llama-2-70b", "codellama-34b"), sources.items()
    ):
        layers = SHAPES[model].num_layers
        file = folder / f"{model}_{exits.split(':')[0]}.json"
        sentence = (
            f"tokens of {model} become available at the same share of its depth as those of {where}; rows that prune "
            "cost no ticks; what DECS gains is left out"
        )
        profile = {
            "format": FORMAT,
            "assumption": sentence,
            "layers": layers,
            "ead": stretched(depths, share, layers),
        }
        write_json(str(file), profile)
        files[model, exits] = file
    return files


def gains(pipelined: Parts, tick: Parts, ticks: float) -> list[float]:
    """Speed over the pipeline on the same devices, as more and more of what a tick and a step take is counted in."""
    orders = (("layers",), ("head", "exits"), ("communication",), ("width",), ("fixed",))
    found: list[float] = []
    counted: list[str] = []
    for names in orders:
        counted += names
        found.append(
            sum(getattr(pipelined, name) for name in counted) / (ticks * sum(getattr(tick, name) for name in counted))
        )
    return found


def _setting(model: str, exits: str, machine: Hardware, batch: int = 1) -> Setting:
    described = described_exits(exits, SHAPES[model])
    assert described is not None
    return Setting(work_of(SHAPES[model]), described, machine, batch, CONTEXT)


def paper_rows(model: str, exits: str, profile: Profile, cases: list[tuple[int, int]], links: str) -> list[list[str]]:
    """One line for each (K, batch) on K H100s."""
    config = SHAPES[model]
    rows = []
    for stages, batch in cases:
        machine = hardware(f"h100x{stages}" + links.format(count=stages))
        s = _setting(model, exits, machine, batch)
        depths, width = even_depths(stages, config.num_layers), default_rows(stages)
        ticks = profile.ticks(depths, width)
        assert ticks is not None  # an assumed profile has all grids
        tick = cost_model.tick(s, depths, width, ticks)
        pipelined = cost_model.pipelined_step(s, stages)
        counted = gains(pipelined, tick, ticks)
        every = others(s, profile)

        def best(methods: tuple[str, ...], every: list[Prediction] = every) -> str:
            fitting = [p.tokens_per_second for p in every if p.method in methods and p.tensor > 1 and p.fits]
            return f"{max(fitting):.1f}" if fitting else "-"

        rows.append(
            [
                f"{stages} x {width}, {batch}",
                f"{ticks:.2f}",
                *(f"{gain:.2f}" for gain in counted),
                f"{tick.total * 1e3:.2f}",
                f"{1 / (tick.total * ticks):.1f}",
                f"{1 / pipelined.total:.1f}",
                best(("ar", "ar tensor")),
                best(("layerskip",)),
            ]
        )
    return rows


HEADER = [
    "K x rows, batch",
    "ticks a token",
    "depth-side",
    "+ heads",
    "+ communication",
    "+ width",
    "+ kernels",
    "tick ms",
    "DEX tok/s",
    "pipeline",
    "tensor AR",
    "LayerSkip",
]


def paper(files: dict[tuple[str, str], Path]) -> list[str]:
    """The section on the paper's cases."""
    parts = [
        "## The paper's cases, calculated",
        "The paper reports Llama-2-70B with K = 2 to 8 and CodeLlama-34B with K = 3 on H100s; its figures are "
        "not at hand, so this is what the cost model makes of those shapes in bfloat16 with a context of "
        f"{CONTEXT:,}, K devices for K explorers. Columns 3 to 7 are speeds over AR pipelined over the same "
        "devices: first with layers alone, which is the depth-side speedup where K divides the layers, then with "
        "heads and exits, communication, the lattice's width and kernel latencies counted in as well. The last "
        "three columns are tokens a second of other ways on the same devices (tensor AR: the fastest tensor axis "
        "that divides the heads, up to K; LayerSkip: self-speculation whose drafts the same exits make, with the "
        "exit, length and tensor axis that are best).",
    ]
    for (model, exits), file in files.items():
        profile = read_profile(file)
        explorers = list(range(2, 9)) if model == "llama-2-70b" else [3]
        parts.append(f"### {model}, exits {exits}")
        parts.append(
            f"Assumption ([{file.name}](planner/{file.name})): {profile.assumption}. Mean EAD {profile.ead.mean:.1f} "
            f"of {profile.layers} layers."
        )
        for name, links in LINKED.items():
            parts.append(f"{name}:")
            cases = [(stages, 1) for stages in explorers]
            parts.append(markdown(HEADER, paper_rows(model, exits, profile, cases, links)))
        cases = [(explorers[-1], batch) for batch in (1, 4, 16, 64)]
        parts.append("As the batch grows, NVLink; tokens a second are those of one sequence:")
        parts.append(markdown(HEADER, paper_rows(model, exits, profile, cases, "")))
    return parts


def recommendations(files: dict[tuple[str, str], Path]) -> list[str]:
    """What the planner says of some machines."""
    rows = []
    cases = [
        ("llama-2-70b", exits, text)
        for exits in ("attn:16384", "shared")
        for text in (
            "h100x8",
            "h100x8,link=pcie5",
            "h100x8,hosts=8,network=dcn",
            "h100x16",
            "h100x16,network=dcn",
            "h100x32,hosts=4,network=dcn",
            "v5px8",
            "v6ex8",
            "v6ex32,hosts=4",
        )
    ]
    cases += [("codellama-34b", "attn:16384", text) for text in ("h100", "h100x3", "h100x4,hosts=4,network=dcn")]
    for model, exits, text in cases:
        profile = read_profile(files[model, exits])
        s = _setting(model, exits, hardware(text))
        chosen = plan(s, profile)
        rows.append([model, exits, f"`{text}`", chosen.sentence])
    return [
        "## What it recommends",
        "Batch 1, the same assumed profiles; `python -m dex_jax.cli.plan` shows every candidate. DEX is "
        "recommended where it is predicted to be at least 5% faster than every other way on the same devices.",
        markdown(["model", "exits", "hardware", "recommendation"], rows),
    ]


def costs(files: dict[tuple[str, str], Path]) -> list[str]:
    """Latency bought with throughput, over batches."""
    parts = [
        "## Latency is bought with throughput",
        "Tokens a second of one sequence and dollars for a million tokens (prices are the table's assumptions) of "
        "Llama-2-70B, exits attn:16384, as the batch grows. Replicas hold as few devices each as fit the model; only "
        "busy ones are paid for.",
    ]
    for text in ("h100x8", "h100x8,hosts=8,network=dcn"):
        s = _setting("llama-2-70b", "attn:16384", hardware(text))
        profile = read_profile(files["llama-2-70b", "attn:16384"])
        by_batch = cost_by_batch(s, plan(s, profile), profile)
        keys = dict.fromkeys((p.method, p.stages, p.tensor) for each in by_batch.values() for p in each)
        rows = []
        for key in keys:
            cells = []
            for each in by_batch.values():
                p = next((p for p in each if (p.method, p.stages, p.tensor) == key), None)
                cells.append("-" if p is None else f"{p.tokens_per_second:.1f}, ${p.dollars_per_million:.2f}")
            rows.append([f"{key[0]}, {key[1]} x {key[2]}", *cells])
        parts += [f"`{text}` (stages x tensor):", markdown(["way", *(f"B = {b}" for b in by_batch)], rows)]
        parts.append(crossing(by_batch))
    return parts


def crossing(by_batch: dict[int, list[Prediction]]) -> str:
    """What DEX costs over the cheapest way, at each end."""
    sentences = []
    for batch in (min(by_batch), max(by_batch)):
        dex = next((p for p in by_batch[batch] if p.method == "dex"), None)
        if dex is None:
            continue
        cheapest = min((p for p in by_batch[batch] if p.method != "dex"), key=lambda p: p.device_seconds)
        sentences.append(
            f"At batch {batch} a token by DEX takes {dex.device_seconds / cheapest.device_seconds:.1f} times the "
            f"device time of the cheapest way ({cheapest.method}) and comes "
            f"{dex.tokens_per_second / cheapest.tokens_per_second:.2f} times as fast."
        )
    return " ".join(sentences)


def assumptions() -> list[str]:
    """Machines, links and constants."""
    devices = [
        [
            name,
            f"{d.flops / 1e12:.4g}",
            f"{d.bandwidth / 1e9:,.0f}",
            f"{d.memory / 1e9:.0f}",
            f"{d.kernel_seconds * 1e6:.0f}",
            "-" if d.price is None else f"{d.price:.2f}",
            str(per_host),
            f"{link}, {network}",
        ]
        for name, (d, per_host, link, network) in DEVICES.items()
    ]
    links = [[link.name, f"{link.latency * 1e6:.0f}", f"{link.bandwidth / 1e9:.4g}"] for link in LINKS.values()]
    constants = [
        [name.lower().replace("_", " "), f"{getattr(cost_model, name):g}"]
        for name in (
            "KERNELS_A_LAYER",
            "KERNELS_A_HEAD",
            "KERNELS_OF_EXITS",
            "KERNELS_OF_LATTICE",
            "LOGIT_PASSES",
        )
    ]
    constants += [["usable", f"{USABLE:g}"]]
    constants += [["reached bandwidth", f"{REACHED_BANDWIDTH:g}"], ["reached flops", f"{REACHED_FLOPS:g}"]]
    return [
        "## Assumptions",
        "```\n" + cost_model.__doc__.strip() + "\n```",
        "Constants, each with a line in `dex_jax/evaluation/planner/cost_model.py` or `hardware.py`:",
        markdown(["constant", "value"], constants),
        "Devices; sources of the peaks stand beside them in `dex_jax/hardware.py`. `calibrate` "
        "replaces all of this by measured times.",
        markdown(["device", "Tflop/s", "GB/s", "GB", "us a kernel", "$/hour", "a host", "links"], devices),
        markdown(["link", "us a message", "GB/s one way"], links),
    ]


def compiled_section() -> list[str]:
    """What libtpu has said, if it was asked."""
    file = COMPILED
    if not file.is_file():
        return []
    from studies.planner.compiled import Evidence, evidence_rows, rooflines

    parts = [
        "## Compiled for TPUs",
        "Compiled ahead of time from abstract shapes in bfloat16, batch 1, no chip needed: one chip's memory, what the "
        "compiler counts for one tick or step (of a conditional all branches: rows in use, and the turns of an AR step "
        "through the stages), its collectives with the bytes of their results, and the roofline's time beside it. "
        "Exits are the model's own head. Where no kernels are given, jaxlib cannot print what libtpu has compiled, and "
        "collectives are those that the program was written with.",
    ]
    header = [
        "program",
        "chips",
        "GB",
        "+ temporary",
        "fits",
        "GFLOP",
        "GB accessed",
        "kernels",
        "roofline ms",
        "collectives",
    ]
    kept = json.loads(file.read_text())
    for model, topology, explorers in TO_COMPILE:
        name = f"{model} on {topology}"
        if name not in kept:
            continue
        predicted = rooflines(SHAPES[model], topology.split(":")[0], explorers, context=CONTEXT)
        evidence = [
            Evidence(**(each | {"predicted_seconds": seconds, "predicted_bytes": size}))
            for each, (seconds, size) in zip(kept[name], predicted, strict=True)
        ]
        parts += [f"### {name}", markdown(header, evidence_rows(evidence))]
    return parts


def compile_all() -> None:
    """Compiles for TPUs and keeps what the compiler says; what is kept already is not compiled again."""
    from studies.planner.compiled import compiled_evidence

    file = COMPILED
    found = json.loads(file.read_text()) if file.is_file() else {}
    for model, topology, explorers in TO_COMPILE:
        if f"{model} on {topology}" in found:
            continue
        evidence = compiled_evidence(
            SHAPES[model],
            topology,
            explorers=explorers,
            context=CONTEXT,
            notify=lambda line: print(line, file=sys.stderr, flush=True),
        )
        found[f"{model} on {topology}"] = [dataclasses.asdict(each) for each in evidence]
        write_json(str(file), found)


INTRODUCTION = """\
# The planner: where DEX pays, in advance

```
python -m dex_jax.cli.profile --data prompts.jsonl --output profile.json --plots plots # EAD
python -m dex_jax.cli.calibrate --output here.json # this device
python -m dex_jax.cli.plan --profile profile.json --hardware here.json # which K, grid and rows
```

`profile` lets the model answer prompts and runs the texts once, teacher-forced: when each token becomes available
(EAD), the oracle's speedup, the bound that each grid's resolution allows, and the ticks of rows that never prune; with
`--real-loop` the loop itself runs. What a cap of the rows adds elsewhere was measured once. `plan` puts that into a
roofline of a tick and of every other way on the same devices, and recommends one, or not to use DEX. `--hardware` takes
a name of the table below (`h100x8`, `v5ex16,hosts=4,network=dcn`) or a file of `calibrate`, which measures row costs
with this library's own programs. Ticks, depth-side
speedup and predicted wall-clock time are three different numbers, and predictions are no measurements.

This page is written by `python -m studies.planner`."""


def page(folder: Path = RESULTS / "planner") -> str:
    """The whole page; assumed profiles go to `folder`."""
    files = write_assumptions(folder)
    parts = [INTRODUCTION, *paper(files), *recommendations(files), *costs(files)]
    return "\n\n".join([*parts, *compiled_section(), *assumptions()]) + "\n"


def main() -> int:
    """Writes results/planner.md; returns exit code 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile for TPUs too, which needs libtpu")
    args = parser.parse_args()
    if args.compile:
        compile_all()
    (ROOT / "results" / "planner.md").write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
