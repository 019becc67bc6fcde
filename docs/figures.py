"""Draws the documentation's figures with the default model: `python docs/figures.py` writes docs/figures/*.png."""

from __future__ import annotations

from pathlib import Path

import dex_jax

FOLDER = Path(__file__).parent / "figures"
PROMPT = "Why is the sky blue?"


def main() -> None:
    """Writes climb.png and lattice.png."""
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    trace = dex_jax.trace(lm, PROMPT, method=dex_jax.Dex(explorers=5), max_new_tokens=24)
    FOLDER.mkdir(exist_ok=True)
    plain = {"metadata": {"Software": None}}
    dex_jax.plot.lattice(trace, ticks=(0, 36), candidates=False).savefig(FOLDER / "climb.png", **plain)
    dex_jax.plot.lattice(trace, ticks=(0, 20)).savefig(FOLDER / "lattice.png", **plain)


if __name__ == "__main__":
    main()
