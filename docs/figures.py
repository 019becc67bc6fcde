"""Draws the figures of README and documentation: `python docs/figures.py` writes docs/figures/."""

from __future__ import annotations

import shutil
from pathlib import Path

import dex_jax

FOLDER = Path(__file__).parent / "figures"
PROMPT = "Why is the sky blue?"
WIDTH = 1600
"""Pixels."""


def main() -> None:
    """Writes lattice.png, player.png (for which playwright and a Chromium must be there) and depth_text.svg."""
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    method = dex_jax.Dex(explorers=5, draft=False)
    trace = dex_jax.trace(lm, PROMPT, method=method, max_new_tokens=64)
    FOLDER.mkdir(exist_ok=True)
    figure = dex_jax.plot.lattice(trace, (0, 22))
    figure.savefig(FOLDER / "lattice.png", dpi=WIDTH / figure.get_figwidth(), metadata={"Software": None})
    draw_frame(dex_jax.plot.player(trace).page)
    out = dex_jax.generate(lm, PROMPT, method=method, max_new_tokens=96)
    (FOLDER / "depth_text.svg").write_text(dex_jax.plot.depth_text(out).svg(PROMPT), encoding="utf-8")


def draw_frame(page: str) -> None:
    """Writes player.png, the fullest tick in the second half of a decode that is played."""
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
