"""Write tests/goldens/eagle3.json: logits of random EAGLE-3 heads as the `speculators` package computes them.

    python tests/reference/make_eagle_golden.py

It needs torch and speculators 0.9, in their own environment. `logits[s][i]` are those of draft step s after root i:
the head goes on from its own output for s steps.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference.checkpoints import random_tensor
from reference.eagle_heads import MODEL, ROOTS, STEPS, VARIANTS, VOCABULARY, WIDTH, depths_of, example, head_tensors

GOLDEN = Path(__file__).resolve().parents[1] / "goldens" / "eagle3.json"


@torch.no_grad()
def logits_of(variant: str) -> list[list[list[float]]]:
    given = VARIANTS[variant]
    if "speculators_model_type" not in given:  # as the package's converter changes SafeAILab's format
        about = VARIANTS["residual"]["speculators_config"]
        given = {"transformer_layer_config": given, "draft_vocab_size": given["draft_vocab_size"]}
        given["speculators_config"] = about
    given = given | {"eagle_aux_hidden_state_layer_ids": [*depths_of(variant)]}
    config = Eagle3SpeculatorConfig(**given)
    config.transformer_layer_config._attn_implementation = "eager"
    head = Eagle3DraftModel(config).float().eval()
    tensors = {name.replace("midlayer.", "layers.0."): torch.from_numpy(x) for name, x in head_tensors(variant).items()}
    embedding = random_tensor(MODEL, "model.embed_tokens.weight", (VOCABULARY, WIDTH))
    tensors.setdefault("embed_tokens.weight", torch.from_numpy(embedding))
    missing, unexpected = head.load_state_dict(tensors, strict=False)
    assert not unexpected, unexpected
    assert all("verifier" in name for name in missing), missing
    found: list[torch.Tensor] = []
    head.lm_head.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    tokens, states = example(variant)
    ids = torch.from_numpy(tokens[1:].astype("int64"))[None]
    head(
        hidden_states=torch.from_numpy(states)[None], input_ids=ids, document_ids=torch.zeros_like(ids), ttt_steps=STEPS
    )
    return [[[float(f"{x:.7g}") for x in step[root].tolist()] for root in ROOTS] for step in found]


def main() -> None:
    made = {"speculators": version("speculators"), "torch": torch.__version__}
    heads = {variant: logits_of(variant) for variant in VARIANTS}
    GOLDEN.write_text(json.dumps({"versions": made, "logits": heads}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
