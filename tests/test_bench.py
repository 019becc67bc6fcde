"""The benchmark: as a command on a small model, its tasks, its file of results, and what it says of them."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import slow
from reference.small_models import LLAMA, LetterTokenizer, small_model

import dex_jax
from dex_jax.errors import DexError
from studies.bench import __main__ as bench
from studies.bench import bench as bench_runs
from studies.bench import comparison as c
from studies.bench import report, resampling
from studies.bench.results import Results, read_results, to_line
from studies.bench.runs import Run, repeated, run_of
from studies.bench.tasks import TASKS, read_task, spread

PROMPTS = "ABC\nBCDA\nQRSTUV\nZYX\nMNOPQ\nKLM\nEFGHI\nXXYYZ\n"


@pytest.fixture(scope="module")
def small():
    """A small model whose answers end where they are told to."""
    return small_model(dataclasses.replace(LLAMA, num_layers=2, eos_ids=()), tokenizer=LetterTokenizer())


def flags_for(folder: Path) -> list[str]:
    """Flags of a benchmark of a second or two a method, without its methods and its folder."""
    (folder / "letters.txt").write_text(PROMPTS, encoding="utf-8")
    flags = ["--tasks", f"prompts:{folder / 'letters.txt'}", "--prompts", "4", "--tune-prompts", "4"]
    flags += ["--max-new-tokens", "12", "--explorers", "2", "--batch", "4", "--exit-depths", "1"]
    return [*flags, "--draft-lengths", "1,2"]


@pytest.fixture
def command(small, monkeypatch, tmp_path):
    monkeypatch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
    return [*flags_for(tmp_path), "--thresholds", "0.1"]


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A whole benchmark: flags and folder."""
    folder = tmp_path_factory.mktemp("bench")
    flags = [*flags_for(folder), "--by-explorers", "1", "--output", str(folder / "out")]
    flags += ["--methods", "ar,dex,layerskip,oracle", "--timed", "ar,layerskip", "--timed-settings", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
        assert bench.main(flags) == 0
    return flags, folder / "out"


@pytest.mark.slow
def test_a_benchmark_writes_every_run_once_and_timed_methods_take_turns(made, small) -> None:
    _, folder = made
    runs = read_results(folder)
    assert len({run.key for run in runs}) == len(runs)
    counted = [run for run in runs if run.kind == "depth"]
    timed = [run for run in runs if run.kind == "wall"]
    # AR on eight prompts, two settings on four, DEX with two K, LayerSkip and the oracle on four.
    assert len(counted) == 8 + 2 * 4 + 4 * 4
    # Two settings on four tuning prompts, AR and the best on four, twice each.
    assert len(timed) == 2 * (2 * 4 + 2 * 4)
    assert all(run.seconds is None for run in counted)
    assert all(run.batch == 1 and run.seconds > 0 for run in timed)
    assert all(run.match or run.tie for run in runs if run.match is not None)
    reported = [run for run in timed if run.split == "report"]
    turns = [(run.method, run.round) for run in reported if run.prompt_id == reported[0].prompt_id]
    assert turns == [("ar", 0), ("layerskip", 0), ("layerskip", 1), ("ar", 1)]
    method = dex_jax.Dex(explorers=2, draft=False)
    whole = dex_jax.generate(small, PROMPTS.split(), method=method, exits="shared", max_new_tokens=12)
    for run in counted:
        if run.name == "dex explorers=2":
            row = whole.tokens[int(run.prompt_id)], whole.stats.ticks[int(run.prompt_id)]
            assert (run.tokens, run.ticks) == (row[0].tolist(), int(row[1]))
            assert run.layer_steps == run.ticks * 2 // run.setting["explorers"]


@pytest.mark.slow
def test_the_report_is_made_again_from_the_lines(made, tmp_path, capsys) -> None:
    _, folder = made
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("results.jsonl", "study.json"):
        shutil.copy(folder / name, copy / name)
    assert report.main([str(copy)]) == 0
    again = (copy / "summary.md").read_text(encoding="utf-8")
    assert again == (folder / "summary.md").read_text(encoding="utf-8")
    for name in ("speedup_depth", "speedup_wall", "work", "speedup_by_k", "ead"):
        assert (copy / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert (folder / f"{name}.png").exists()
    # One figure by hand: the median over prompts of AR's layer steps over DEX's.
    runs = [run for run in read_results(folder) if run.kind == "depth" and run.split == "report"]
    steps = {(run.name, run.prompt_id): run.layer_steps / (run.new_tokens - 1) for run in runs}
    by_hand = np.median([steps["ar", p] / steps["dex explorers=2", p] for n, p in steps if n == "ar"])
    row = next(line for line in again.splitlines() if line.startswith("| dex explorers=2 "))
    assert f" {by_hand:.2f} [" in row


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_another_is_refused(made, small, monkeypatch, capsys) -> None:
    flags, folder = made
    monkeypatch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
    file = folder / "results.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")[:-1]
    asked = []
    generate = bench_runs.generate

    def counted(lm, prompts, **options):
        asked.append(len(prompts))
        return generate(lm, prompts, **options)

    monkeypatch.setattr(bench_runs, "generate", counted)
    assert bench.main(flags) == 0
    assert asked == []
    assert file.read_bytes() == whole
    file.write_bytes(b"\n".join(lines[:-2]) + b"\n" + lines[-2][:40])
    assert bench.main(flags) == 0
    assert len(asked) == 2
    assert [run.key for run in read_results(folder)] == [Run(**json.loads(line)).key for line in lines]
    file.write_bytes(whole)
    assert bench.main([*flags, "--max-new-tokens", "9"]) == 2
    assert "max_new_tokens was 12, now 9" in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_tokens_fail_the_run(command, small, monkeypatch, tmp_path, capsys) -> None:
    generate = bench_runs.generate

    def wrong(lm, prompts, **options):
        out = generate(lm, prompts, **options)
        if isinstance(options["method"], dex_jax.Dex):
            tokens = out.tokens.copy()
            # The least likely token of all is no tie.
            prefix = [*out.prompt_tokens[0], *tokens[0, :3].tolist()]
            tokens[0, 3] = int(np.argmin(np.asarray(small.logits([prefix])[0, -1])))
            out = dataclasses.replace(out, tokens=tokens)
        return out

    monkeypatch.setattr(bench_runs, "generate", wrong)
    output = tmp_path / "out"
    assert bench.main([*command, "--methods", "ar,dex,layerskip", "--rounds", "0", "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert "token 3 is not AR's" in captured.err
    assert "NOT LOSSLESS" in captured.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--methods", "ar,medusa"], "--methods ar,medusa is not as it should be"),
        (["--tasks", "prompts:{folder}/letters.txt,prompts:{folder}/other/letters.txt"], "two of the tasks are called"),
        (["--tasks", "boolq", "--data", "."], "unknown task 'boolq'"),
        (["--tasks", "gsm8k", "--data", "nowhere"], "there is no folder of data nowhere"),
        (["--max-new-tokens", "1"], "Expected int >= 2"),
        (["--prompts", "8"], "none left for split tune"),
        (["--exit-depths", "2"], "LayerSkip's exit must lie below the model's last layer"),
        (["--by-explorers", "3"], "explorers must be from 1 to the model's 2 layers"),
    ],
)
def test_bad_flags_are_told_in_a_sentence(flags, says, command, tmp_path, capsys) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text(PROMPTS, encoding="utf-8")
    flags = [flag.format(folder=tmp_path) for flag in flags]
    assert bench.main([*command, *flags, "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


RUN = Run(
    kind="wall",
    method="layerskip",
    task="gsm8k",
    prompt_id="17",
    model="m",
    tokens=[5, 6, 7],
    prompt_tokens=9,
    setting={"exit": 12, "draft_length": 4},
    exits=[-1, 1, 2],
    depths=[12, 30],
    seconds=0.5,
    match=False,
    first_divergence=1,
    margin=1e-6,
    tie=True,
    versions={"jax": "0.10.2"},
)


def average(drawn: np.ndarray) -> np.ndarray:
    return np.nanmean(drawn, axis=1)


def test_every_field_survives_the_file(tmp_path) -> None:
    results = Results(tmp_path, {"model": "m"})
    results.add(RUN)
    results.add(RUN)
    results.add(dataclasses.replace(RUN, round=1))
    results.close()
    assert read_results(tmp_path) == [RUN, dataclasses.replace(RUN, round=1)]
    assert set(json.loads(to_line(RUN))) == {field.name for field in dataclasses.fields(Run)}
    again = Results(tmp_path, {"model": "m"})
    assert RUN.key in again.done
    assert dataclasses.replace(RUN, setting={"exit": 6, "draft_length": 4}).key not in again.done
    again.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "line 2 of .*results.jsonl is no JSON"),
        ({"task": None}, r"line 2 of .* at task"),
        ({"tokens": [1, "a"]}, r"line 2 of .* at tokens"),
        ({"kind": "speed"}, "line 2 of .* at kind .*'speed'"),
        ({"kind": "depth"}, 'line 2 of .* kind "depth" has no seconds'),
        ({"surprise": 1}, 'a field "surprise" that the schema does not know'),
    ],
)
def test_a_damaged_line_is_named(change, says, tmp_path) -> None:
    line = change if isinstance(change, str) else json.dumps(dataclasses.asdict(RUN) | change)
    (tmp_path / "results.jsonl").write_text(f"{to_line(RUN)}\n{line}\n", encoding="utf-8")
    with pytest.raises(DexError, match=says):
        read_results(tmp_path)


