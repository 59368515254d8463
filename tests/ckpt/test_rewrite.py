"""The written checkpoint: its bytes, its files, and what is left when writing fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_rco.ckpt import destination as destination_module
from moe_rco.ckpt import rewrite as rewrite_module
from moe_rco.ckpt.destination import check_destination, publish, recover
from moe_rco.ckpt.header import TensorInfo
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import output_bytes
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import WorkDirectory
from moe_rco.errors import OutputError, PlanError, StoreError
from moe_rco.plan import Plan
from moe_rco.quant.packing import dequantize
from moe_rco.types import BF16, Assignment, Option
from tests.compressed import EVERY_OPTION, Job, plan_of, quantise, random_job, table_of
from tests.killing import killed_at, tree
from tests.tiny_models import FAMILIES, save_tiny


def make_job(base: Path, family: str = "qwen3_moe", seed: int = 0, **overrides: object) -> Job:
    model = save_tiny(family, base / "model", **overrides)  # pyright: ignore[reportArgumentType]
    (model / "tokenizer.json").write_bytes(b'{"odd": "\r\n"}')
    return random_job(model, base / "store", seed)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("job"))


def raw(tensor: TensorInfo) -> bytes:
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.nbytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written(family: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, family, seed=1)
    result = job.write(tmp_path / "out")
    source, out = job.checkpoint, Checkpoint(tmp_path / "out", allow_quantized=True)
    experts = {weight.name for group in job.assignment.table.groups for weight in group.weights}
    expected: dict[str, bytes] = {
        name: raw(info) for name, info in source.tensors.items() if name not in experts
    }
    other_bytes = sum(map(len, expected.values()))
    for row, group in enumerate(job.assignment.table.groups):
        option = job.assignment.option(row)
        for weight in group.weights:
            base = weight.name.removesuffix(".weight")
            if option == BF16:
                expected[weight.name] = raw(source.tensors[weight.name])
            elif option.is_quantized:
                stored = job.store.tensors(group.layer, option)
                expected |= {name: raw(stored[name]) for name in stored if name.startswith(base + ".")}
    assert {name: raw(info) for name, info in out.tensors.items()} == expected
    assert result.expert_bytes == job.plan.cost == sum(map(len, expected.values())) - other_bytes
    assert result.other_bytes == other_bytes
    assert result.total_bytes == result.expert_bytes + other_bytes
    assert result.shards == len(out.files) > 1
    planned = output_bytes(source, job.assignment.table.groups, job.plan.cost)
    assert planned == result.total_bytes + sum(path.stat().st_size for path in source.companions())


def test_the_other_files(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == job.plan.quantization_config()
    assert config == job.checkpoint.config
    assert (tmp_path / "out" / "recipe.yaml").read_text() == job.recipe
    assert Plan.load(tmp_path / "out") == job.plan
    for path in job.checkpoint.companions():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_writing_twice_gives_the_same_bytes(job: Job, tmp_path: Path) -> None:
    for place in ("a", "b"):
        job.write(tmp_path / place)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_sources_are_cast_to_bf16(tmp_path: Path, dtype: torch.dtype) -> None:
    job = make_job(tmp_path, dtype=dtype, max_shard_size="1GB")
    job.write(tmp_path / "out")
    out = {
        name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()
    }
    rows = [row for row in range(len(job.assignment.choice)) if job.assignment.option(row) == BF16]
    assert rows
    for row in rows:
        for weight in job.assignment.table.groups[row].weights:
            assert torch.equal(out[weight.name], job.checkpoint.read(weight.name).bfloat16())
    experts = {weight.name for group in job.assignment.table.groups for weight in group.weights}
    others = job.checkpoint.tensors.keys() - experts
    assert any(name.endswith("mlp.gate.weight") for name in others)
    for name in others:
        assert out[name].dtype == dtype
        assert torch.equal(out[name], job.checkpoint.read(name))


def test_weights_survive(job: Job, tmp_path: Path) -> None:
    """What is written stands for about the weights there were: nothing is mixed up between experts."""
    job.write(tmp_path / "out")
    out = {
        name: t for path in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(path).items()
    }
    for row, group in enumerate(job.assignment.table.groups):
        option = job.assignment.option(row)
        for weight in group.weights if not option.is_prune else ():
            base = weight.name.removesuffix("weight")
            packed = {
                name.removeprefix(base): tensor for name, tensor in out.items() if name.startswith(base)
            }
            source = job.checkpoint.read(weight.name).float()
            error = (dequantize(packed, option) - source).norm() / source.norm()
            assert error < {2: 0.6, 3: 0.35, 4: 0.2, 8: 0.02, 16: 1e-6}[option.bits]


# Failures. Each must leave nothing but what was there.


def left(base: Path) -> set[str]:
    return {str(path.relative_to(base)) for path in base.rglob("*")}


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["write_text", "_check_written", "chunk"])
@pytest.mark.parametrize("existing", [False, True])
def test_failures_leave_nothing(
    job: Job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    place: str,
    existing: bool,
) -> None:
    out = tmp_path / "new" / "parent" / "out"
    if existing:
        job.write(out)
    before = left(tmp_path)
    if place == "chunk":
        entries = rewrite_module._entries

        def broken(*args: object) -> object:
            found, experts = entries(*args)  # pyright: ignore[reportArgumentType]

            def chunks() -> Iterator[bytes]:
                yield b"ab"
                raise error

            object.__setattr__(found[-1], "chunks", chunks)
            return found, experts

        monkeypatch.setattr(rewrite_module, "_entries", broken)
    else:
        monkeypatch.setattr(rewrite_module, place, failing(error))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OutputError):
        job.write(out, overwrite=existing)
    assert left(tmp_path) == before


def test_an_interrupt_between_the_renames_keeps_the_old(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write(tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    before, rename = left(tmp_path), os.rename

    def interrupted(source: Path, target: Path) -> None:
        if ".tmp-" in source.name:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(destination_module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        job.write(tmp_path / "out", overwrite=True)
    assert left(tmp_path) == before


def test_overwrite(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "out")
    (tmp_path / "out" / "mark").write_text("old")
    with pytest.raises(OutputError, match="exists"):
        job.write(tmp_path / "out")
    assert (tmp_path / "out" / "mark").exists()
    job.write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mark").exists()
    assert left(tmp_path) == {"out", *(f"out/{path.name}" for path in (tmp_path / "out").iterdir())}


def test_an_empty_directory_is_overwritten_only_on_request(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        job.write(tmp_path / "out")
    job.write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize(
    "kind", ["home", "file", "link", "broken link", "model", "other quantised", "damaged", "odd"]
)
def test_what_is_not_ours_is_never_replaced(job: Job, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("thesis")
    elif "link" in kind:
        if kind == "link":
            (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    if kind in ("model", "other quantised", "damaged", "odd"):
        other = {"other quantised": {"quant_method": "gptq"}, "odd": "moe_rco"}.get(kind)
        text = "{" if kind == "damaged" else json.dumps({"quantization_config": other})
        (out / "config.json").write_text(text)
        (out / "plan.json").write_text("{}")
    before = left(tmp_path)
    with pytest.raises(OutputError, match=r"not overwritten|exists"):
        job.write(out)
    with pytest.raises(OutputError, match="not overwritten"):
        job.write(out, overwrite=True)
    assert left(tmp_path) == before


def test_the_current_directory_is_not_replaced(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.write(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(OutputError, match="current directory"):
        job.write(tmp_path / "out", overwrite=True)


def test_the_source_is_not_replaced(job: Job) -> None:
    before = left(job.checkpoint.directory.parent)
    for out in (job.checkpoint.directory, job.checkpoint.directory.parent):
        with pytest.raises(OutputError):
            job.write(out, overwrite=True)
    assert left(job.checkpoint.directory.parent) == before


def test_the_parent_is_a_file(job: Job, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a directory"):
        job.write(tmp_path / "file" / "out")


def test_the_parent_is_not_writable(job: Job) -> None:
    # Tests may run as root, but not even root can make directories here.
    with pytest.raises(OutputError, match="not writable"):
        job.write(Path("/proc/new/out"))


def test_the_disk_is_too_small(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = destination_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(destination_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="free"):
        job.write(tmp_path / "out")
    assert not left(tmp_path)


# Killed in the middle.


def finish(job: Job, out: Path, overwrite: bool) -> None:
    """The end of a run of `prune`."""
    work = WorkDirectory.of(out)
    with work.locked():
        recover(out)
        check_destination(out, overwrite=overwrite)
        job.write(work.checkpoint, shard_bytes=300_000, manifest=work.part("").shards)
        work.will_publish()
        publish(work.checkpoint, out, overwrite=overwrite)
        work.clear()


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(job: Job, tmp_path: Path, existing: bool) -> None:
    job.write(tmp_path / "undisturbed", shard_bytes=300_000)
    expected = tree(tmp_path / "undisturbed")
    other = plan_of(job.assignment, slack=7)
    for moment in count():
        place = tmp_path / str(moment)
        place.mkdir()
        out = place / "out"
        if existing:
            Job(job.checkpoint, job.adapter, job.assignment, other, job.store).write(out, shard_bytes=10**9)
            old = tree(out)
        killed = killed_at(moment, lambda: finish(job, out, existing))  # noqa: B023
        if killed:
            aside = out.with_name(".out.moe-rco-old")
            if existing:
                assert (out.exists() and tree(out) in (old, expected)) or tree(aside) == old
            elif out.exists():
                assert tree(out) == expected
            if out.exists() and not existing:
                with pytest.raises(OutputError, match="exists"):
                    finish(job, out, existing)
            else:
                finish(job, out, existing)
        assert tree(out) == expected
        assert os.listdir(place) == ["out"]
        shutil.rmtree(place)
        if not killed:
            break
    assert moment > 30


def test_shards_made_from_something_else_are_not_taken(job: Job, tmp_path: Path) -> None:
    other = Job(job.checkpoint, job.adapter, job.assignment, plan_of(job.assignment, slack=7), job.store)
    staged, manifest = tmp_path / "staged", tmp_path / "manifest"
    other.write(staged, manifest=manifest)
    (staged / "model-00099-of-00099.safetensors").write_bytes(b"of an earlier format")
    (staged / "report.json").write_text("of the other plan")
    times = {path.name: path.stat().st_mtime_ns for path in staged.glob("*.safetensors")}
    job.write(staged, manifest=manifest)
    assert all(path.stat().st_mtime_ns > times[path.name] for path in staged.glob("*.safetensors"))
    job.write(tmp_path / "undisturbed")
    assert tree(staged) == tree(tmp_path / "undisturbed")


def test_a_directory_without_a_manifest_is_not_emptied(job: Job, tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "thesis.tex").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="is not empty"):
        job.write(tmp_path / "staged", manifest=tmp_path / "manifest")
    assert tree(tmp_path) == before


def test_experts_quantised_anew_are_copied_anew(job: Job, tmp_path: Path) -> None:
    """A store whose fingerprint is the same may hold other bytes: rounding differs between machines."""
    store = Store(shutil.copytree(job.store.directory, tmp_path / "store"), job.store.fingerprint)
    mine = Job(job.checkpoint, job.adapter, job.assignment, job.plan, store)
    staged, manifest = tmp_path / "staged", tmp_path / "manifest"
    mine.write(staged, manifest=manifest)
    layer = job.assignment.table.layers[0]
    option = next(option for option in job.assignment.layer_options(layer) if option.is_quantized)
    store.write(layer, option, {name: tensor + 1 for name, tensor in store.read(layer, option).items()})
    mine.write(staged, manifest=manifest)
    mine.write(tmp_path / "undisturbed")
    assert tree(staged) == tree(tmp_path / "undisturbed")


def test_plan_and_assignment_must_agree(job: Job, tmp_path: Path) -> None:
    uniform = Assignment.uniform(job.assignment.table, Option.parse("int8"))
    other = Job(job.checkpoint, job.adapter, uniform, job.plan, job.store)
    with pytest.raises(PlanError, match="differ"):
        other.write(tmp_path / "out")
    wrong = job.plan.model_copy(update={"cost": job.plan.cost - 1})
    with pytest.raises(PlanError):
        Job(job.checkpoint, job.adapter, job.assignment, wrong, job.store).write(tmp_path / "out")
    assert not left(tmp_path)


def test_costs_that_the_packer_does_not_keep_to(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = job.assignment.table
    cheap = type(table)(table.groups, table.options, table.costs // 2, table.original_bytes, table.floor)
    assignment = Assignment(cheap, job.assignment.choice)
    lying = Job(job.checkpoint, job.adapter, assignment, plan_of(assignment), job.store)
    monkeypatch.setattr(rewrite_module, "replacing", failing(AssertionError("writing began")))
    with pytest.raises(PlanError, match="as written"):
        lying.write(tmp_path / "out")


def test_the_written_headers_are_checked(job: Job, tmp_path: Path) -> None:
    job.write(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    entries, experts = rewrite_module._entries(job.checkpoint, job.assignment, job.store)
    rewrite_module._check_written(shards, entries, experts, job.plan)
    wrong = job.plan.model_copy(update={"cost": job.plan.cost - 1})
    with pytest.raises(PlanError, match="as written"):
        rewrite_module._check_written(shards, entries, experts, wrong)
    with pytest.raises(OutputError, match="not those that were to be written"):
        rewrite_module._check_written(shards, entries[1:], experts, job.plan)
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(OutputError, match="cannot be read again"):
        rewrite_module._check_written(shards, entries, experts, job.plan)


def test_a_store_that_lacks_a_tensor(job: Job, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no layer 0 at"):
        Job(job.checkpoint, job.adapter, job.assignment, job.plan, Store(tmp_path / "s", "f")).write(
            tmp_path / "out"
        )
    store = Store(tmp_path / "s", "f")
    for layer in job.assignment.table.layers:
        for option in filter(lambda option: option.is_quantized, job.assignment.table.options):
            store.write(layer, option, {"nothing": torch.zeros(1)})
    with pytest.raises(StoreError, match="no tensor model"):
        Job(job.checkpoint, job.adapter, job.assignment, job.plan, store).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_another_model(job: Job, tmp_path: Path) -> None:
    other = Checkpoint(save_tiny("qwen3_moe", tmp_path / "m", num_experts=4))
    with pytest.raises(PlanError, match="another model"):
        Job(other, job.adapter, job.assignment, job.plan, job.store).write(tmp_path / "out")


PEAK = """
import sys
from pathlib import Path
from moe_rco.types import Assignment, Option
from tests.compressed import Job, plan_of, table_of
from moe_rco.adapters import get_adapter
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Store
from moe_rco.ckpt.workdir import WorkDirectory

