"""Writes docs/serial.md from the tables in docs/serial/, which the benchmarks of serial rounds write.

    python benchmarks/serial_page.py

A section whose table is not there is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA = "--data HumanEval.jsonl.gz --data question_240.jsonl"

INTRO = """\
# Serial rounds and auto

Wall-clock time of decoding on one device, prefill and compilation apart. All methods of a table took turns on the same
prompts in one process; ratios are medians over prompts. "serial" is `schedule="serial"`: the drafter's first tree, all
of its rows in every round. "auto" is the default, which here chose rounds that run as many rows of a larger tree as are
worth their time. Prompts are spread evenly over HumanEval and over Spec-Bench's questions, maths and retrieval rows
(question_240). Ratios move with the machine: a step of one row waits for memory, which other guests of a shared machine
use too, and further rows for arithmetic. Tables that do not say "products of few rows in C++" are from before there
were any. Unless a section says otherwise, times are of two cores of an AMD EPYC with AVX-512 that nobody else seemed
to use.

This page is written by `python benchmarks/serial_page.py`."""


class Section(NamedTuple):
    """A table and what stands around it.

    Attributes:
      title: its heading.
      file: docs/serial/FILE.md and .json.
      words: what it shows.
      command: that made it.
    """

    title: str
    file: str
    words: str
    command: str


SECTIONS = (
    Section(
        "One sequence, greedy",
        "greedy",
        "128 new tokens. transformers is asked once a prompt. An AR step took 14.2 ms (quartiles 14.1 to 14.6).",
        f"serial.py {DATA} --prompts 10 --rounds 2 --transformers-python ... --output docs/serial/greedy",
    ),
    Section(
        "The same beside other guests",
        "greedy_zen3",
        "Two cores of a shared AMD EPYC (Zen 3), and the drafter that shipped before, which had an attention layer. An "
        "AR step took 28 ms in this run (quartiles 27 to 29). Before products and attention in C++ auto was at 1.28 "
        "and serial at 1.36, with steps of 22 ms; then at 1.42 and 1.34, before a step computed its sines once, each "
        "core packed its own rows, and the drafter's weights were bfloat16.",
        f"serial.py {DATA} --prompts 10 --rounds 2 --transformers-python ... --output docs/serial/greedy_zen3",
    ),
    Section(
        "The same on another machine",
        "greedy_xeon",
        "Two cores of an Intel Xeon (Emerald Rapids), beside other guests: 28 to 40 ms an AR step. A round of four "
        "rows should take 1.53 of them by what auto measured before.",
        f"serial.py {DATA} --prompts 10 --rounds 2 --transformers-python ... --output docs/serial/greedy_xeon",
    ),
    Section(
        "One sequence, sampled",
        "temperature_1",
        "Temperature 1, the whole vocabulary. Noise belongs to positions, so texts are AR's under the same seed.",
        f"serial.py {DATA} --prompts 5 --rounds 2 --temperature 1 --output docs/serial/temperature_1",
    ),
    Section(
        "One sequence in bfloat16",
        "bfloat16",
        "Greedy, 128 new tokens. A step reads half as much. Texts are AR's although 8 bits make many calls close: in "
        "C++ a row's sums do not depend on the rows beside it.",
        f"serial.py {DATA} --prompts 5 --rounds 2 --dtype bfloat16 --output docs/serial/bfloat16",
    ),
    Section(
        "What auto costs against the best choice",
        "auto",
        "Batches of contexts of one length, each ending with a prompt of question_240. The best is the fastest of AR, "
        "serial rounds and explorers side by side in the same run. Where auto chose AR, what it differs from AR by is "
        "the noise of the machine. Contexts of 2,000 tokens are of one batch each (`--lengths 2000 --texts 1`), but "
        "those of four sequences of three (`--batches 4 --texts 3`; of one, auto took 1.11 times as long as serial "
        "rounds): there rounds do better than auto expects.",
        "auto.py --data question_240.jsonl --explorers 5 --texts 3 --rounds 2 --lengths 64 400 --max-new-tokens 48 "
        "--output docs/serial/auto",
    ),
    Section(
        "What the parts of a round bring",
        "ablation",
        "One sequence, greedy, 96 new tokens; each row changes one thing of the drafter's tree, or of the rounds that "
        "choose. With further rows in C++ a second row a level neither costs nor brings much in time; the lookup and "
        "the drafter each bring more beside the other than alone; rounds that choose rows gain by choosing levels "
        "too.",
        f"serial_ablation.py {DATA} --prompts 3 --rounds 2 --output docs/serial/ablation",
    ),
    Section(
        "What the parts of the drafter bring",
        "drafter_kinds",
        "Agreement with the final layer, each trained on the same small amount; with one drafted token a round emits "
        "one more token than the agreement says. The position before brings most. An attention layer costs agreement, "
        "trained ahead too: 0.206 instead of 0.239 (at 16b1097, the last commit where drafters could have one).",
        f"drafter_kinds.py --folder runs/drafter_kinds {DATA} --output docs/serial/drafter_kinds",
    ),
    Section(
        "What an attention layer brings after a long training",
        "drafters",
        "Nothing that can be told from noise, so drafters have none since. The first drafter has one (at 16b1097, with "
        "its configs/smollm2_135m_drafter_attn.py, four draft steps), the second none and as many row-steps, 819,200 "
        "(three draft steps), the third, which ships, 358,400 more on five (configs/smollm2_135m_drafter.py). They "
        "agree with the final layer's token in 0.379, 0.399 and 0.418 of 20 prompts of each file (`python "
        "train_exits.py evaluate --prompts 20`); their best trees of 4, 8 and 16 rows emit 1.92, 2.32 and 2.81 tokens "
        "a round, 1.95, 2.39 and 2.74, and 1.97, 2.46 and 2.82 on the prompts that `python train_exits.py tree "
        "--prompts 7 --max-new-tokens 64 --steps 2` searches on. Here is what rounds that choose make of them, 96 new "
        "tokens, all with the same measured costs of rows. (ATTENTION, TWO and THREE are what `tree` wrote; the first "
        "two are what shipped before and `git show "
        "d6a257d:dex_jax/default_exits/268a3187a3ebf69e.drafter.safetensors`; the command takes "
        "a drafter with attention up to 16b1097.)",
        'drafters.py --exits "attention=ATTENTION" "none, two runs=TWO" "none, three runs=THREE" '
        f"{DATA} --prompts 10 --output docs/serial/drafters",
    ),
    Section(
        "Overruling and re-drafting by deeper exits",
        "second_opinions",
        "Not in the code: a deeper exit's own token can only enter a round as a new row that runs x layers alone. That "
        "pays if it is right in more than x / L of the cases where no drafted token is.",
        f"second_opinions.py {DATA} --output docs/serial/second_opinions",
    ),
    Section(
        "The small model of the LayerSkip recipe",
        "layerskip",
        "8 layers, 1.8 million parameters, trained on tiny Shakespeare ([The LayerSkip recipe](layerskip.md)), 96 new "
        "tokens after held-out text; drafts come from the text alone. A step takes 0.11 to 0.18 milliseconds, a round "
        "more than twice that: rounds lose, and auto runs AR, so that all it differs from AR by is noise. Prompts: "
        "`tail -c 100000 input.txt | tr '\\n' ' ' | fold -w 96 | awk 'NR % 100 == 1' > prompts.txt`.",
        "serial.py --model runs/layerskip/model --exits shared --data prompts.txt --prompts 10 --rounds 2 "
        "--max-new-tokens 96 --output docs/serial/layerskip",
    ),
)


def section(found: Section, folder: Path) -> list[str]:
    """Its parts in markdown, none without a table."""
    file = folder / f"{found.file}.md"
    if not file.is_file():
        return []
    about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    versions = about.get("versions", {}) | {key: about[key] for key in ("jax",) if key in about}
    named = [f"{name} {versions[name]}" for name in ("jax", "torch", "transformers") if name in versions]
    products = [f"products of few rows in {about['few_rows']}"] if "few_rows" in about else []
    where = ", ".join([*filter(None, [about.get("device")]), *named, *products])
    parts = [f"## {found.title}", found.words, file.read_text(encoding="utf-8").strip()]
    return [*parts, f"`python benchmarks/{found.command}`" + (f" ({where})" if where else "")]


def page(folder: Path) -> str:
    """The whole page."""
    return "\n\n".join([INTRO, *(part for each in SECTIONS for part in section(each, folder))]) + "\n"


def main() -> int:
    (DOCS / "serial.md").write_text(page(DOCS / "serial"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
