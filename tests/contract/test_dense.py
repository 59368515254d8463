"""Every family with all of its groups chosen for: what is searched, written, read again and served is one model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from moe_rco.adapters import FAMILIES
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.calib.streaming import Streaming
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.console.inspection import show_inspect
from moe_rco.errors import ModelError, PlanError
from moe_rco.inspection import inspect
from moe_rco.optim.mckp import solve_mckp
from moe_rco.plan import FORMAT_VERSION, Plan
from moe_rco.reload import load_model, read_written
from moe_rco.report import by_layer
from moe_rco.serve.config import check_tensors, dense_options, expected_tensors
from moe_rco.types import Option
from tests.compressed import Job, random_job
from tests.serve.reference import reference_model
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")
IDS = torch.randint(3, 96, (2, 13), generator=torch.Generator().manual_seed(1))
CASES: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {
    "tied": {"family": "qwen3_moe", "tie_word_embeddings": True},
    "dense layers": {"family": "qwen2_moe", "num_hidden_layers": 3, "mlp_only_layers": [1]},
}


@pytest.fixture(scope="module", params=CASES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("dense")
    settings = {"family": request.param, **CASES[request.param]}
    job = random_job(save_tiny(path=place / "model", **settings), place / "store", 4, dense=True)
    assert all(
        option.is_quantized for group, option, _ in job.assignment.dense() if group.kind == "embeddings"
    )
    job.write(place / "out")
    return job


def out(job: Job) -> Path:
    return job.checkpoint.directory.parent / "out"


def model_of(job: Job, streaming: Streaming | None = None) -> AssignedModel:
    config, table = job.checkpoint.config, job.assignment.table
    bank = OptionBank(job.checkpoint, table, CPU, torch.float32, streaming)
    runner = Runner(job.checkpoint, job.adapter, CPU, torch.float32, streaming)
    return AssignedModel(runner, job.adapter, config, bank, job.store)


def test_groups_are_the_models_own_tensors(job: Job) -> None:
    config, adapter = job.checkpoint.config, job.adapter
    groups = adapter.every_dense(config)
    job.checkpoint.check_groups(groups)
    names = [weight.name for group in groups for weight in group.weights]
    assert len(names) == len(set(names))
    others = job.checkpoint.tensors.keys() - set(names)
    left = {
        name for name in others if ".experts." not in name and job.checkpoint.tensors[name].dtype == "BF16"
    }
    kinds = {group.kind for group in groups}
    # Matrices that nobody chooses for: routers, gates, dense feed-forward layers, and what vLLM does not read packed.
    for name in left:
        if len(job.checkpoint.tensors[name].shape) == 2:
            known = (
                "gate.weight",
                "shared_expert_gate.weight",
                "gate_proj.weight",
                "up_proj.weight",
                "down_proj.weight",
            )
            assert name.endswith(known) or ("embeddings" not in kinds and "embed" in name), name
    assert "attention" in kinds
    assert ("shared_experts" in kinds) == (adapter.model_type == "qwen2_moe")
    assert ("head" in kinds) != adapter.tied(config)


def test_costs_are_the_bytes_written(job: Job) -> None:
    written = Checkpoint(out(job), allow_quantized=True).tensors
    for group, option, cost in job.assignment.dense():
        bases = tuple(weight.name.removesuffix("weight") + "weight" for weight in group.weights)
        found = sum(tensor.nbytes for name, tensor in written.items() if name.startswith(bases))
        assert found == cost > 0, (group.name, option)
    assert job.plan.cost == job.assignment.cost


def test_the_searched_model_is_the_written_one_for_every_reader(job: Job) -> None:
    model, choice = model_of(job), job.assignment.choice
    ours = model.logits(model.hidden(IDS, choice), choice)
    streamed = model_of(job, Streaming(1 << 20, 16, 1))
    reread = read_written(out(job), CPU, torch.float32, Streaming(1 << 20, 16, 1))
    with torch.no_grad(), reread.head() as head:
        found = {
            "transformers": load_model(out(job), CPU, torch.float32)(IDS).logits,
            "independently decoded": reference_model(job, out(job))(IDS).logits,
            "streamed": streamed.logits(streamed.hidden(IDS, choice), choice),
            "our own layers": head(reread.hidden(IDS)),
        }
    for name, logits in found.items():
        difference = float((logits - ours).abs().max())
        assert difference < 1e-4, (name, difference)
    untouched = model.logits(model.hidden(IDS))
    original: Any = AutoModelForCausalLM.from_pretrained(job.checkpoint.directory, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(untouched, original(IDS).logits, rtol=0, atol=1e-4)
    assert float((untouched - ours).abs().max()) > 0.1  # the comparison can fail


def test_dense_groups_are_never_pruned(job: Job) -> None:
    table = job.assignment.table
    prune = table.option_index(Option.parse("prune"))
    assert not table.allowed[table.dense, prune].any()
    wants_to = np.zeros(table.costs.shape)
    wants_to[:, prune] = 1.0
    found = solve_mckp(
        wants_to, table.costs, table.range[0], floor=table.floors, layer=table.layer, allowed=table.allowed
    )
    assert found.cost == table.range[0]
    assert (found.choice[table.dense] != prune).all()
    with pytest.raises(PlanError, match="cannot be pruned"):
        Plan.model_validate({**job.plan.model_dump(), "dense": {"prune": ["lm_head"]}}).assignment(table)


def test_the_plan_says_what_became_of_them(job: Job) -> None:
    plan = Plan.load(out(job))
    assert (plan.check(job.assignment.table).choice == job.assignment.choice).all()
    chosen = {group.name: option.name for group, option, _ in job.assignment.dense()}
    assert {name: option for option, names in plan.dense.items() for name in names} == chosen
    plain = job.plan.model_copy(update={"dense": {}})
    assert "dense" not in json.loads(plain.to_json())  # what it was before there were such groups
    assert plain.quantization_config().keys() == {"quant_method", "format_version", "layers"}
    assert plain.quantization_config()["format_version"] == FORMAT_VERSION


def test_inspect_shows_them(job: Job) -> None:
    found = inspect(out(job))
    assert {group.name: (group.option, group.bytes) for group in found.dense} == {
        group.name: (option.name, cost) for group, option, cost in job.assignment.dense()
    }
    written = Checkpoint(out(job), allow_quantized=True).tensors.values()
    assert found.expert_bytes + found.dense_bytes == job.plan.cost
    assert found.other_bytes == sum(tensor.nbytes for tensor in written) - job.plan.cost
    screen = StringIO()
    show_inspect(found, Console(file=screen, width=200))
    for _, options, size in by_layer(found.dense):
        assert options in screen.getvalue()
        assert f"{size:,}" in screen.getvalue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entry: entry["dense"]["int4"].append("model.norm"),
            "names model.norm, which the model does not have",
        ),
        (lambda entry: entry["dense"].update(prune=["lm_head"]), "lm_head cannot be pruned"),
        (lambda entry: entry["dense"].update({"int4-g7": entry["dense"].pop("int4")}), "cannot be int4-g7"),
        (lambda entry: entry.update(format_version=1), "'dense' does not belong to format_version 1"),
        (lambda entry: entry.update(format_version=3), "format_version 3, this moe_rco reads 1 and 2"),
        (lambda entry: entry["dense"]["bf16"].extend(entry["dense"]["int4"]), "is given two options"),
    ],
)
def test_a_config_that_cannot_be_is_refused(job: Job, change: Any, message: str) -> None:
    entry = job.plan.quantization_config()
    names = [name for names in entry["dense"].values() for name in names]
    entry["dense"] = {"int4": names[:2], "bf16": names[2:]}
    config = job.checkpoint.config
    assert len(dense_options(entry, job.adapter, config)) == len(names)
    change(entry)
    with pytest.raises(ModelError, match=message):
        dense_options(entry, job.adapter, config)


@pytest.mark.parametrize("change", ["missing", "both"])
def test_tensors_that_are_not_as_promised_are_refused(job: Job, change: str, tmp_path: Path) -> None:
    promised = expected_tensors(
        {}, job.adapter, job.checkpoint.config, {g: o for g, o, _ in job.assignment.dense()}
    )
    found = dict(Checkpoint(out(job), allow_quantized=True).tensors)
    found = {name: tensor for name, tensor in found.items() if ".experts." not in name}
    check_tensors(promised, found)
    name = next(name for name in promised if name.endswith(".weight_packed"))
    if change == "missing":
        del found[name]
    else:
        found[name.replace("_packed", "")] = found[name]
    with pytest.raises(ModelError, match="is missing" if change == "missing" else "does not account for"):
        check_tensors(promised, found)
