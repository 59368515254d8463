"""The stock layout as written: names, rows, config.json; and the plan that traces it back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_rco.adapters import get_adapter
from moe_rco.ckpt import stock
from moe_rco.ckpt.dequantized import read_dequantized
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import ModelError, OutputError, PlanError
from moe_rco.inspection import inspect
from moe_rco.plan import Plan
from moe_rco.quant.packing import dequantize
from moe_rco.types import Assignment, Option
from tests.compressed import Job, plan_of, random_job
from tests.stock import READABLE, stock_job
from tests.tiny_models import FAMILIES, save_tiny


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("stock")
    source = save_tiny(request.param, place / "model", num_hidden_layers=7)
    return stock_job(source, place / "store", 0)


@pytest.fixture(scope="module")
def out(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("written") / "out"
    job.write(directory)
    return directory


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def test_every_tensor_is_the_original_one_under_its_new_name(job: Job, out: Path) -> None:
    written, table = tensors_of(out), job.assignment.table
    expected: dict[str, torch.Tensor] = {
        name: job.checkpoint.read(name) for name in job.checkpoint.tensors if ".experts." not in name
    }
    used = set()
    for layer in table.layers:
        kept = job.assignment.kept(layer)
        router = job.adapter.router_name(layer)
        expected[router] = job.checkpoint.read(router)[kept]
        for new, old in enumerate(kept):
            group = table.groups[table.rows(layer)[old]]
            option = job.assignment.option(int(table.rows(layer)[old]))
            used.add(option.name)
            stored = job.store.read(layer, option) if option.is_quantized else {}
            for weight in group.weights:
                base = weight.name.removesuffix("weight")
                target = base.replace(f".experts.{old}.", f".experts.{new}.")
                if option.is_quantized:
                    found = {name: t for name, t in stored.items() if name.startswith(base)}
                    assert len(found) == 3
                    expected |= {target + name.removeprefix(base): t for name, t in found.items()}
                else:
                    expected[target + "weight"] = job.checkpoint.read(weight.name)
    assert used == set(READABLE) - {"prune"}
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name], tensor), name


def test_bytes(job: Job, tmp_path: Path) -> None:
    result = job.write(tmp_path / "out")
    tensors = Checkpoint(tmp_path / "out", allow_quantized=True).tensors
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    assert result.expert_bytes == experts == job.plan.cost
    assert result.total_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert result.other_bytes == result.total_bytes - experts


def test_config_counts_the_kept_experts_and_changes_nothing_else(job: Job, out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    count = len(job.assignment.kept(0))
    assert job.adapter.num_experts(config) == count < 8
    changed = {key for key in config if config[key] != job.checkpoint.config[key]}
    assert config.keys() == job.checkpoint.config.keys()
    assert changed in ({"num_experts"}, {"num_local_experts"})


def test_both_names_of_the_count_are_written_where_both_are_there(job: Job) -> None:
    both = job.checkpoint.config | {"num_experts": 8, "num_local_experts": 8}
    config = stock.stock_config(job.assignment, job.adapter, both)
    assert config["num_experts"] == config["num_local_experts"] == len(job.assignment.kept(0))


def test_quantization_config_names_the_precision_of_every_expert(job: Job, out: Path) -> None:
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["format"]) == ("compressed-tensors", "pack-quantized")
    groups = list(entry["config_groups"].values())
    assert [g["weights"]["num_bits"] for g in groups] == sorted((8, 8, 4, 4, 4), reverse=True)

    def matching(patterns: list[str], module: str) -> bool:
        return any(re.match(pattern.removeprefix("re:"), module) for pattern in patterns)

    for name in tensors_of(out):
        module = name.rpartition(".")[0]
        found = [group["weights"] for group in groups if matching(group["targets"], module)]
        if ".experts." not in name:
            assert not found, name
            continue
        layer = int(name.split(".")[2])
        option = stock.precisions(job.assignment)[layer]
        assert matching(entry["ignore"], module) == (not option.is_quantized)
        sizes = [(weights["num_bits"], weights.get("group_size")) for weights in found]
        assert sizes == ([(option.bits, option.group_size)] if option.is_quantized else [])


def test_prune_only_needs_no_quantization_config(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    job = stock_job(source, tmp_path / "store", 1, ["prune", "bf16"])
    job.write(tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")  # which refuses what is quantised
    checkpoint.check_experts(job.adapter)


def test_compressed_tensors_reads_the_same_weights(job: Job, out: Path) -> None:
    """By its own code, negative scales included; ours is the comparison."""
    checkpoint = Checkpoint(out, allow_quantized=True)
    read, written = read_dequantized(checkpoint, torch.float32), tensors_of(out)
    negative = 0
    for layer, option in stock.precisions(job.assignment).items():
        for new in range(len(job.assignment.kept(layer))):
            for weight in job.adapter.expert(checkpoint.config, layer, new).weights:
                base = weight.name.removesuffix("weight")
                packed = {n.removeprefix(base): t for n, t in written.items() if n.startswith(base)}
                assert torch.equal(read[weight.name], dequantize(packed, option))
                negative += int((packed.get("weight_scale", torch.zeros(1)) < 0).sum())
    assert read.keys() == {re.sub(r"weight_(packed|scale|shape)$", "weight", name) for name in written}


def test_negative_scales_are_only_factors() -> None:
    from moe_rco.quant.grid import Grid, quantize_to_grid
    from moe_rco.quant.packing import pack

    option = Option.parse("int4-g32")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    scale = (weight.unflatten(1, (2, 32)).abs().amax(-1) / 8).bfloat16()
    scale[::2] *= -1
    packed = pack(quantize_to_grid(weight, Grid(scale, None), option), scale, None, option)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, group_size=32)
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["x"], weights=args)
    found = compressor.decompress({**packed, "weight_scale": scale.float()}, scheme)["weight"]
    assert torch.equal(found, dequantize(packed, option))
    assert float((found - weight).norm() / weight.norm()) < 0.12


@pytest.mark.parametrize("wrong", ["scheme", "target"])
def test_a_config_that_does_not_fit_its_tensors_is_refused(job: Job, tmp_path: Path, wrong: str) -> None:
    job.write(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    entry = config["quantization_config"]
    if wrong == "scheme":
        del entry["config_groups"]["group_1"]
    else:
        entry["config_groups"]["group_0"]["targets"].append(r"re:.*lm_head")
        entry["ignore"] = []
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="names no scheme for" if wrong == "scheme" else "promises packed"):
        read_dequantized(Checkpoint(tmp_path / "out", allow_quantized=True), torch.float32)


def test_the_plan_traces_every_written_expert(job: Job, out: Path) -> None:
    plan = Plan.load(out)
    assert plan == job.plan
    assert plan.layout == "stock"
    for layer in job.assignment.table.layers:
        router = job.adapter.router_name(layer)
        written, source = tensors_of(out)[router], job.checkpoint.read(router)
        assert plan.kept(layer) == tuple(job.assignment.kept(layer))
        for new, old in enumerate(plan.kept(layer)):
            assert torch.equal(written[new], source[old])


def test_inspect_shows_the_original_experts(job: Job, out: Path) -> None:
    found = inspect(out)
    assert found.layout == "stock"
    assert found.num_experts == 8
    assert found.expert_numel == sum(group.numel for group in job.assignment.table.groups)
    assert found.expert_bytes == job.plan.cost
    assert [layer.options for layer in found.layers] == [
        tuple(option.name for option in job.assignment.layer_options(layer)) for layer in range(7)
    ]
    total = sum(tensor.nbytes for tensor in Checkpoint(out, allow_quantized=True).tensors.values())
    assert found.other_bytes == total - job.plan.cost


def test_inspect_refuses_what_the_plan_does_not_describe(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    key = "num_local_experts" if config.get("num_local_experts") else "num_experts"
    path.write_text(json.dumps({**config, key: config[key] - 1}))
    with pytest.raises(ModelError, match=r"the plan keeps \d experts of layer 0, config.json has \d"):
        inspect(tmp_path / "out")


def test_inspect_takes_another_plan_json_for_what_it_is(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model")
    (source / "plan.json").write_text("[]")
    assert inspect(source).layout == "mixed"
    assert inspect(source).layers[0].options == ("bf16",) * 8


def test_overwriting_our_own_and_nothing_else(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "out")
    job.write(tmp_path / "out", overwrite=True)
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(plan.read_text().replace('"stock"', '"mixed"'))
    with pytest.raises(OutputError, match="not written by moe-rco"):
        job.write(tmp_path / "out", overwrite=True)


def test_assignments_outside_the_layout_are_refused(job: Job, tmp_path: Path) -> None:
    table = job.assignment.table
    rows = table.rows(0)
    kept = next(row for row in rows if not job.assignment.option(int(row)).is_prune)
    fewer, other = job.assignment.choice.copy(), job.assignment.choice.copy()
    fewer[kept] = table.prune_index
    other[kept] = next(k for k in range(1, len(table.options)) if k != other[kept])
    spare = next(row for row in rows if job.assignment.option(int(row)).is_prune)
    more = fewer.copy()
    more[[kept, spare]] = job.assignment.choice[kept]
    for choice, message in ((more, "equally many"), (other, "a layer has one precision")):
        with pytest.raises(PlanError, match=message):
            plan_of(Assignment(table, choice), slack=10**6)
    with pytest.raises(PlanError, match=r"equally many|are used per token"):
        plan_of(Assignment(table, fewer), slack=10**6)
    mixed = job.plan.model_copy(update={"layout": "mixed"})
    with pytest.raises(PlanError, match="the plan's layout is mixed, the cost table's stock"):
        Job(job.checkpoint, job.adapter, job.assignment, mixed, job.store).write(tmp_path / "out")


def test_routers_with_more_than_a_weight_are_refused(tmp_path: Path) -> None:
    source = save_tiny("qwen3_moe", tmp_path / "model", max_shard_size="1GB")
    adapter = get_adapter(Checkpoint(source).config)
    stock.check_routers(Checkpoint(source), adapter)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.zeros(8)
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate\.e_score_correction_bias"):
        stock.check_routers(Checkpoint(source), adapter)


def test_rows_of_a_tensor_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "CHUNK_BYTES", 6)
    source = save_tiny("qwen3_moe", tmp_path / "model")
    checkpoint = Checkpoint(source)
    name = "model.layers.0.mlp.gate.weight"
    entry = stock.rows(checkpoint.tensors[name], (1, 4, 7))
    data = np.frombuffer(b"".join(bytes(chunk) for chunk in entry.chunks()), dtype=np.int16)
    assert np.array_equal(data.reshape(3, 64), checkpoint.read(name)[[1, 4, 7]].view(torch.int16).numpy())
    assert entry.shape == (3, 64)
    path = checkpoint.tensors[name].file
    path.write_bytes(path.read_bytes()[:-1][: checkpoint.tensors[name].offset + 8])
    with pytest.raises(OSError, match="became shorter"):
        list(entry.chunks())


def test_mixed_outputs_are_not_renumbered(tmp_path: Path) -> None:
    job = random_job(save_tiny("qwen3_moe", tmp_path / "model"), tmp_path / "store", 0)
    assert stock.renumbering(job.assignment, job.adapter, job.checkpoint.config) == stock.Renumbering({}, {})


def test_what_transformers_reads() -> None:
    def reads(*names: str) -> bool:
        return stock.transformers_reads([Option.parse(name) for name in names])

    assert reads("bf16", "bf16")
    assert reads("int4-g64", "int4", "int4-g32")
    assert not reads("int4", "bf16")
    assert not reads("int4", "int8")
