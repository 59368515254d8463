"""What `moe-rco verify` looks at in a finished output: every byte, and that everything in it says the same."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from moe_rco import page
from moe_rco._version import __version__
from moe_rco.adapters import get_adapter
from moe_rco.calib.streaming import Streaming
from moe_rco.ckpt.destination import CURVE
from moe_rco.ckpt.header import HeaderError, TensorInfo
from moe_rco.ckpt.manifest import FILE_NAME, SUFFIX, Manifest, TensorDigest, digests_of
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.rewrite import RECIPE
from moe_rco.ckpt.writer import from_file, sha256_of
from moe_rco.curve import Curve
from moe_rco.errors import UserError
from moe_rco.plan import FILE_NAME as PLAN
from moe_rco.plan import Plan, by_expert, by_name
from moe_rco.recipe import load
from moe_rco.reload import (
    RELOAD_TOLERANCE,
    read_written,
    sample_loss,
    written_dense,
    written_options,
)
from moe_rco.report import FILE_NAME as REPORT
from moe_rco.report import Report
from moe_rco.serve.config import check_tensors, expected_tensors
from moe_rco.types import Progress, Silent

_STREAMING = Streaming(window=1 << 30, tokens=1 << 10, workspace=1 << 28)
"""However large the model is: an expert at a time, and a gigabyte of them kept."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Part):
    """One thing looked at: `about` says what was found where it is right, `differences` everything that is not."""

    name: str
    about: str
    differences: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.differences


class Verification(_Part):
    """All checks of one output directory."""

    directory: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def verify(
    directory: str | Path,
    original: str | Path | None = None,
    progress: Progress | None = None,
    *,
    run: bool = True,
) -> tuple[Verification, ...]:
    """Check every model of an output: the only one, or that of every budget.

    Compares every file and tensor with the manifest, and recipe, plan, config.json, manifest and report with each other; lets
    some tokens through the model if it is to `run`. With `original`, a directory, what was not to change is compared with it.
    Raises PlanError where there is no manifest to compare with, and ModelError where `original` is no model.
    """
    directory, progress = Path(directory), progress or Silent()
    names = ("",)
    if (directory / CURVE).is_file():
        names = tuple(point.directory for point in Curve.load(directory).points)
    source = None if original is None else Checkpoint(original)
    return tuple(_Output.of(directory / name).verified(source, progress, run) for name in names)