def test_kinds_are_not_mixed() -> None:
    counted = dataclasses.replace(RUN, kind="depth", seconds=None, layer_steps=60, work=90)
    assert (counted.cost("depth"), counted.cost("work"), counted.cost("wall")) == (60, 90, None)
    both = dex_jax.generate(small_model(), [[1], [2]], method=dex_jax.AR(), max_new_tokens=2)
    with pytest.raises(DexError, match="time them one at a time"):
        run_of(both, 0, kind="wall")


@pytest.mark.parametrize(
    "method",
    [
        dex_jax.AR(),
        slow(dex_jax.LayerSkip(exit=1, draft_length=3)),
        slow(dex_jax.Dex(explorers=2, draft=False)),
        slow(dex_jax.Dex(explorers=1)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_work_is_at_least_that_of_ar(method) -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2, eos_ids=()))
    layers = lm.config.num_layers
    out = dex_jax.generate(lm, [[3, 1, 4], [1, 5]], method=method, max_new_tokens=10, exits="shared")
    about = {"method": "m", "task": "t", "prompt_id": "1", "model": "random"}
    for row in range(2):
        run = run_of(out, row, kind="depth", **about)
        assert run.tokens == out.tokens[row].tolist()
        assert run.work >= layers * 9
        if isinstance(method, dex_jax.AR):
            assert run.work == run.layer_steps == layers * 9
        if isinstance(method, dex_jax.LayerSkip):
            # Every round runs its drafts and its root through all layers.
            assert run.work == layers * (run.drafted + run.rounds)
            assert run.accepted + run.rounds == 9


def test_repeated_grams() -> None:
    assert repeated([1, 2, 3]) is None
    assert repeated([1, 2, 3, 4]) == 0
    assert repeated([7] * 13) == 0.9


def test_simultaneous_intervals_are_wider_and_hold_together() -> None:
    random = np.random.default_rng(3)
    together = 0
    for seed in range(100):
        values = random.normal(0, 1, (40, 6))
        found = resampling.simultaneous(values, average, resamples=400, seed=seed)
        together += all(each.low <= 0 <= each.high for each in found)
    alone = resampling.bootstrap(values[:, 0], average)
    assert found[0].high - found[0].low > alone.high - alone.low
    assert together >= 86
    assert resampling.simultaneous(np.ones((5, 2)))[0] == (1, 1, 1, 5)


PLAIN = Run("depth", "ar", "a", "0", "m", [1] * 11, 3, layer_steps=300, dtype="float32")


def runs(method: str, steps: list[int], task: str = "a", **fields) -> list[Run]:
    """One run a prompt, with so many layer steps."""
    return [
        dataclasses.replace(PLAIN, method=method, task=task, prompt_id=str(i), layer_steps=each, **fields)
        for i, each in enumerate(steps)
    ]


def test_a_speedup_is_the_median_of_ratios_on_one_prompt() -> None:
    table = c.costs([*runs("ar", [300, 300, 300]), *runs("del", [100, 200, 300, 50])], "depth")
    found = c.speedup(table, "ar", "del")
    assert (found.value, found.items) == (1.5, 3)
    assert c.speedup(table, "ar", "layerskip") is None
    assert c.speedup(table, "ar", "del", "b") is None
    assert c.tasks_of(table) == ["a"]
    # Neither tuning runs nor answers of one token are part of it.
    assert c.costs([*runs("ar", [0], tokens=[1]), *runs("ar", [300], split="tune")], "depth") == {}
    both = c.costs([*runs("ar", [300]), *runs("ar", [300], "b")], "depth")
    assert c.tasks_of(both) == ["a", "b", "all"]


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        ({"match": True}, 0),
        ({"match": False, "first_divergence": 4, "margin": 0.2, "tie": False}, 4),
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True, "dtype": "bfloat16"}, 0),
        # All four prompts part by rounding alone: in float32 that is no rounding.
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}, 1),
    ],
)
def test_what_fails_a_benchmark(fields, sentences) -> None:
    assert len(c.mismatches(runs("dex", [1, 1, 1, 1], **fields))) == sentences


