"""Outputs in the stock layout: the searched model, and what transformers makes of them without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_rco.calib.bank import OptionBank
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.ckpt.dequantized import read_dequantized
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.reload import load_model
from tests.compressed import Job
from tests.stock import READABLE, stock_job
from tests.tiny_models import FAMILIES, save_tiny

CPU = torch.device("cpu")
ONE_WIDTH = {
    "bf16": ("prune", "bf16"),
    "int4": ("prune", "int4-g64", "int4", "int4-g32"),
    "int8": ("prune", "int8", "int8-g64"),
    "unpruned": ("int4-g64", "int4"),
}
SEVERAL_WIDTHS = {"int4-int8": ("prune", "int4-g64", "int8-g64"), "int4-bf16": ("prune", "int4-g64", "bf16")}
DENSE: dict[str, Any] = {"qwen3_moe": {"mlp_only_layers": [1]}, "qwen2_moe": {"mlp_only_layers": [0]}}

# Nothing but the model's directories: what was learnt about them must come from their files.
READ = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
for out in sys.argv[2:]:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        experts = {n: p.detach().contiguous() for n, p in model.named_parameters() if ".experts." in n}
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        with torch.no_grad():
            logits = model(ids).logits
        save_file(experts | {"logits": logits}, out + ".safetensors")
        found = {"missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"])}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    with open(out + ".json", "w") as file:
        json.dump(found, file)
assert not [name for name in sys.modules if name.split(".")[0] == "moe_rco"]
"""


def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Job, Path]]:
    """(family, options) -> a random job, written and then read by transformers in another process."""
    place, found = tmp_path_factory.mktemp("stock"), {}
    for family in FAMILIES:
        source = save_tiny(family, place / family, num_hidden_layers=4, **DENSE.get(family, {}))
        for name, options in (ONE_WIDTH | SEVERAL_WIDTHS).items():
            base = place / f"{family}-{name}"
            job = stock_job(source, base / "store", seed=len(found), options=options)
            job.write(base / "out")
            found[family, name] = job, base / "out"
    outs = [str(out) for _, out in found.values()]
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(tokens().tolist()), *outs],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return found


def searched(job: Job) -> torch.Tensor:
    """Logits [2, 24, V] of the model that the search saw, float32."""
    config, table = job.checkpoint.config, job.assignment.table
    runner = Runner(job.checkpoint, job.adapter, CPU, torch.float32)
    bank = OptionBank(job.checkpoint, table, CPU, torch.float32)
    model = AssignedModel(runner, job.adapter, config, bank, job.store)
    return runner.logits(model.hidden(tokens(), job.assignment.choice))


def result(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name("out.json").read_text())


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ONE_WIDTH)
def test_transformers_reads_one_width_without_us(jobs: Any, family: str, name: str) -> None:
    job, out = jobs[family, name]
    assert result(out) == {"missing": [], "unexpected": []}
    read = load_file(out.with_name("out.safetensors"))
    exact = read_weights(job, out)
    for layer in job.assignment.table.layers:
        experts = f"model.layers.{layer}.mlp.experts"
        gate_up, down = (read[f"{experts}.{part}"] for part in ("gate_up_proj", "down_proj"))
        assert len(gate_up) == len(job.assignment.kept(layer))
        for new in range(len(gate_up)):
            gate, up, out_ = (w.name for w in job.adapter.expert(job.checkpoint.config, layer, new).weights)
            assert torch.equal(gate_up[new], torch.cat([exact[gate], exact[up]]).bfloat16())
            assert torch.equal(down[new], exact[out_].bfloat16())
    # transformers rounds what it dequantises to bfloat16, which may change routes; unquantised it is exact.
    expected = searched(job) if name == "bf16" else rounded(out)
    torch.testing.assert_close(read["logits"], expected, rtol=0, atol=1e-4)


def rounded(out: Path) -> torch.Tensor:
    """Logits computed in float32 from weights dequantised to bfloat16."""
    model = load_model(out, CPU, torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    with torch.no_grad():
        return model(tokens()).logits


def read_weights(job: Job, out: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(out, allow_quantized=True)
    if "quantization_config" in checkpoint.config:
        return read_dequantized(checkpoint, torch.float32)
    return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", SEVERAL_WIDTHS)
def test_transformers_does_not_read_several_widths(jobs: Any, family: str, name: str) -> None:
    """Pins what the documentation says; the day it fails, transformers has learnt it."""
    job, out = jobs[family, name]
    found = result(out)
    if name == "int4-int8":
        assert "error" in found
        return
    plain = {
        f"model.layers.{layer}.mlp.experts.{part}"
        for layer in job.assignment.table.layers
        for part in ("gate_up_proj", "down_proj")
        if any(option.name == "bf16" for option in job.assignment.layer_options(layer))
    }
    assert set(found["missing"]) == plain


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", [*ONE_WIDTH, *SEVERAL_WIDTHS])
def test_our_reader_gives_the_searched_model(jobs: Any, family: str, name: str) -> None:
    job, out = jobs[family, name]
    with torch.no_grad():
        reloaded = load_model(out, CPU, torch.float32)(tokens()).logits
    torch.testing.assert_close(reloaded, searched(job), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_option_at_once(tmp_path: Path, seed: int) -> None:
    job = stock_job(
        save_tiny("qwen3_moe", tmp_path / "m", num_hidden_layers=7), tmp_path / "s", seed, READABLE
    )
    job.write(tmp_path / "out")
    expected = searched(job)
    with torch.no_grad():
        reloaded = load_model(tmp_path / "out", CPU, torch.float32)(tokens()).logits
        original = load_model(tmp_path / "m", CPU, torch.float32)(tokens()).logits
    torch.testing.assert_close(reloaded, expected, rtol=0, atol=1e-4)
    assert float((original - expected).abs().max()) > 0.1  # the comparison can fail