base = Path(sys.argv[1])
checkpoint = Checkpoint(base / "model")
table = table_of(checkpoint, ("bf16", "int8"))
assignment = Assignment.uniform(table, Option.parse(sys.argv[2]))
job = Job(checkpoint, get_adapter(checkpoint.config), assignment, plan_of(assignment), Store(base / "store",
"test"))

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = resident("VmRSS")
job.write(base / ("out-" + sys.argv[2]), shard_bytes=10**9)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of peak memory")
@pytest.mark.parametrize(("option", "dtype"), [("bf16", torch.float32), ("int8", torch.bfloat16)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, option: str, dtype: torch.dtype) -> None:
    """Casting from float32 and copying from the store: at most a few tensors (1 MiB each in float32) at a
    time.
    """
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 4, "head_dim": 16}
    model = save_tiny(
        "qwen3_moe", tmp_path / "model", dtype=dtype, num_hidden_layers=8, max_shard_size="20MB", **wide
    )
    if option != "bf16":
        checkpoint = Checkpoint(model)
        quantise(checkpoint, table_of(checkpoint, ("bf16", "int8")), tmp_path / "store")
    command = [sys.executable, "-c", PEAK, str(tmp_path), option]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    grown = int(done.stdout) * 1024
    total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert total > 45e6
    assert grown < 16e6, f"grew by {grown / 1e6:.1f} MB while a model of {total / 1e6:.1f} MB was written"


def test_every_option_is_written(job: Job) -> None:
    """The random assignments of this file cover all options, so that nothing above is vacuous."""
    assert {name for name, count in job.assignment.counts().items() if count} >= set(EVERY_OPTION) - {
        "int8-g64"
    }
