"""What is written about the package: its examples run, its notebooks and addresses are as the pages say."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import json
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax.cli.common import INSTALLED
from dex_jax.language_model import outline

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINUX_ONLY = ("fcntl", "resource", "pwd", "grp", "termios")


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def test_docstring_examples() -> None:
    attempted = 0
    for found in pkgutil.walk_packages(dex_jax.__path__, "dex_jax."):
        if found.name.endswith("__main__"):
            continue
        failed, tried = doctest.testmod(importlib.import_module(found.name))
        assert failed == 0, found.name
        attempted += tried
    assert attempted >= 6


def test_examples_are_sections_that_pages_show_as_code() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("dex_jax/**/*.py")}
    assert sum("    Examples:\n" in source for source in sources.values()) >= 5
    # "Example:" is no section of the docstring style: a page shows it as a quotation, flags of doctest and all.
    assert not [str(path) for path, source in sources.items() if re.search(r"^ *Example:$", source, re.MULTILINE)]


def test_quick_start_runs(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="the quick start draws a picture")
    generate, trace = dex_jax.generate, dex_jax.trace
    tokenizer = outline("smollm2-135m").tokenizer
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2, vocab_size=49152), tokenizer=tokenizer)

    def shortened(lm, prompts, method=None, **options):
        method = method if isinstance(method, dex_jax.AR) else dex_jax.Dex(explorers=2)
        return generate(lm, prompts, method=method, **(options | {"max_new_tokens": 4}))

    monkeypatch.setattr(dex_jax, "load", lambda source: lm)
    monkeypatch.setattr(dex_jax, "generate", shortened)
    two = dex_jax.Dex(explorers=2)
    monkeypatch.setattr(dex_jax, "trace", lambda lm, prompt, **_: trace(lm, prompt, method=two, max_new_tokens=4))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in python_blocks("quickstart.md"):
        exec(compile(block, "quickstart.md", "exec"), names)
    assert "\x1b[38;5;" in capsys.readouterr().out
    assert (tmp_path / "lattice.png").read_bytes().startswith(b"\x89PNG")


def test_the_configuration_of_own_exits_is_one() -> None:
    names: dict = {}
    (block,) = python_blocks("howto_own_exits.md")
    exec(compile(block, "howto_own_exits.md", "exec"), names)
    assert names["config"].exits.depths == (7, 14, 21)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_begins_as_all_do(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    assert f"/blob/main/notebooks/{path.name})" in text[0]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip install" in code[0]
    assert "quick_check(lm)" in code[1]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    assert path.name in (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_menu() -> None:
    menu = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1])
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert sorted(menu) == sorted(pages)


def test_every_public_name_is_documented() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("docs/api_*.md")))
    documented = set(re.findall(r"^::: dex_jax\.(\w+)$", pages, re.MULTILINE))
    assert documented == set(dex_jax.__all__) - {"plot"}


def test_the_address_stands_in_one_place() -> None:
    tool = runpy.run_path(str(ROOT / "notebooks" / "address.py"))
    here = tool["repository"]()
    assert {*NOTEBOOKS, ROOT / "mkdocs.yml", ROOT / "docs" / "notebooks.md"} <= set(tool["FILES"])
    for file in tool["FILES"]:
        text = file.read_text(encoding="utf-8")
        assert tool["with_address"](text, here) == text, f"{file.name}: run python notebooks/address.py"
        moved = tool["with_address"](text, "https://github.com/someone/dex_jax")
        assert moved != text
        assert here.removeprefix("https://github.com/") not in moved


def test_versions_agree() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited is not None
    assert PROJECT["version"] == dex_jax.__version__ == cited[1]


def test_programs_are_there() -> None:
    for name, target in PROJECT["scripts"].items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
    assert {"cuda12", "cuda13", "tpu", "eval", "plot", "notebooks"} <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize(("script", "installed"), INSTALLED.items())
def test_a_program_says_how_it_was_called(script: str, installed: str, monkeypatch, capsys) -> None:
    module, function = PROJECT["scripts"][installed].split(":")
    for path, name, other in ((f"/usr/bin/{installed}", installed, script), (script, script, installed)):
        monkeypatch.setattr(sys, "argv", [path])
        with pytest.raises(SystemExit):
            getattr(importlib.import_module(module), function)(["--help"])
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {name} ")
        assert f"  {name} --" in text
        assert other not in text


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