@dataclass(frozen=True)
class _Output:
    directory: Path
    manifest: Manifest

    @classmethod
    def of(cls, directory: Path) -> _Output:
        return cls(directory, Manifest.load(directory))

    def verified(self, original: Checkpoint | None, progress: Progress, run: bool) -> Verification:
        checks = [
            *self._bytes(progress),
            _check("plan", self._plan),
            _check("routers", self._routers),
            _check("chain", self._chain),
            _check("report", self._report),
        ]
        if run:
            with progress.stage("run it", 1) as advance:
                checks.append(_check("forward pass", self._forward))
                advance(1)
        if original is not None:
            source = original
            checks.append(_check("original", lambda: self._original(source, progress)))
        return Verification(directory=str(self.directory), checks=tuple(checks))

    def _bytes(self, progress: Progress) -> Iterator[Check]:
        """Every file's, and every tensor's."""
        listed, files, tensors = self.manifest, list[str](), list[str]()
        found = dict[str, TensorDigest]()
        with progress.stage("read every byte", listed.weight_bytes) as advance:
            for name, file in listed.files.items():
                path = self.directory / name
                if not path.is_file():
                    files.append(f"{name} is missing")
                elif not name.endswith(SUFFIX):
                    if sha256_of(path) != file.sha256:
                        files.append(f"{name} was changed")
                else:
                    different = self._weights(path, file.sha256, found, advance)
                    files += different[0]
                    tensors += different[1]
        extra = {path.name for path in self.directory.glob(f"*{SUFFIX}")} - listed.files.keys()
        files += [f"{name} is not one of the files written" for name in sorted(extra)]
        missing = sorted(listed.tensors.keys() - found.keys())
        tensors += [f"tensor {name} is missing" for name in missing]
        yield Check(name="files", about=f"{len(listed.files)} as they were written", differences=tuple(files))
        yield Check(
            name="tensors",
            about=f"{len(listed.tensors):,}, each as it was written",
            differences=tuple(tensors),
        )

    def _weights(
        self, path: Path, sha256: str, found: dict[str, TensorDigest], advance: Callable[[int], None]
    ) -> tuple[list[str], list[str]]:
        """What is different in a weight file, and in its tensors."""
        try:
            digest, inside = digests_of(path, advance)
        except (HeaderError, OSError) as error:
            return [f"{path.name}: {error}"], []
        found |= inside
        tensors = list(_different(path.name, self.manifest.tensors, inside))
        if digest.sha256 == sha256:
            return [], tensors
        return [f"{path.name} was changed" + ("" if tensors else ", in its header")], tensors

    def _plan(self) -> tuple[str, list[str]]:
        """What was chosen for is in the files as plan and config.json say, and takes the plan's bytes."""
        checkpoint, plan = Checkpoint(self.directory, allow_quantized=True), Plan.load(self.directory)
        adapter, config = get_adapter(checkpoint.config), checkpoint.config
        dense = written_dense(checkpoint)
        expected = expected_tensors(written_options(checkpoint), adapter, config, dense)
        check_tensors(expected, checkpoint.tensors)
        size, wrong = sum(checkpoint.tensors[name].nbytes for name in expected), []
        who = "experts and dense groups" if dense else "experts"
        if plan.layout == "mixed":
            promised, entry = plan.quantization_config()["layers"], config["quantization_config"]["layers"]
            layers = promised.keys() | entry.keys()
            wrong += [
                f"layer {n}: config.json and {PLAN} give experts different options"
                for n in sorted(layers, key=int)
                if promised.get(n) != entry.get(n)
            ]
            if {group.name: option for group, option in dense.items()} != by_name(plan.dense):
                wrong.append(f"config.json and {PLAN} give dense groups different options")
        if size != plan.cost:
            wrong.append(f"{who} take {size:,} bytes in the files, {plan.cost:,} in {PLAN}")
        return f"{who} take {size:,} bytes of {plan.budget:,}", wrong

    def _routers(self) -> tuple[str, list[str]]:
        """A row for every expert, in floating point."""
        checkpoint = Checkpoint(self.directory, allow_quantized=True)
        adapter, config = get_adapter(checkpoint.config), checkpoint.config
        shape, wrong = (adapter.num_experts(config), adapter.expert_shape(config)[0]), []
        for layer in adapter.moe_layers(config):
            name = adapter.router_name(layer)
            tensor = checkpoint.tensors.get(name)
            if tensor is None:
                wrong.append(f"{name} is missing")
            elif tensor.shape != shape or tensor.dtype not in ("BF16", "F16", "F32"):
                wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
            elif not bool(torch.isfinite(checkpoint.read(name)).all()):
                wrong.append(f"{name} has NaN or infinite values")
        return f"{len(adapter.moe_layers(config))} of {shape[0]} experts each, unquantised", wrong

    def _chain(self) -> tuple[str, list[str]]:
        """Every digest of what the output was made from is the same wherever it stands."""
        plan, report, manifest = Plan.load(self.directory), Report.load(self.directory), self.manifest
        recipe = load(str(self.directory / RECIPE)).digest()
        pairs = (
            ("the recipe", RECIPE, recipe, FILE_NAME, manifest.recipe),
            ("the recipe", PLAN, plan.recipe, FILE_NAME, manifest.recipe),
            ("the recipe", REPORT, report.recipe_digest, FILE_NAME, manifest.recipe),
            ("the model", PLAN, plan.model, FILE_NAME, manifest.model),
            ("the model", REPORT, report.model_digest, FILE_NAME, manifest.model),
            ("the manifest", REPORT, report.manifest, FILE_NAME, sha256_of(self.directory / FILE_NAME)),
        )
        wrong = [
            f"{what}: {name} and {other} disagree ({value[:12]}, {second[:12]})"
            for what, name, value, other, second in pairs
            if value != second
        ]
        return "recipe, model, plan, manifest and report fit", wrong

    def _report(self) -> tuple[str, list[str]]:
        """The report's figures are the files' and the plan's."""
        report, plan = Report.load(self.directory), Plan.load(self.directory)
        checkpoint = Checkpoint(self.directory, allow_quantized=True)
        total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
        options = {
            (layer.layer, expert): name
            for layer in report.layers
            for expert, name in enumerate(layer.options)
        }
        wrong = [] if report.digest == report.own_digest else [f"{REPORT} was changed"]
        if not self._is_page_of(report):
            wrong.append(f"{page.FILE_NAME} is not the page of {REPORT}")
        if options != {key: option.name for key, option in by_expert(plan.layers).items()}:
            wrong.append(f"{REPORT} and {PLAN} give experts different options")
        if {group.name: group.option for group in report.dense} != {
            name: option.name for name, option in by_name(plan.dense).items()
        }:
            wrong.append(f"{REPORT} and {PLAN} give dense groups different options")
        for what, said, found in (
            ("experts' bytes", report.bytes.experts_after, plan.cost),
            ("the budget", report.bytes.budget, plan.budget),
            ("all tensors' bytes", report.bytes.total, total),
        ):
            if said != found:
                wrong.append(f"{what}: {REPORT} says {said:,}, found are {found:,}")
        return f"{total:,} bytes in all, KL {report.kl:.5f}", wrong

    def _is_page_of(self, report: Report) -> bool:
        """Whether the page shows the report; one by another version may look otherwise."""
        path = self.directory / page.FILE_NAME
        if report.version != __version__:
            return True
        recipe = (self.directory / RECIPE).read_bytes().decode("utf-8", errors="replace")
        return path.is_file() and path.read_bytes() == page.page(report, recipe).encode()

    def _forward(self) -> tuple[str, list[str]]:
        """Some tokens have the loss they had when the model was written."""
        reload = Report.load(self.directory).reload
        if reload.sample_loss is None:
            return f"not known what to expect: {REPORT} is of an older version", []
        dtype = getattr(torch, reload.dtype)
        device = torch.device("cuda" if torch.cuda.is_available() and dtype != torch.float32 else "cpu")
        loss = sample_loss(read_written(self.directory, device, dtype, _STREAMING))
        same = math.isclose(loss, reload.sample_loss, abs_tol=RELOAD_TOLERANCE[dtype])
        said = f"loss {loss:.6f}, when written {reload.sample_loss:.6f}"
        return said, [] if same else [said]

    def _original(self, original: Checkpoint, progress: Progress) -> tuple[str, list[str]]:
        """It is the model this was made from, and what was not chosen for is the same, routers of layout stock by their rows."""
        if original.digest(progress) != self.manifest.model:
            return "", [f"{original.directory} is not the model that this was made from"]
        plan, adapter = Plan.load(self.directory), get_adapter(original.config)
        dense = written_dense(Checkpoint(self.directory, allow_quantized=True))
        chosen = {w.name for group in (*adapter.groups(original.config), *dense) for w in group.weights}
        others = [tensor for name, tensor in original.tensors.items() if name not in chosen]
        written_as = expected_tensors({}, adapter, original.config, dense)
        kept = dict[str, tuple[int, ...]]()
        if plan.layout == "stock":
            kept = {adapter.router_name(layer): plan.kept(layer) for layer in plan.layers}
        extra = {name for name in self.manifest.tensors if ".experts." not in name} - original.tensors.keys()
        extra -= written_as.keys()
        wrong = [f"tensor {name} is none of the original's" for name in sorted(extra)]
        with progress.stage("compare with the original", sum(t.nbytes for t in others)) as advance:
            for tensor in others:
                written = self.manifest.tensors.get(tensor.name)
                if written is None or written.sha256 != _sha256(original, tensor, kept.get(tensor.name)):
                    wrong.append(f"tensor {tensor.name} is not the original's")
                advance(tensor.nbytes)
        return f"{len(others):,} tensors that were not chosen for are the same", wrong


