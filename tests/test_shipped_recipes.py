"""The shipped recipes for the real models, unchanged but for the text: what a dry run says of them without their weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from moe_rco import cli, recipe
from moe_rco.recipe import DEMO_CALIBRATION
from tests.real_models import REAL

README = Path(__file__).resolve().parent.parent / "README.md"
SHIPPED = {name: recipe.load(name) for name in recipe.shipped()}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as huggingface_hub keeps it, with nothing but each model's config.json."""
    cache = tmp_path_factory.mktemp("hub")
    for name, (config, _) in REAL.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(REVISION)
        (folder / "snapshots" / REVISION).mkdir(parents=True)
        (folder / "snapshots" / REVISION / "config.json").write_text(json.dumps(config))
    return cache


def machine(monkeypatch: pytest.MonkeyPatch, gpu_memory: int) -> None:
    """A machine with one GPU of this size, 64 GiB of memory and a large disk. Nothing is computed on it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (gpu_memory, gpu_memory))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 << 30))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 40))


@pytest.mark.parametrize("name", [name for name, shipped in SHIPPED.items() if shipped.model in REAL])
def test_a_dry_run_has_the_real_sizes(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, (config, total) = SHIPPED[name], REAL[SHIPPED[name].model]
    fit = shipped.budget[0].fit
    machine(monkeypatch, fit.gpu_memory if fit else 80 * 10**9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    text = f"calibration.data={DEMO_CALIBRATION}"
    done = CliRunner().invoke(cli.app, ["prune", "--recipe", name, "--dry-run", "--set", text])
    assert done.exit_code == 0, done.output
    found = dict(
        re.findall(r"^(model now|experts now|budget) .*?\(([0-9,]+) bytes", done.stdout, re.MULTILINE)
    )
    numbers = {row: int(number.replace(",", "")) for row, number in found.items()}
    assert numbers["model now"] == total
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_experts", config.get("num_local_experts"))
    expected = config["num_hidden_layers"] * experts * 3 * config["hidden_size"] * inner * 2
    assert numbers["experts now"] == expected
    assert 0 < numbers["budget"] < numbers["experts now"]
    assert "on the device (weights streamed from disk)" in done.stdout
    if fit is not None:
        assert f"fits a GPU of {name.rpartition('-')[2].upper()} with {fit.max_num_seqs} x" in done.stdout
        others = total - expected
        kv = fit.max_num_seqs * fit.max_model_len * 2 * config["num_hidden_layers"] * 2
        kv *= (
            config["num_key_value_heads"] * config["hidden_size" if "head_dim" not in config else "head_dim"]
        )
        kv //= 1 if "head_dim" in config else config["num_attention_heads"]
        # Weights and cache fit the card, with room for the rest.
        assert numbers["budget"] + others + kv < 0.9 * fit.gpu_memory - (1 << 30)
    assert not list(tmp_path.iterdir())
    if name == "qwen3-30b-a3b-24gb":
        (shown,) = re.findall(r"```text\n(model now.*?)```", README.read_text(), re.DOTALL)
        assert " ".join(shown.split()) in " ".join(done.stdout.split())


@pytest.mark.parametrize("name", [name for name, shipped in SHIPPED.items() if shipped.budget[0].fit])
def test_what_the_comments_say_is_what_the_recipe_does(name: str) -> None:
    text, fit = recipe.shipped()[name].read_text(), SHIPPED[name].budget[0].fit
    assert fit is not None
    assert f"serve out/{name} --max-model-len {fit.max_model_len} --max-num-seqs {fit.max_num_seqs}" in text
    sequences = (
        f"{fit.max_num_seqs} sequence{'s' if fit.max_num_seqs > 1 else ''} of {fit.max_model_len:,} tokens"
    )
    assert sequences in text
    assert f"eval out/{name} --backend vllm --tasks default\n" in text
    assert SHIPPED[name].output == f"out/{name}"
    assert not SHIPPED[name].experimental
