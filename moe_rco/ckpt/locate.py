"""Finding the model a recipe names: a directory, the shipped demo, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from moe_rco.ckpt.reader import COMPANIONS, CONFIG, INDEX
from moe_rco.errors import ModelError
from moe_rco.recipe import Recipe

# The default lets a dead connection hang for longer than a user waits.
TIMEOUT = 10


def read_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of the recipe's model; of a Hub model only this file is downloaded. Raises ModelError."""
    directory = recipe.model_directory
    path = directory / CONFIG if directory else Path(_from_hub(recipe, config_only=True))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not a readable config.json ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def fetch_model(recipe: Recipe) -> Path:
    """The directory of the recipe's model, downloaded from the Hub where it is not local. Raises ModelError."""
    return recipe.model_directory or Path(_from_hub(recipe, config_only=False))


def _from_hub(recipe: Recipe, config_only: bool) -> str:
    name = recipe.model
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(f"no model directory '{name}' (and it is not a Hub name such as Qwen/Qwen3-30B-A3B)")
    try:
        if config_only:
            return hf_hub_download(name, CONFIG, revision=recipe.revision, etag_timeout=TIMEOUT)
        patterns = [CONFIG, INDEX, "*.safetensors", *COMPANIONS]
        return snapshot_download(
            name, revision=recipe.revision, allow_patterns=patterns, etag_timeout=TIMEOUT
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model '{name}' is not a local directory and could not be fetched from the Hugging Face Hub ({first}); "
            "download it elsewhere and name its directory: --set model=/path/to/model"
        ) from error
