"""The page of the paper's claims: its figures are those of the runs, its words follow from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from studies.bench.report import summary
from studies.bench.results import to_line
from studies.bench.runs import Run
from studies.reproduction import __main__ as reproduction

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "results" / "reproduction.md"
RESULTS = ROOT / "results"


GRIDS = {2: [15, 30], 5: [6, 12, 18, 24, 30], 8: [4, 8, 12, 15, 19, 23, 27, 30]}


def study(folder: Path, costs: dict[str, int], grids: dict[int, list[int]] = GRIDS) -> Path:
    """A folder of made-up runs: name -> layer steps of 11 tokens on each of five prompts."""
    folder.mkdir()
    lines = []
    for name, steps in costs.items():
        method, _, fields = name.partition(" ")
        setting = {key: int(value) for key, value in (part.split("=") for part in fields.split())}
        for prompt in range(5):
            given = {"kind": "depth", "method": method, "setting": setting, "task": "gsm8k", "prompt_id": str(prompt)}
            given |= {"model": "m", "tokens": [1] * 11, "prompt_tokens": 3, "layer_steps": steps}
            lines.append(to_line(Run(**given, depths=grids[setting["explorers"]] if method == "dex" else None)))
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    about = {"model": "some/small-model", "exits": "default", "explorers": 5, "tasks": ["gsm8k"], "prompts": 5}
    (folder / "study.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def test_claims_stand_beside_measured_figures(tmp_path) -> None:
    costs = {"ar": 300, "dex explorers=5": 150, "dex explorers=2": 200, "dex explorers=8": 140, "del": 165}
    folder = study(tmp_path / "a", costs | {"layerskip exit=6 draft_length=2": 210, "dex_no_decs explorers=5": 160})
    out = tmp_path / "page.md"
    assert reproduction.main([str(folder), "--output", str(out)]) == 0
    text = " ".join(out.read_text(encoding="utf-8").split())  # without what aligns tables
    assert "| DEX over LayerSkip at its best setting | 1.3 to 1.6 | 1.40 [1.40, 1.40] |" in text
    assert "against layerskip draft_length=2 exit=6): as claimed: 1.40" in text
    assert "| DEX over DEL | 1.2 to 1.5 | 1.10 [1.10, 1.10] |" in text
    assert "below the claim: 1.10" in text
    assert "| DEX over AdaDecode | 1.2 to 1.5 | not measured |" in text
    assert "K = 2: 1.50, K = 5: 2.00, K = 8: 2.14" in text
    assert "as claimed, over K = 2, 5, 8" in text


def test_the_committed_pages_are_those_of_the_committed_runs() -> None:
    folders = [RESULTS / name for name in ("bench", "bench_layerskip")]
    studies = [(reproduction.read_results(folder), reproduction.read_study(folder)) for folder in folders]
    assert PAGE.read_text(encoding="utf-8") == reproduction.page(studies)
    for folder in (*folders, RESULTS / "bench_xeon"):
        runs, about = reproduction.read_results(folder), reproduction.read_study(folder)
        assert (folder / "summary.md").read_text(encoding="utf-8").startswith(summary(runs, about).rstrip())


def test_the_readme_says_what_the_committed_runs_say() -> None:
    rivals = (ROOT / "README.md").read_text(encoding="utf-8").split("## Rivals")[1].split("\n## ")[0]
    table = re.findall(r"^\|.*\|$", rivals, re.MULTILINE)
    told = re.findall(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", "\n".join(table))
    summary_page = (RESULTS / "bench" / "summary.md").read_text(encoding="utf-8")
    assert len(told) >= 7
    assert [figure for figure in told if f"{figure} |" not in summary_page] == []
