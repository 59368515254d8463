"""The dense part: what does not fit config.json is told before it is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_rco.adapters import get_adapter
from moe_rco.calib.runner import Runner
from moe_rco.calib.streaming import Streaming
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError
from tests.tiny_models import save_tiny


@pytest.mark.parametrize("streaming", [None, Streaming(window=1 << 20, tokens=64, workspace=1 << 20)])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"num_key_value_heads": 1},
            r"k_proj.weight' has shape \[32, 64\], by config.json it should have \[16, 64\]",
        ),
        (
            {"vocab_size": 97},
            r"embed_tokens.weight' has shape \[96, 64\], by config.json it should have \[97, 64\]",
        ),
    ],
)
def test_shapes_are_those_of_the_configuration(
    change: dict[str, int], words: str, streaming: Streaming | None, tmp_path: Path
) -> None:
    model = save_tiny("mixtral", tmp_path / "model")
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    checkpoint = Checkpoint(model)
    with pytest.raises(ModelError, match=words):
        Runner(checkpoint, get_adapter(checkpoint.config), torch.device("cpu"), torch.float32, streaming)
