"""`verify`: one changed bit is found and named, and so is whatever no longer fits together; what is whole passes."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moe_rco import cli
from moe_rco import recipe as recipes
from moe_rco.ckpt.header import read_header
from moe_rco.ckpt.manifest import check_quickly, digests_of
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.errors import PlanError
from moe_rco.integrity import Verification, verify
from moe_rco.pipeline import prune, prune_all
from tests.forging import change_json, change_report, sign
from tests.tiny_job import save_job

STOCK = ["layout=stock", "options=[prune,int4-g64]"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_job(tmp_path_factory.mktemp("job"), steps=0, refine=0)


@pytest.fixture(scope="module")
def mixed(job: Path) -> Path:
    output = job.parent / "mixed"
    prune(recipes.load(str(job), [f"output={output}"]))
    return output


@pytest.fixture(scope="module")
def stock(job: Path) -> Path:
    output = job.parent / "stock"
    prune(recipes.load(str(job), [f"output={output}", *STOCK]))
    return output


@pytest.fixture(scope="module", params=["mixed", "stock"])
def pristine(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def output(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "out")


def weights(output: Path) -> Path:
    return next(output.glob("*.safetensors"))


def failed(found: Verification) -> dict[str, tuple[str, ...]]:
    return {check.name: check.differences for check in found.checks if not check.passed}


def of(output: Path) -> dict[str, tuple[str, ...]]:
    (found,) = verify(output)
    return failed(found)


def test_what_was_written_passes_also_beside_the_original(pristine: Path, job: Path) -> None:
    (found,) = verify(pristine, job.parent / "model")
    assert failed(found) == {}
    names = [check.name for check in found.checks]
    assert names == ["files", "tensors", "plan", "routers", "chain", "report", "forward pass", "original"]


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_anywhere_in_the_weights_is_found(pristine: Path, data: st.DataObject) -> None:
    path = weights(pristine)
    before = path.read_bytes()
    tensors = list(read_header(path).values())
    position = data.draw(st.integers(0, len(before) - 1))
    flipped = bytearray(before)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        wrong = of(pristine)
    finally:
        path.write_bytes(before)
    where = [t.name for t in tensors if t.offset <= position < t.offset + t.nbytes]
    if where:
        assert wrong["tensors"] == (f"tensor {where[0]} in {path.name} has other bytes than were written",)
        assert wrong["files"] == (f"{path.name} was changed",)
    else:  # in the header
        assert path.name in wrong["files"][0]


def test_a_flipped_bit_in_any_other_file_is_found(output: Path) -> None:
    for path in sorted(output.iterdir()):
        if path.suffix == ".safetensors":
            continue
        before = path.read_bytes()
        path.write_bytes(before.replace(b"0", b"1", 1))
        assert path.read_bytes() != before, path
        assert of(output), path
        path.write_bytes(before)
    assert of(output) == {}


def test_a_missing_file_and_one_too_many(output: Path) -> None:
    (output / "tokenizer.json").unlink()
    shutil.copy(weights(output), output / "model-00009-of-00009.safetensors")
    assert of(output)["files"] == (
        "tokenizer.json is missing",
        "model-00009-of-00009.safetensors is not one of the files written",
    )


def test_missing_and_cut_weights(output: Path) -> None:
    path = weights(output)
    os.truncate(path, path.stat().st_size // 2)
    wrong = of(output)
    assert "truncated" in wrong["files"][0]
    assert len(wrong["tensors"]) == len(json.loads((output / "manifest.json").read_text())["tensors"])
    path.unlink()
    assert of(output)["files"] == (f"{path.name} is missing",)


def test_swapped_and_retyped_tensors_are_named(output: Path) -> None:
    """Written anew by another program: every tensor is there, and two have each other's bytes."""
    path = weights(output)
    tensors = load_file(path)
    names = [name for name in tensors if name.endswith("input_layernorm.weight")][:2]
    tensors[names[0]] = tensors[names[0]] + 1
    tensors[names[1]] = tensors[names[1]].to(torch.float64)
    save_file(tensors, path, {"format": "pt"})
    assert of(output)["tensors"] == (
        f"tensor {names[1]} in {path.name} is F64 [64], it was written as BF16 [64]",
        f"tensor {names[0]} in {path.name} has other bytes than were written",
    )


def test_another_plan_is_found_even_where_its_digest_was_mended(output: Path) -> None:
    def swap(plan: dict[str, Any]) -> None:
        layer = next(options for options in plan["layers"].values() if len(options) > 1)
        first, second = list(layer)[:2]
        layer[first][0], layer[second][0] = layer[second][0], layer[first][0]

    change_json(output / "plan.json", swap)
    assert of(output)["files"] == ("plan.json was changed",)
    sign(output, "plan.json")
    wrong = of(output)
    assert "files" not in wrong
    assert any("different options" in line for lines in wrong.values() for line in lines)


