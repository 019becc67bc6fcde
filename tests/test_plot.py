"""Pictures: their content, read back from the figure, and one sentence for bad input."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
from reference.small_models import small_model

import dex_jax
from dex_jax import DexError, plot
from dex_jax.language_model import outline
from dex_jax.plot.colors import darker, depth_hex


@pytest.fixture(scope="module")
def lm():
    return small_model()


@pytest.fixture(scope="module")
def out(lm):
    method = dex_jax.Dex(explorers=4, draft=False)
    return dex_jax.generate(lm, [[1, 2, 3], [4, 5]], method=method, exits="shared", max_new_tokens=12)


@pytest.fixture(scope="module")
def trace(lm):
    return dex_jax.trace(lm, [1, 2, 3], method=dex_jax.Dex(explorers=4, draft=False), exits="shared", max_new_tokens=12)


def test_pieces_are_the_text(out) -> None:
    tokenizer = outline("smollm2-135m").tokenizer
    text = " Tea 茶 or café: naïve?\n\nYes."
    ids = tokenizer.encode(text)
    said = dataclasses.replace(
        out, tokens=np.array([[*ids, tokenizer.eos_ids[0]]]), lengths=np.array([len(ids) + 1]), tokenizer=tokenizer
    )
    pieces = said.pieces(0)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert len(pieces) == len(ids) + 1
    # A character of several tokens comes with its last one.
    assert "" in pieces[:-1]


def test_depth_text_holds_every_token_in_its_colour(out) -> None:
    text = plot.depth_text(out)
    page = text._repr_html_()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(text)).splitlines()
    assert len(plain) == 3
    for row in range(2):
        ids = out.tokens[row, : out.lengths[row]].tolist()
        assert plain[row].split() == [str(i) for i in ids]
    assert plain[-1].split("  ")[:2] == ["exit 1 (depth 1)", "exit 2 (depth 2)"]
    for number, depth in enumerate(out.stats.plan.depths[:-1], 1):
        given = int((out.stats.exits == number).sum())
        # There is one more in the legend.
        assert page.count(f'title="exit {number} (depth {depth})"') == given + 1
        assert page.count(f"background:{depth_hex(number, 4)}66") == given + 1


def test_text_is_escaped(out) -> None:
    shown = dataclasses.replace(out, tokenizer=None)
    object.__setattr__(shown, "pieces", lambda row: ["<b>&"] * int(out.lengths[row]))
    text = plot.depth_text(shown)
    for page in (text.html, text.svg("ABC")):
        assert "<b>" not in page
        assert "&lt;b&gt;&amp;" in page
    assert "ABC" in text.svg("ABC")


def words(axes, at: int) -> list:
    """Return the words of the picture, at its foot (0) or at the last depth."""
    return sorted((text for text in axes.texts if text.xy[1] == at), key=lambda text: text.xy[0])


def test_lattice_draws_every_node_and_commit(trace) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    figure = plot.lattice(trace, ticks=(0, trace.ticks))
    (climb,) = figure.axes
    assert len(climb.lines) >= len(trace.nodes)
    emitted = words(climb, trace.depths[-1])
    assert [text.get_text() for text in emitted] == [str(token) for token in trace.tokens[1:]]
    assert [text.xy[0] for text in emitted][:-1] == [node.rooted for node in trace.roots[1:]]
    colors = {node.rooted: darker(depth_hex(node.born_at, 4)) for node in trace.roots[1:]}
    assert [text.get_color() for text in emitted][:-1] == [*colors.values()]
    assert len(set(colors.values())) > 1
    feet = {text.xy[0]: (text.get_text(), text.get_color()) for text in words(climb, 0)}
    begun = [node for node in trace.roots if node.born in feet and node.born > 0]
    assert all(feet[node.born] == (str(node.token), darker(depth_hex(node.born_at, 4))) for node in begun)
    assert figure._repr_png_().startswith(b"\x89PNG"), "what notebooks show"
    legend = figure.legends[0].get_window_extent()
    assert not any(legend.overlaps(text.get_window_extent()) for text in climb.texts)
    part = plot.lattice(trace, ticks=(2, 7)).axes[0]
    assert len(words(part, trace.depths[-1])) == sum(2 < node.rooted <= 7 for node in trace.roots)


def test_without_matplotlib_a_sentence_says_what_to_install(trace, monkeypatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DexError, match=r"pip install matplotlib"):
        plot.lattice(trace)


def data_of(page: str) -> dict:
    """Return the data that a page plays."""
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_player_holds_the_decode_and_asks_for_nothing_else(trace) -> None:
    page = plot.player(trace).page
    data = data_of(page)
    assert "".join(data["pieces"]) == "".join(f"{token} " for token in trace.tokens)
    assert data["exits"] == list(trace.exits)
    assert data["committed"] == sorted(data["committed"])
    assert [len(data["committed"]), data["committed"][0], data["committed"][-1]] == [len(trace.tokens), 0, trace.ticks]
    assert (len(data["nodes"]), len(data["colors"])) == (len(trace.nodes), trace.stages + 1)
    assert not re.search(r"https?:|src=|@import", page)
    assert 0 < min(node.probability for node in trace.nodes) < 1


def test_a_player_shows_text_that_looks_like_a_page(trace, tmp_path) -> None:
    shown = dataclasses.replace(trace, pieces=("</script><b>", *trace.pieces[1:]))
    player = plot.player(shown)
    player.save(tmp_path / "decode.html")
    assert data_of((tmp_path / "decode.html").read_text(encoding="utf-8"))["pieces"][0] == "</script><b>"
    assert player._repr_html_().count("<script") == 0
    with pytest.raises(DexError, match="nothing to play"):
        plot.player(dataclasses.replace(trace, nodes=()))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_player_plays_in_a_browser(trace, tmp_path, width: int, scheme: str) -> None:
    """The test needs the package playwright and a Chromium that is installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playing a page needs playwright")
    if (chromium := shutil.which("chromium") or shutil.which("google-chrome")) is None:
        pytest.skip("playing a page needs Chromium")
    plot.player(trace).save(tmp_path / "decode.html")
    with api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "decode.html").as_uri())
        assert page.inner_text("#text").split() == [str(trace.tokens[0])]
        page.keyboard.press("ArrowRight")
        assert f"tick 1 of {trace.ticks}" in page.inner_text("#counters")
        page.keyboard.press("ArrowLeft")
        page.select_option("#speed", "30")
        page.click("#play")
        page.wait_for_function(f"now === {trace.ticks} && !playing")
        assert page.inner_text("#text").split() == [str(token) for token in trace.tokens]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert errors == []
        browser.close()
