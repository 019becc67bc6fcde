"""The comparison of two outputs, and of how close the two best tokens were where the outputs first differ.

Batches of different shapes add in different orders, so in floating point two outputs may differ where the two best
tokens are almost equal. Such a divergence is a tie; where the margin is larger, it is a bug.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.mesh.programs import mesh_logits
from dex_jax.decoding.output import Output
from dex_jax.decoding.request import Request
from dex_jax.decoding.session import sampling_of
from dex_jax.language_model import LanguageModel
from dex_jax.sampling import Sampling, perturbed_logits, position_noise

CLOSE = {"float32": 1e-4, "float16": 2.0**-8, "bfloat16": 2.0**-5}
"""The largest margin of a tie, by dtype: closer than this share of the largest |logit|, scores may swap by rounding."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The comparison of one sequence with the reference.

    Attributes:
      identical: whether all tokens are equal.
      first_divergence: index of the first new token that differs, None if none does.
      top2_margin: best minus second-best score there (noise included), over the largest |logit|; None if none differs.
    """

    identical: bool
    first_divergence: int | None
    top2_margin: float | None

    def is_tie(self, dtype: str) -> bool:
        """Return whether the outputs are equal, or part only where a model of this dtype cannot tell tokens apart."""
        return self.identical or (self.top2_margin is not None and self.top2_margin < CLOSE[dtype])


def compare(
    lm: LanguageModel,
    output: Output,
    reference: Output,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[Check]:
    """Compare two outputs of the same prompts and seeds, sequence by sequence.

    Args:
      lm: the model that made both.
      output: the output to check.
      reference: the output that it should equal, such as AR's.
      temperature: as it was for both.
      top_k: as it was for both.
      top_p: as it was for both.

    Returns:
      One Check for each of the B sequences.
    """
    assert temperature == 0 or output.seeds is not None
    checks, prompts = [], output.prompt_tokens
    sampling = None
    if temperature:
        request = Request(temperature=temperature, top_k=top_k, top_p=top_p)
        sampling = sampling_of(request, output.seeds or [], len(prompts), lm.config.vocab_size)
    for row, prompt in enumerate(prompts):
        own = None if sampling is None else sampling._replace(keys=sampling.keys[row : row + 1])
        ours = output.tokens[row, : output.lengths[row]].tolist()
        theirs = reference.tokens[row, : reference.lengths[row]].tolist()
        checks.append(compare_tokens(lm, prompt, ours, theirs, own))
    return checks


def compare_tokens(
    lm: LanguageModel, prompt: list[int], ours: list[int], theirs: list[int], sampling: Sampling | None = None
) -> Check:
    """Compare the new tokens of one sequence with the reference's; `sampling` is of one sequence, None for greedy."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at == len(ours) == len(theirs):
        return Check(True, None, None)
    return Check(False, at, top2_margin(lm, [*prompt, *theirs[:at]], sampling))


def top2_margin(lm: LanguageModel, ids: list[int], sampling: Sampling | None = None) -> float:
    """Return the best minus the second-best score after `ids`, over max |logit|; `sampling` is of one sequence."""
    logits = logits_of(lm, [ids])[0, -1]
    adjusted = logits
    if sampling is not None:
        noise = position_noise(sampling.keys[0], jnp.int32(len(ids)), logits.shape[0])
        adjusted = perturbed_logits(logits[None], sampling, noise[None])[0]
    second, best = np.sort(np.asarray(adjusted))[-2:]
    return float((best - second) / np.abs(np.asarray(logits)).max())


def logits_of(lm: LanguageModel, tokens: jax.Array | np.ndarray | Sequence[Sequence[int]]) -> jax.Array:
    """Return the final logits at every position, on one device or a mesh: tokens [B, T] int32 -> [B, T, V] float32."""
    if lm.mesh is None:
        return lm.logits(tokens)
    return mesh_logits(lm.config, lm.layout, lm.mesh, lm.weights, jnp.asarray(tokens, jnp.int32))