def test_reports_and_recipes_of_other_runs(output: Path) -> None:
    change_report(output, model_digest="0" * 64)
    text = (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    wrong = of(output)["chain"]
    assert [line.split(" and ")[0] for line in wrong] == [
        "the recipe: recipe.yaml",
        "the model: report.json",
    ]


def test_a_budget_that_was_lowered_by_hand(output: Path) -> None:
    def lowered(plan: dict[str, Any]) -> None:
        plan["budget"] -= plan["slack"] + 1

    change_json(output / "plan.json", lowered)
    assert "its budget is" in of(output)["plan"][0]


def test_a_plan_that_promises_fewer_bytes_than_there_are(output: Path) -> None:
    def cheaper(plan: dict[str, Any]) -> None:
        plan["cost"] -= 1
        plan["slack"] += 1

    change_json(output / "plan.json", cheaper)
    assert "experts take" in of(output)["plan"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(budget=plan["cost"] - 1, slack=-1), "its budget is"),
        (lambda plan: plan.update(model="0" * 64), "are of different models or recipes"),
    ],
)
def test_forged_plans_are_not_served(
    output: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    change_json(output / "plan.json", change)
    sign(output, "plan.json")
    with pytest.raises(PlanError, match=words):
        check_quickly(output)


def test_weights_that_compute_something_else(output: Path) -> None:
    """Whoever forges every digest does not change what the model says of some tokens."""
    path = weights(output)
    with path.open("r+b") as file:
        tensor = read_header(path)["model.embed_tokens.weight"]
        file.seek(tensor.offset)
        file.write(struct.pack("<f", 1.0) * (tensor.nbytes // 4))
    _, tensors = digests_of(path, lambda nbytes: None)
    entries = {name: digest.model_dump() for name, digest in tensors.items()}
    change_json(output / "manifest.json", lambda manifest: manifest.update(tensors=entries))
    sign(output, path.name)
    assert list(of(output)) == ["forward pass"]


def test_what_was_not_to_change_is_compared_with_the_original(
    output: Path, job: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(job.parent / "model", tmp_path / "other")
    name = "model.layers.0.mlp.gate.weight"
    path = Checkpoint(other).tensors[name].file
    tensors = load_file(path)
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, {"format": "pt"})
    (found,) = verify(output, other)
    assert "is not the model" in failed(found)["original"][0]
    # Whoever has not even kept the model's digest: the tensor itself is told.
    digest = Checkpoint(other).digest()
    change_json(output / "manifest.json", lambda manifest: manifest.update(model=digest))
    (found,) = verify(output, other)
    assert failed(found)["original"] == (f"tensor {name} is not the original's",)


def test_every_budget_is_checked(job: Path, tmp_path: Path) -> None:
    prune_all(recipes.load(str(job), [f"output={tmp_path / 'two'}", "budget=[50%,30%]"]))
    path = weights(tmp_path / "two" / "30pct")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = verify(tmp_path / "two")
    assert [(Path(one.directory).name, one.passed) for one in found] == [("50pct", True), ("30pct", False)]


def test_the_command(output: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    result = runner.invoke(cli.app, ["verify", str(output)])
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" ok ") == 7
    (output / "config.json").write_text("{}")
    result = runner.invoke(cli.app, ["verify", str(output)])
    assert result.exit_code == 2
    assert "files: config.json was changed" in result.stdout
    assert result.stderr.splitlines()[-1] == (
        f"error: {output}: not what was written; copy it again, or make it again"
    )
    result = runner.invoke(cli.app, ["verify", str(output), "--json"])
    assert result.exit_code == 2
    (found,) = json.loads(result.stdout)
    assert found["checks"][0]["differences"] == ["config.json was changed"]
    result = runner.invoke(cli.app, ["verify", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "manifest.json" in result.stderr


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("plan.json", lambda path: path.write_text(path.read_text() + " "), "plan.json was changed"),
        ("*.safetensors", lambda path: os.truncate(path, path.stat().st_size - 1), "manifest.json says"),
        ("tokenizer.json", lambda path: path.unlink(), "tokenizer.json is missing"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json is damaged"),
    ],
)
def test_the_quick_check(output: Path, name: str, change: Callable[[Path], object], words: str) -> None:
    check_quickly(output)
    change(next(output.glob(name)))
    with pytest.raises(PlanError, match=words):
        check_quickly(output)


def test_the_quick_check_compares_what_a_loader_was_given(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    check_quickly(tmp_path / "out", entry)
    entry["layers"]["0"] = {"bf16": list(range(8))}
    with pytest.raises(PlanError, match="different options"):
        check_quickly(tmp_path / "out", entry)
    (tmp_path / "out" / "manifest.json").unlink()
    check_quickly(tmp_path / "out", entry)  # of an older version
