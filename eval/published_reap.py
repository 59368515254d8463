"""Runs the published REAP on given token ids, in a process of its own. `eval.published` starts it.

    python -P eval/published_reap.py CLONE MODEL TOKENS.npy RESULT.json --pruned 0.25

The Python needs what its pyproject.toml pins of transformers (4.55), and nothing of its evaluation. Its own
observer and its own pruning do the work, with the default arguments and `--record_pruning_metrics_only true`, as
its scripts give them. Changed are the surroundings: the token ids take the place of its data sets; modules that
only its evaluation and its plots need are empty; config.json gets the names transformers 4 has for two keys;
Qwen2-MoE is registered as its README says a model is added. Loading and saving the model are not timed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

UNUSED = {"vllm": "TokensPrompt", "reap.eval": "run_evaluate", "reap.cluster_plots": "plot_cluster_analysis"}
"""Modules of its evaluation and plots, and the name that is imported from each."""


def load_model(directory: Path, work: Path) -> Any:
    """The model as transformers 4 reads it, in the precision of its files."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config["dtype"]
    config.setdefault("num_experts", config.get("num_local_experts"))
    (work / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in directory.glob("*.safetensors*"):
        (work / file.name).symlink_to(file.resolve())
    return AutoModelForCausalLM.from_pretrained(work, torch_dtype="auto").eval()


def load_reap(clone: Path) -> tuple[Any, Any]:
    """Its modules `main` and `prune`."""
    sys.path.insert(0, str(clone / "src"))
    for name, imported in UNUSED.items():
        sys.modules[name] = ModuleType(name)
        setattr(sys.modules[name], imported, None)
    observer: Any = importlib.import_module("reap.observer")
    models: Any = importlib.import_module("reap.model_util")
    models.MODEL_ATTRS["Qwen2MoeForCausalLM"] = models.MODEL_ATTRS["Qwen3MoeForCausalLM"]
    observer.OBSERVER_CONFIG_REGISTRY["Qwen2MoeForCausalLM"] = functools.partial(
        observer.Qwen3MoEObserverHookConfig, module_class_name_to_hook_regex="Qwen2MoeSparseMoeBlock"
    )
    return importlib.import_module("reap.main"), importlib.import_module("reap.prune")


def prune(clone: Path, directory: Path, tokens: np.ndarray, pruned: float) -> dict[str, Any]:
    """The experts it prunes, [layers][experts] of 0 and 1, and the seconds its observer took."""
    reap, pruning = load_reap(clone)
    known: Any = importlib.import_module("reap.args")
    observed = known.ObserverArgs(record_pruning_metrics_only=True)
    batches = torch.from_numpy(tokens).split(observed.batch_size)
    reap.load_category_batches = lambda **_: {
        "all": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
    }
    with tempfile.TemporaryDirectory() as work:
        model = load_model(directory, Path(work))
        model.save_pretrained = lambda _: None
        blocks = [pruning.get_moe(model, layer) for layer in range(model.config.num_hidden_layers)]
        original = [list(block.experts) for block in blocks]
        arguments = known.ReapArgs(profile=False), known.ModelArgs(), known.DatasetArgs(), observed
        # It collects garbage after every layer; what was imported would make that nine tenths of its time.
        gc.freeze()
        start = time.monotonic()
        data = reap.record_activations(model, None, *arguments, Path(work))
        seconds = time.monotonic() - start
        count = int(len(original[0]) * pruned)
        pruning.prune(data, model, known.PruneArgs(prune_method="reap"), count, Path(work) / "pruned")
    kept = [set(block.experts) for block in blocks]
    mask = [[int(expert not in left) for expert in row] for row, left in zip(original, kept, strict=True)]
    return {"pruned": mask, "preparation": 0.0, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pruned", type=float, required=True)
    arguments = parser.parse_args()
    found = prune(arguments.clone, arguments.model, np.load(arguments.tokens), arguments.pruned)
    arguments.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