def test_one_prompt_may_part_by_rounding() -> None:
    parted = {"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}
    made = [*runs("dex", [1], **parted), *runs("del", [1], **parted), *runs("dex", [1] * 20, "b", match=True)]
    assert c.mismatches(made) == []
    assert c.lossless(run for run in made if run.method == "dex") == (21, 20, 1, 0, 4, 1e-6)
    assert c.lossless(runs("ar", [1])) is None


ROWS = {
    "gsm8k": {"question": "2 + 2?", "answer": "#### 4"},
    "humaneval": {"task_id": "HumanEval/9", "prompt": "def f():"},
    "spec_bench": {"question_id": 7, "turns": ["first", "second"]},
    "mt_bench": {"question_id": 81, "prompt": ["first", "second"]},
    "xsum": {"id": "x1", "document": "A long article.", "summary": "Short."},
    "hellaswag": {"ind": 4, "activity_label": "Tea", "ctx": "She pours", "endings": ["tea.", "sand."], "label": 0},
    "mmlu": {"subject": "law", "idx": 3, "question": "Which?", "choices": ["this", "that"], "answer": 1},
}
EXPLAIN = "\n\nName the letter and explain your choice."
ASKED = {
    "gsm8k": ("0", "2 + 2?"),
    "humaneval": ("HumanEval/9", "def f():"),
    "spec_bench": ("7", "first"),
    "mt_bench": ("81", "first"),
    "xsum": ("x1", "Summarise this article in a few sentences.\n\nA long article."),
    "hellaswag": ("4", f"She pours\n\nHow does this go on?\nA. tea.\nB. sand.{EXPLAIN}"),
    "mmlu": ("0", f"Which?\n\nWhich answer is right?\nA. this\nB. that{EXPLAIN}"),
}


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_a_file_becomes_a_prompt(task, tmp_path) -> None:
    write(tmp_path, f"{task}/rows.jsonl.gz", json.dumps(ROWS[task]) + "\n")
    (asked,) = read_task(task, tmp_path)
    assert (asked.task, asked.id, asked.prompt) == (task, *ASKED[task])


@pytest.mark.parametrize("task", [task for task, about in TASKS.items() if about.hub is not None])
def test_a_row_of_the_hub_becomes_the_same_prompt(task, monkeypatch) -> None:
    loaded = []

    def load_dataset(name, config, split):
        loaded.append((name, config, split))
        return [ROWS[task]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (asked,) = read_task(task, None)
    assert (asked.id, asked.prompt) == ASKED[task]
    assert loaded == [TASKS[task].hub]


def test_what_the_hub_cannot_give_is_told(monkeypatch) -> None:
    with pytest.raises(DexError, match="spec_bench is not on the hub in one known form: give --data"):
        read_task("spec_bench", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DexError, match=r"needs the package datasets: pip install datasets"):
        read_task("gsm8k", None)

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DexError, match=r"datasets cannot load openai/gsm8k .*no network; give a file"):
        read_task("gsm8k", None)


@pytest.mark.parametrize(
    ("task", "lines", "says"),
    [
        ("gsm8k", '{"question": "a"}\n{"answer": "4"}\n', 'line 2 of .*rows.jsonl has no text "question"'),
        ("gsm8k", '{"question": "a"}\n\n{"question": \n', "line 3 of .*rows.jsonl is no JSON"),
        ("gsm8k", "", "rows.jsonl is empty"),
        ("humaneval", '{"task_id": "a", "prompt": "x"}\n' * 2, "line 2 of .*: another item has the same id, a"),
        ("spec_bench", '{"question_id": 1, "turns": []}\n', 'line 1 of .* has no "turns"'),
        ("mmlu", '{"subject": "a", "question": "b", "choices": ["c"], "answer": 0}\n', 'line 1 of .*"choices"'),
    ],
)
def test_damaged_files_are_told_by_line(task, lines, says, tmp_path) -> None:
    write(tmp_path, f"{task}/rows.jsonl", lines)
    with pytest.raises(DexError, match=says):
        read_task(task, tmp_path)


def test_any_file_of_prompts_is_a_task(tmp_path) -> None:
    file = write(tmp_path, "mine.txt", "One?\n\nTwo?\n")
    assert read_task(f"prompts:{file}", None) == [("mine", "0", "One?"), ("mine", "1", "Two?")]
    assert read_task("prompts", file) == read_task(f"prompts:{file}", None)
    write(tmp_path, "prompts/own.jsonl", json.dumps({"prompt": "Three?"}) + "\n")
    assert read_task("prompts", tmp_path) == [("own", "0", "Three?")]
    with pytest.raises(DexError, match="cannot be read"):
        read_task(f"prompts:{tmp_path / 'other.txt'}", None)


def test_prompts_are_evenly_spread() -> None:
    assert spread(100, 4) == [6, 31, 56, 81]
    assert spread(3, 5) == [0, 1, 2]
    assert set(spread(100, 4)).isdisjoint(spread(100, 50, taken=spread(100, 4)))
    assert spread(4, 2, taken=range(4)) == []


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path) -> None:
    results = Results(tmp_path, {})
    results.add(RUN)
    results.close()
    with results.path.open("ab") as file:
        file.write(to_line(dataclasses.replace(RUN, round=1))[:50].encode())
    assert read_results(tmp_path) == [RUN]
    again = Results(tmp_path, {})
    again.add(dataclasses.replace(RUN, round=2))
    again.close()
    assert [run.round for run in read_results(tmp_path)] == [0, 2]
