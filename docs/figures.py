"""The program that draws the figures of the documentation: `python docs/figures.py` writes docs/figures/."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import dex_jax
from dex_jax.plot.colors import darker, depth_hex

FOLDER = Path(__file__).parent / "figures"
PROMPT = "Why is the sky blue?"
WIDTH = 1600
"""Width of a picture, in pixels."""

INK, FAINT = "#22262e", "#a9b0bb"
LEGEND: dict[str, Any] = {"ha": "center", "size": 8, "color": INK}


def main() -> None:
    """Write lattice.png, tick.png, tree.png, depth_text.svg, and player.png with playwright and a Chromium."""
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    method = dex_jax.Dex(explorers=5, draft=False)
    trace = dex_jax.trace(lm, PROMPT, method=method, max_new_tokens=64)
    FOLDER.mkdir(exist_ok=True)
    save(dex_jax.plot.lattice(trace, (0, 22)), "lattice.png")
    save(draw_tick(trace), "tick.png")
    drafted = dex_jax.trace(lm, PROMPT, method=dex_jax.Dex(explorers=1, rows=12), max_new_tokens=24)
    save(draw_tree(drafted), "tree.png")
    draw_frame(dex_jax.plot.player(trace).page)
    out = dex_jax.generate(lm, PROMPT, method=method, max_new_tokens=96)
    (FOLDER / "depth_text.svg").write_text(dex_jax.plot.depth_text(out).svg(PROMPT), encoding="utf-8")


def save(figure: Figure, name: str) -> None:
    """Write a figure WIDTH pixels wide, and without the version of matplotlib in it."""
    figure.savefig(FOLDER / name, dpi=WIDTH / figure.get_figwidth(), metadata={"Software": None})


def blank(width: float, height: float) -> tuple[Figure, Any]:
    """Return a white Figure of so many inches, and invisible axes with inches as their units."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = INK) -> None:
    """Draw an arrow between two points."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0})


def draw_tick(trace: dex_jax.Trace) -> Figure:
    """Draw a tick of K devices, each with candidates: the one of the first 40 ticks that has the most words."""
    stages, depths = trace.stages, (0, *trace.depths)

    def runs(tick: int) -> list[list[dex_jax.TracedNode]]:
        alive = [trace.nodes[i] for i in trace.alive(tick - 1)]
        return [[node for node in alive if tick - node.born == k] for k in range(1, stages + 1)]

    def words_in(tick: int) -> int:
        nodes = [node for cohort in (*runs(tick), born_in(trace, tick)) for node in cohort]
        return all(runs(tick)) * sum(2 * shown(trace, node.token).isalpha() - 1 for node in nodes)

    tick = max(range(stages, 40), key=words_in)
    figure, axes = blank(9.2, 3.3)
    for k, cohort in enumerate(runs(tick), 1):
        x = 0.2 + 1.8 * (k - 1)
        axes.add_patch(rounded_box(x, 0.75, 1.35, 1.25))
        axes.text(x + 0.68, 0.5, f"device {k}: layers {depths[k - 1] + 1} to {depths[k]}", **LEGEND)
        for row, node in enumerate(cohort[:4]):
            color = darker(depth_hex(node.born_at, stages))
            axes.text(x + 0.68, 1.76 - 0.28 * row, shown(trace, node.token), ha="center", size=9.5, color=color)
        if k < stages:
            arrow(axes, (x + 1.37, 1.35), (x + 1.78, 1.35))
        proposed = [node for node in born_in(trace, tick) if node.born_at == k]
        words = " ".join(shown(trace, node.token) for node in proposed) or "(nothing new)"
        if k == stages:
            root = next(node for node in trace.roots if node.rooted == tick)
            words = shown(trace, root.token)
        arrow(axes, (x + 0.68, 2.0), (x + 0.68, 2.42), darker(depth_hex(k, stages)))
        head = f"exit {k}" if k < stages else "the final layer decides"
        axes.text(x + 0.68, 2.72, head, ha="center", size=8, color=FAINT)
        axes.text(x + 0.68, 2.5, words, ha="center", size=9.5, color=darker(depth_hex(k, stages)))
    axes.text(4.6, 3.02, f"tick {tick}: tokens and scores go to every device", **LEGEND)
    below = "hidden states go to the next device; what exits propose enters device 1 in the next tick"
    axes.text(4.6, 0.15, below, **LEGEND)
    return figure


def born_in(trace: dex_jax.Trace, tick: int) -> list[dex_jax.TracedNode]:
    """Return the nodes that were spawned in a tick."""
    return [node for node in trace.nodes if node.born == tick]


def shown(trace: dex_jax.Trace, token: int) -> str:
    """Return a token's text without spaces around it and with visible line ends, or a sign for spaces alone."""
    return trace.labels[token].strip(" ").replace("\n", "\\n") or "␣"


def rounded_box(x: float, y: float, width: float, height: float) -> Any:
    """Return a rounded box."""
    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc="#f4f6f9", ec=FAINT)


def draw_tree(trace: dex_jax.Trace) -> Figure:
    """Draw a tree of drafts that one tick verifies: the first one with two accepted levels."""
    emitted = {node.rooted: node for node in trace.roots}
    tick = next(t for t in emitted if t and emitted[t].position - emitted[t - 1].position > 2)
    alive = [(i, trace.nodes[i]) for i in trace.alive(tick - 1)]
    path = [i for i, node in alive if node.rooted is not None]
    root = alive[0][1].position
    figure, axes = blank(9.2, 2.0)
    levels = sorted({node.position for _, node in alive})
    at = {}
    for level in levels:
        here = [(i, node) for i, node in alive if node.position == level]
        for row, (i, _) in enumerate(here):
            at[i] = (1.0 + 1.75 * (level - root), 1.0 + 0.5 * ((len(here) - 1) / 2 - row))
    for i, node in alive:
        x, y = at[i]
        color = darker(depth_hex(0, 1)) if i in path else FAINT
        color = INK if node.position == root else color
        axes.text(x, y, shown(trace, node.token), ha="center", va="center", size=11, color=color)
        if node.parent in at:
            px, py = at[node.parent]
            arrow(axes, (px + 0.45, py), (x - 0.45, y), color)
    end = at[path[-1]]
    last = 1.0 + 1.75 * (levels[-1] + 1 - root)
    arrow(axes, (end[0] + 0.45, end[1]), (last - 0.6, end[1]), INK)
    axes.text(last, end[1], shown(trace, emitted[tick].token), ha="center", va="center", size=11, weight="bold")
    axes.text(1.0, 1.75, "the last token", **LEGEND)
    axes.text((1.0 + last) / 2, 1.75, "drafts; the accepted ones in colour", **LEGEND)
    axes.text(last, 1.75, "decided by the final layer", **LEGEND)
    axes.text(4.6, 0.12, f"one tick puts all {len(alive)} rows through all {trace.depths[-1]} layers", **LEGEND)
    return figure


def draw_frame(page: str) -> None:
    """Write player.png, the tick with the most live nodes in the second half of a decode that is played."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 860, "height": 640})
        shown.set_content(page)
        shown.evaluate(
            "() => { const half = ticks >> 1, own = alive.slice(half).map((each) => each.length);"
            " go(half + own.indexOf(Math.max(...own))) }"
        )
        shown.locator("main").screenshot(path=FOLDER / "player.png")
        browser.close()


if __name__ == "__main__":
    main()
