"""Finding the model a recipe names: a directory, the shipped demo, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from moe_rco.ckpt.reader import COMPANIONS, CONFIG, INDEX
from moe_rco.errors import ModelError
from moe_rco.files import check_regular
from moe_rco.recipe import Recipe

TIMEOUT = 10
"""Seconds to wait for the Hub's first answer."""


def read_config(recipe: Recipe) -> dict[str, Any]:
    """config.json of the recipe's model; of a Hub model only this file is downloaded. Raises ModelError."""
    directory = recipe.model_directory
    path = directory / CONFIG if directory else Path(_from_hub(recipe, config_only=True))
    check_regular(path, ModelError)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable config.json ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def fetch_model(recipe: Recipe) -> Path:
    """The directory of the recipe's model, downloaded from the Hub where it is not local. Raises ModelError."""
    return recipe.model_directory or Path(_from_hub(recipe, config_only=False))


def _from_hub(recipe: Recipe, config_only: bool) -> str:
    """Path of a Hub model's config.json, or of the directory of the whole model."""
    name = recipe.model
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ModelError(f"no model directory '{name}' (and it is not a Hub name such as Qwen/Qwen3-30B-A3B)")
    try:
        offline = not _reachable(recipe)
        if config_only:
            return hf_hub_download(name, CONFIG, revision=recipe.revision, local_files_only=offline)
        patterns = [CONFIG, INDEX, "*.safetensors", *COMPANIONS]
        return snapshot_download(
            name, revision=recipe.revision, allow_patterns=patterns, local_files_only=offline
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            reason = "it cannot be reached, and the model is not in the local cache"
        else:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model '{name}' is not a local directory and could not be fetched from the Hugging Face Hub ({reason}); "
            "download it elsewhere and name its directory: --set model=/path/to/model"
        ) from error


def _reachable(recipe: Recipe) -> bool:
    """Whether the Hub answers. Asked first, because downloads retry a dead connection for half a minute."""
    try:
        HfApi().model_info(recipe.model, revision=recipe.revision, timeout=TIMEOUT)
    except (httpx2.TransportError, OfflineModeIsEnabled):
        return False
    return True
