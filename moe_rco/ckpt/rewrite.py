"""Writes the compressed checkpoint: quantised experts copied from the store, the rest from the model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_rco.adapters import get_adapter
from moe_rco.ckpt.destination import check_destination, replacing
from moe_rco.ckpt.header import HeaderError, TensorInfo, read_header
from moe_rco.ckpt.reader import CONFIG, Checkpoint
from moe_rco.ckpt.shards import ShardManifest, ShardWriter
from moe_rco.ckpt.stock import renumbering, rows, stock_config
from moe_rco.ckpt.store import Place, Store, place_of
from moe_rco.ckpt.writer import Entry, from_file, write_text
from moe_rco.errors import OutputError, PlanError, StoreError
from moe_rco.plan import FILE_NAME, Plan
from moe_rco.quant.packing import layout
from moe_rco.types import Assignment, Group, Option, Progress, Silent, Weight

RECIPE = "recipe.yaml"
SHARD_BYTES = 5 * 10**9
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class RewriteResult:
    """What was written, in bytes of tensors. `expert_bytes` is the plan's cost (that of experts, and of what else the budget
    covers), `total_bytes` both together.
    """

    directory: Path
    expert_bytes: int
    other_bytes: int
    total_bytes: int
    shards: int


def rewrite(
    checkpoint: Checkpoint,
    assignment: Assignment,
    plan: Plan,
    store: Store,
    destination: str | Path,
    recipe_text: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    manifest: Path | None = None,
    progress: Progress | None = None,
) -> RewriteResult:
    """Write the model under `assignment` to the directory `destination`, which appears whole or not at all.

    With `manifest`, a file, it is written in place instead, is whole when the call returns, and has nothing else in it.
    The manifest tells the next call which shards an interrupted one completed: these are not written again.
    Memory: a few MiB. Raises OutputError (destination exists, is not writable, disk full), PlanError (plan,
    assignment and written bytes disagree), StoreError (a quantised expert is missing or damaged).
    """
    destination = Path(destination)
    if (plan.check(assignment.table).choice != assignment.choice).any():
        raise PlanError("the plan and the assignment to be written differ")
    entries, experts = _entries(checkpoint, assignment, store)
    expert_bytes = sum(entry.nbytes for entry in entries if entry.name in experts)
    _check_bytes(expert_bytes, plan)
    total = sum(entry.nbytes for entry in entries)
    companions = checkpoint.companions()
    if manifest is None:
        needed = total + sum(path.stat().st_size for path in companions)
        check_destination(destination, overwrite=overwrite, needed_bytes=needed, keep=checkpoint.directory)
        place = replacing(destination, overwrite=overwrite, keep=checkpoint.directory)
    else:
        place = contextlib.nullcontext(destination)
    if plan.layout == "stock":
        config = stock_config(assignment, get_adapter(checkpoint.config), checkpoint.config)
    else:
        config = {**checkpoint.config, "quantization_config": plan.quantization_config()}
    try:
        with place as partial:
            kept = None
            if manifest is not None:
                inputs = _inputs(assignment, plan, store, entries, shard_bytes)
                kept = _resumed(manifest, partial, inputs)
            for path in companions:
                _copy(path, partial / path.name)
            write_text(partial / CONFIG, json.dumps(config, indent=2) + "\n")
            write_text(partial / FILE_NAME, plan.to_json())
            write_text(partial / RECIPE, recipe_text)
            with (progress or Silent()).stage("write the model", total) as advance:
                shards = ShardWriter(partial, shard_bytes, {"format": "pt"}, kept).write(entries, advance)
            _check_written(shards, entries, experts, plan)
    except OSError as error:
        raise OutputError(f"cannot write {destination}: {error}") from error
    return RewriteResult(destination, expert_bytes, total - expert_bytes, total, len(shards))


def _inputs(assignment: Assignment, plan: Plan, store: Store, entries: list[Entry], shard_bytes: int) -> str:
    """What decides the bytes of every shard: begins with what a search depends on, so that its progress can be told."""
    digest = hashlib.sha256(plan.to_json().encode())
    for layer in assignment.table.layers:
        for option in dict.fromkeys(assignment.layer_options(layer)):
            digest.update(f"{layer} {option} {store.digest(layer, option)}\n".encode())
    for group, option, _ in assignment.dense():
        digest.update(f"{group.name} {option} {store.digest(group.name, option)}\n".encode())
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in entries]
    digest.update(json.dumps([shard_bytes, tensors]).encode())
    return f"{store.fingerprint} {plan.recipe} {digest.hexdigest()}"


def _resumed(manifest: Path, directory: Path, inputs: str) -> ShardManifest:
    """The manifest of a directory, from which everything but the shards it lists has been removed."""
    directory.mkdir(parents=True, exist_ok=True)
    if not manifest.exists() and any(directory.iterdir()):
        raise OutputError(f"{directory} is not empty, and {manifest} does not tell what is in it; remove it")
    found = ShardManifest(manifest, inputs)
    found.begin(0)
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in found.digests:
            path.unlink()
    return found


def output_bytes(checkpoint: Checkpoint, groups: Sequence[Group], chosen_bytes: int) -> int:
    """Bytes of an output whose `groups` take `chosen_bytes`: what to ask the disk for before any work."""
    others = sum(tensor.nbytes for tensor in other_tensors(checkpoint, groups))
    return chosen_bytes + others + sum(path.stat().st_size for path in checkpoint.companions())


def other_tensors(checkpoint: Checkpoint, groups: Sequence[Group]) -> list[TensorInfo]:
    """All that are not of some groups."""
    names = {weight.name for group in groups for weight in group.weights}
    return [tensor for name, tensor in checkpoint.tensors.items() if name not in names]


def _entries(checkpoint: Checkpoint, assignment: Assignment, store: Store) -> tuple[list[Entry], set[str]]:
    """Everything to write in the order of the source, and the names of the tensors among it that the budget covers."""
    options: dict[str, tuple[Place, Option, Weight]] = {
        weight.name: (place_of(group), assignment.option(row), weight)
        for row, group in enumerate(assignment.table.groups)
        for weight in group.weights
    }
    if missing := options.keys() - checkpoint.tensors.keys():
        raise PlanError(f"the plan is of another model: {checkpoint.directory} has no tensor {min(missing)}")
    renumbered = renumbering(assignment, get_adapter(checkpoint.config), checkpoint.config)
    stored: dict[tuple[Place, Option], dict[str, TensorInfo]] = {}
    entries: list[Entry] = []
    experts: set[str] = set()
    for tensor in checkpoint.tensors.values():
        if tensor.name not in options:
            kept = renumbered.routers.get(tensor.name)
            entries.append(from_file(tensor) if kept is None else rows(tensor, kept))
            continue
        place, option, weight = options[tensor.name]
        if option.is_quantized and (place, option) not in stored:
            stored[place, option] = store.tensors(place, option)
        source = stored.get((place, option), {})
        written = weight.name.removesuffix(".weight")
        expert, _, projection = written.rpartition(".")
        if expert in renumbered.experts:
            written = f"{renumbered.experts[expert]}.{projection}"
        for entry in _written(tensor, weight, option, source, written):
            entries.append(entry)
            experts.add(entry.name)
    return entries, experts


def _written(
    tensor: TensorInfo, weight: Weight, option: Option, stored: dict[str, TensorInfo], written: str
) -> Iterator[Entry]:
    """The tensors one weight is written as, under the name `written`: none if it is pruned."""
    for suffix, (shape, dtype) in layout(weight.shape, option, torch.bfloat16).items():
        name = f"{weight.name.removesuffix('.weight')}.{suffix}"
        if not option.is_quantized:
            yield from_file(tensor, f"{written}.{suffix}", dtype)
            continue
        found = stored.get(name)
        if found is None or found.shape != shape or found.torch_dtype != dtype:
            what = "no" if found is None else "a wrongly shaped"
            raise StoreError(f"the store has {what} tensor {name}; delete the store and run again")
        yield from_file(found, f"{written}.{suffix}")


def _check_bytes(expert_bytes: int, plan: Plan) -> None:
    if expert_bytes != plan.cost or expert_bytes > plan.budget:
        raise PlanError(
            f"what the budget covers takes {expert_bytes} bytes as written, "
            f"the plan says {plan.cost} of a budget of {plan.budget}"
        )


def _check_written(shards: list[Path], entries: list[Entry], experts: set[str], plan: Plan) -> None:
    """Read the written headers again: they, not our intentions, must agree with the plan."""
    try:
        written = {name: tensor for path in shards for name, tensor in read_header(path).items()}
    except HeaderError as error:
        raise OutputError(f"the written weights cannot be read again: {error}; is the disk sound?") from error
    expected = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != expected:
        raise OutputError("the written weights are not those that were to be written; is the disk sound?")
    _check_bytes(sum(tensor.nbytes for name, tensor in written.items() if name in experts), plan)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, COPY_BYTES)
