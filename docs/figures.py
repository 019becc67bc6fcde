"""Draws the figures of README and documentation: `python docs/figures.py` writes docs/figures/."""

from __future__ import annotations

from pathlib import Path

import dex_jax

FOLDER = Path(__file__).parent / "figures"
PROMPT = "Why is the sky blue?"
WIDTH = 1600
"""Pixels."""


def main() -> None:
    """Writes climb.png (how nodes climb), lattice.png (also what they held) and depth_text.svg."""
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    method = dex_jax.Dex(explorers=5, draft=False)
    trace = dex_jax.trace(lm, PROMPT, method=method, max_new_tokens=24)
    FOLDER.mkdir(exist_ok=True)
    for name, ticks, candidates in (("climb", 22, False), ("lattice", 14, True)):
        figure = dex_jax.plot.lattice(trace, (0, ticks), candidates=candidates)
        figure.savefig(FOLDER / f"{name}.png", dpi=WIDTH / figure.get_figwidth(), metadata={"Software": None})
    out = dex_jax.generate(lm, PROMPT, method=method, max_new_tokens=96)
    (FOLDER / "depth_text.svg").write_text(dex_jax.plot.depth_text(out).svg(PROMPT), encoding="utf-8")


if __name__ == "__main__":
    main()