def _check(name: str, work: Callable[[], tuple[str, list[str]]]) -> Check:
    """What cannot even be looked at differs, too."""
    try:
        about, differences = work()
    except UserError as error:
        about, differences = "", [str(error)]
    return Check(name=name, about=about, differences=tuple(differences))


def _different(
    file: str, listed: Mapping[str, TensorDigest], found: Mapping[str, TensorDigest]
) -> Iterator[str]:
    for name, tensor in found.items():
        expected = listed.get(name)
        if expected is None:
            yield f"tensor {name} in {file} is not one of those written"
        elif (tensor.dtype, tensor.shape) != (expected.dtype, expected.shape):
            yield (
                f"tensor {name} in {file} is {tensor.dtype} {list(tensor.shape)}, it was written as "
                f"{expected.dtype} {list(expected.shape)}"
            )
        elif tensor.sha256 != expected.sha256:
            yield f"tensor {name} in {file} has other bytes than were written"


def _sha256(checkpoint: Checkpoint, tensor: TensorInfo, rows: tuple[int, ...] | None) -> str:
    if rows is not None:
        values = checkpoint.read_rows(tensor.name, rows).contiguous()
        return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
    digest = hashlib.sha256()
    for chunk in from_file(tensor).chunks():
        digest.update(chunk)
    return digest.hexdigest()
