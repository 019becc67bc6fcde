"""Test what is written about the package: its examples run, its notebooks and addresses are as the pages say."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import json
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import slow
from reference.small_models import LLAMA, small_model

import dex_jax
import studies
from dex_jax.language_model import outline

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROGRAMS = {
    "decode.py": "dex_jax.cli.decode",
    "dex-decode": "dex_jax.cli.decode",
    "train_exits.py": "dex_jax.cli.train",
}
HOMES = (dex_jax, studies)
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 7}
LINUX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios")


def run_page(page: str) -> dict:
    """Run the blocks of Python on a page one after the other, and return the names that they leave."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def test_docstring_examples() -> None:
    attempted = 0
    for found in (found for home in HOMES for found in pkgutil.walk_packages(home.__path__, f"{home.__name__}.")):
        if found.name.endswith("__main__"):
            continue
        failed, tried = doctest.testmod(importlib.import_module(found.name))
        assert failed == 0, found.name
        attempted += tried
    assert attempted >= 6


@pytest.mark.parametrize("page", ["README.md", slow("docs/index.md")])
def test_the_library_examples_run(page, monkeypatch, capsys, tmp_path) -> None:
    """They run with a small model, four tokens and two explorers, always sampled, so that they share one program."""
    pytest.importorskip("matplotlib", reason="a page draws a picture")
    generate, trace, two = dex_jax.generate, dex_jax.trace, dex_jax.Dex(explorers=2, draft=False)
    tokenizer = outline("smollm2-135m").tokenizer
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2, vocab_size=49152), tokenizer=tokenizer)

    def shortened(lm, prompts, method=None, **options):
        method = method if isinstance(method, dex_jax.AR) else two
        return generate(lm, prompts, method=method, **(SAMPLED | options | {"max_new_tokens": 4}))

    monkeypatch.setattr(dex_jax, "load", lambda source: lm)
    monkeypatch.setattr(dex_jax, "generate", shortened)
    monkeypatch.setattr(dex_jax, "trace", lambda lm, prompt, **_: trace(lm, prompt, method=two, max_new_tokens=4))
    monkeypatch.chdir(tmp_path)
    run_page(page)
    shown = capsys.readouterr().out
    assert shown.count("\n") >= 2
    if page != "README.md":
        assert "\x1b[38;5;" in shown
        assert (tmp_path / "lattice.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_loop_with_a_model_of_ones_own_runs() -> None:
    page = SimpleNamespace(**run_page("docs/howto_own_model.md"))
    tokens = page.done.record.tokens[0].tolist()
    assert tokens == page.said[page.length :]
    assert len(tokens) == page.NEW == 20
    assert len(set(tokens)) > 1
    assert 0 < int(page.done.record.ticks[0]) < len(page.DEPTHS) * (page.NEW - 1)


def test_the_configuration_of_own_exits_is_one() -> None:
    assert run_page("docs/howto_own_exits.md")["config"].exits.depths == (7, 14, 21)


def programs() -> dict[str, dict[str, set[str]]]:
    """Collect the commands in README's and pages' blocks of code: program -> flags -> the files that give them."""
    called: dict[str, dict[str, set[str]]] = {}
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")):
        blocks = re.findall(r"^```(\w*)\n(.*?)^```$", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for block in (text for language, text in blocks if language in ("", "bash")):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split(" #")[0].split()
                at = next(
                    (i for i, w in enumerate(words) if w in PROGRAMS or w == "-m" or w[:11] == "benchmarks/"), None
                )
                if at is None or "pytest" in words:
                    continue
                name = words[at + 1] if words[at] == "-m" else PROGRAMS.get(words[at], words[at])
                if name == PROGRAMS["train_exits.py"] and words[at + 1] in ("export", "evaluate"):
                    name += f" {words[at + 1]}"
                flags = called.setdefault(name, {})
                for word in words[at + 1 :]:
                    if word.startswith("--"):
                        flags.setdefault(word, set()).add(file.name)
    return called


COMMANDS = programs()
assert {"dex_jax.cli.decode", "dex_jax.cli.train evaluate", "benchmarks.methods_table"} <= COMMANDS.keys(), "on pages"


@pytest.mark.parametrize(
    ("program", "flags"), sorted(COMMANDS.items()), ids=[name.replace(" ", "-") for name in sorted(COMMANDS)]
)
def test_commands_on_pages_have_the_flags_they_give(
    program: str, flags: dict[str, set[str]], capsys, monkeypatch
) -> None:
    name, *command = program.split()
    if name.startswith("benchmarks/"):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        module = importlib.import_module(name)
        if not hasattr(module, "main"):
            module = importlib.import_module(PROGRAMS.get(name, f"{name}.__main__"))
        with pytest.raises(SystemExit):
            module.main([*command, "--help"])
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    assert {flag: files for flag, files in flags.items() if flag not in known} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_as_all_do(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    assert "upload this notebook" in text[0]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "%pip install" in "".join(code[0]["source"])
    assert path.name in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert any(cell["outputs"] for cell in code), "run it: CONTRIBUTING.md says how"


@pytest.mark.parametrize("source", ["", "git+https://example.org/dex_jax"])
@pytest.mark.parametrize("wheel", [None, "dex_jax-0.1.0-py3-none-any.whl"])
def test_a_notebook_installs_what_is_named_or_uploaded_or_says_so(wheel, source, tmp_path, monkeypatch) -> None:
    code = next(cell for cell in json.loads(NOTEBOOKS[0].read_text())["cells"] if cell["cell_type"] == "code")
    called: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if wheel is not None:
        (tmp_path / wheel).touch()
    text = re.sub(r"%(pip .*)", r"called.append(f'\1')", "".join(code["source"])).replace(
        'SOURCE = ""', f"SOURCE = {source!r}"
    )
    with pytest.raises(RuntimeError, match="could not be installed" if source or wheel else "upload the wheel"):
        exec(text, {"called": called})
    wanted = f"dex-jax[plot] @ {source}" if source else f"{wheel}[plot]" if wheel else None
    assert wanted is None or wanted in called[0]


def test_the_menu_is_short_and_has_every_page() -> None:
    menu = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(menu) == sorted(pages)
    assert len(menu) <= 13


def test_what_pages_link_to_is_there() -> None:
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", file.read_text(encoding="utf-8")):
            assert "://" in target or (file.parent / target).exists(), f"{file.name} links to {target}"


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^::: dex_jax\.(\w+)$", page, re.MULTILINE))
    assert documented == set(dex_jax.__all__) - {"plot"}
    for name in dex_jax.__all__:
        documentation = getattr(dex_jax, name).__doc__
        assert documentation, name
        assert not documentation.startswith(f"{name}("), f"{name} has a generated docstring"


def test_versions_agree() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert PROJECT["version"] == dex_jax.__version__ == cited[1]


@pytest.mark.slow
def test_nothing_needs_linux() -> None:
    names = [found.name for found in pkgutil.walk_packages(dex_jax.__path__, "dex_jax.")]
    code = f"""
import ctypes, importlib, os, sys
import flax.nnx, gguf, huggingface_hub, jax, jinja2, numpy, optax, orbax.checkpoint, rich, safetensors, tokenizers

def no_handle(*_):
    raise TypeError("as on Windows")

ctypes.CDLL = no_handle
for name in {LINUX_ONLY!r}:
    sys.modules[name] = None
for name in ("sysconf", "sched_getaffinity", "fork", "getuid"):
    if hasattr(os, name):
        delattr(os, name)
for name in {names!r}:
    importlib.import_module(name)
from dex_jax.host_memory import return_free_memory
return_free_memory()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_it_is_short_and_begins_with_what_a_reader_needs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 140
    first = "\n".join(lines[:60])
    needed = ("](docs/figures/", "pip install uv", "uv run decode.py --prompt", "uv run pytest", "```python", "tok/s")
    assert [words for words in needed if words not in first] == []
    title = "Depth Exploration for LLM Decoding"
    assert title in text.replace("\n", " ")
    assert title in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
