"""Runs the published RCO on given token ids, in a process of its own. `eval.published` starts it.

    python -P eval/published_rco.py CLONE MODEL TOKENS.npy RESULT.json --pruned 0.25 [options of its search]

Its own `main` does all the work: its file loader reads the token ids, and what is taken is the mask it saves, its
last iterate. Two things are changed: the device of its logits, cuda:0 in its source, is the CPU; and with --float32 the
model is loaded in that, in place of bfloat16. Loading the model is not timed; the original's log-probabilities count as
preparation.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _CpuTorch:
    """The torch module, except that every device is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, *_: Any) -> torch.device:
        return torch.device("cpu")


def search(
    clone: Path, model: str, tokens: np.ndarray, pruned: str, float32: bool, options: list[str]
) -> dict[str, Any]:
    """The experts it prunes, [layers][experts] of 0 and 1, and the seconds it took."""
    sys.path.insert(0, str(clone))
    program: Any = importlib.import_module("rco_search_prune")
    if float32:
        program.load_model = functools.partial(program.load_model, dtype="float32")
    importlib.import_module("search.prune").torch = _CpuTorch()  # pyright: ignore[reportAttributeAccessIssue]
    preparation = 0.0
    build_ref_cache = program.build_ref_cache

    def timed(*arguments: Any) -> Any:
        nonlocal preparation
        start = time.monotonic()
        cache = build_ref_cache(*arguments)
        preparation = time.monotonic() - start
        return cache

    program.build_ref_cache = timed
    with tempfile.TemporaryDirectory() as work:
        pool, mask, result = (Path(work) / name for name in ("pool.pt", "mask.pt", "result.json"))
        torch.save([torch.from_numpy(row)[None] for row in tokens], pool)
        given = {
            "--model": model,
            "--sparsity": pruned,
            "--calibration-data": str(pool),
            "--calibration-samples": str(len(tokens)),
            "--calibration-seq-length": str(tokens.shape[1]),
            "--device-map": "single",
            "--save-mask": str(mask),
            "--save-json": str(result),
        }
        program.main([*itertools.chain(*given.items()), "--skip-freq-baseline", *options])
        experts = torch.load(mask, weights_only=True).int().tolist()
        seconds = json.loads(result.read_text(encoding="utf-8"))["time_s"]
    return {"pruned": experts, "preparation": preparation, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path)
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--pruned", required=True)
    parser.add_argument("--float32", action="store_true")
    arguments, options = parser.parse_known_args()
    tokens = np.load(arguments.tokens)
    found = search(arguments.clone, arguments.model, tokens, arguments.pruned, arguments.float32, options)
    arguments.result.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
