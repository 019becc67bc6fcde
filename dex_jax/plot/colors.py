"""The palette of terminals, pages and figures: green for tokens of early exits, red for late ones, cyan for drafts."""

from __future__ import annotations

import colorsys

from rich.color import Color

from dex_jax.lattice import DRAFTED

PALETTE = (46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)
"""The 256-colour codes of terminals from early (green) to late (red)."""

DRAFT_CODE = 45
"""The 256-colour code of drafts (cyan)."""

FINAL_HEX = "#8a93a3"
"""The colour of tokens that the final layer or the prefill gave itself; terminals leave them plain."""

PAGE = (0.47, 0.62)
"""The lightness and saturation on a page, as terminals' colours are made for black and too loud on white."""


def depth_code(exit_number: int, stages: int) -> int | None:
    """Return the 256-colour code of a token by its exit 1..K, 0 for a draft; None for the final layer and prefill."""
    if exit_number == DRAFTED:
        return DRAFT_CODE
    if exit_number < 1 or exit_number >= stages:
        return None
    place = (exit_number - 1) / max(stages - 2, 1)
    return PALETTE[round(place * (len(PALETTE) - 1))]


def depth_style(exit_number: int, stages: int) -> str:
    """Return `depth_code` as a style of the rich package, "default" for None.

    Examples:
      >>> [depth_style(exit_number, stages=4) for exit_number in (1, 2, 3, 4)]
      ['color(46)', 'color(226)', 'color(196)', 'default']
    """
    code = depth_code(exit_number, stages)
    return "default" if code is None else f"color({code})"


def depth_hex(exit_number: int, stages: int) -> str:
    """Return `depth_code` as "#rrggbb" for light pages, FINAL_HEX for None."""
    code = depth_code(exit_number, stages)
    if code is None:
        return FINAL_HEX
    hue, _, _ = colorsys.rgb_to_hls(*Color.from_ansi(code).get_truecolor().normalized)
    return _hex(hue, *PAGE)


def darker(color: str) -> str:
    """Darken the colour of a line, "#rrggbb", for words on white, where it would be pale."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)))
    return _hex(hue, 0.72 * lightness, saturation)


def _hex(*color: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(*color))
