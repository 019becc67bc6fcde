"""The sentences with which bad input is refused."""

from __future__ import annotations

import pytest

from dex_jax.errors import DexError
from dex_jax.io.opening import open_checkpoint


def refusal(source) -> str:
    """Return the sentence with which opening a model is refused."""
    with pytest.raises(DexError) as caught:
        open_checkpoint(str(source))
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert str(source) in sentence
    return sentence
