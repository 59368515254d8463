"""The manifest of an output: the digest of every file and tensor in it, and of what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from moe_rco.ckpt.header import HeaderError, read_header
from moe_rco.ckpt.rewrite import RECIPE
from moe_rco.ckpt.writer import from_file, replace_text, sha256_of
from moe_rco.errors import OutputError, PlanError
from moe_rco.files import check_regular, first_complaint
from moe_rco.plan import FILE_NAME as PLAN
from moe_rco.plan import Plan

FILE_NAME = "manifest.json"
SUFFIX = ".safetensors"
NOT_LISTED = (FILE_NAME, RECIPE, "report.json", "report.html")
"""The recipe has a digest of its own, which where it is written to does not change; the report and its page are added to."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileDigest(_Part):
    """A file's size in bytes and SHA-256 (hex)."""

    bytes: NonNegativeInt
    sha256: str


class TensorDigest(_Part):
    """A tensor as it is on disk: the SHA-256 (hex) is of its bytes."""

    dtype: str
    shape: tuple[NonNegativeInt, ...]
    sha256: str


class Manifest(_Part):
    """What an output directory must hold. `model`, `recipe` and `store` are the digests of what it was made from.

    `files` are all that were written with it, by name, and `tensors` those in the weight files.
    """

    version: Literal[1] = 1
    model: str
    recipe: str
    store: str
    files: dict[str, FileDigest]
    tensors: dict[str, TensorDigest]

    def save(self, directory: Path) -> str:
        """Write `manifest.json` and return its SHA-256. Raises OSError."""
        replace_text(directory / FILE_NAME, json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n")
        return sha256_of(directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the manifest of a directory. Raises PlanError."""
        path = directory / FILE_NAME
        check_regular(path, PlanError)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PlanError(
                f"{path} cannot be read ({error.strerror}); only what moe-rco prune wrote can be verified"
            ) from error
        except ValidationError as error:
            raise PlanError(f"{path} is damaged: {first_complaint(error)}") from error

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(file.bytes for name, file in self.files.items() if name.endswith(SUFFIX))


def make_manifest(
    directory: Path,
    written: Mapping[str, str],
    *,
    model: str,
    recipe: str,
    store: str,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Manifest:
    """The manifest of a directory, every byte of which is read; `advance` is told of the weights'.

    `written` are the SHA-256 of what was to be written into the weight files, by name. Raises OutputError where a file has
    become something else.
    """
    files, tensors = dict[str, FileDigest](), dict[str, TensorDigest]()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        if path.name in NOT_LISTED:
            continue
        if path.suffix != SUFFIX:
            files[path.name] = FileDigest(bytes=path.stat().st_size, sha256=sha256_of(path))
            continue
        try:
            files[path.name], found = digests_of(path, advance)
        except HeaderError as error:
            raise OutputError(f"{path}, just written, cannot be read: {error}; is the disk sound?") from error
        if files[path.name].sha256 != written.get(path.name):
            raise OutputError(f"{path} does not hold what was written to it; is the disk sound?")
        tensors |= found
    return Manifest(model=model, recipe=recipe, store=store, files=files, tensors=tensors)


def digests_of(path: Path, advance: Callable[[int], None]) -> tuple[FileDigest, dict[str, TensorDigest]]:
    """A weight file's digest and its tensors', from one reading. Raises HeaderError, OSError."""
    tensors = sorted(read_header(path).values(), key=lambda tensor: tensor.offset)
    whole, found = hashlib.sha256(), dict[str, TensorDigest]()
    with path.open("rb") as file:
        whole.update(file.read(tensors[0].offset if tensors else -1))
    for tensor in tensors:
        digest = hashlib.sha256()
        for chunk in from_file(tensor).chunks():
            whole.update(chunk)
            digest.update(chunk)
            advance(len(chunk))
        found[tensor.name] = TensorDigest(dtype=tensor.dtype, shape=tensor.shape, sha256=digest.hexdigest())
    return FileDigest(bytes=path.stat().st_size, sha256=whole.hexdigest()), found


def check_quickly(directory: Path, quantization_config: Mapping[str, object] | None = None) -> None:
    """Check what costs no reading of weights: the files' sizes, the plan, and that a config's entry is the plan's.

    A directory without a manifest (not ours, or of an older version) passes. Raises PlanError naming what differs.
    """
    if not (directory / FILE_NAME).is_file():
        return
    manifest = Manifest.load(directory)
    for name, file in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise PlanError(f"{path} is missing, {FILE_NAME} lists it; copy the model again")
        if name.endswith(SUFFIX) and path.stat().st_size != file.bytes:
            raise PlanError(
                f"{path} has {path.stat().st_size:,} bytes, {FILE_NAME} says {file.bytes:,}; copy the model again"
            )
    if PLAN not in manifest.files or sha256_of(directory / PLAN) != manifest.files[PLAN].sha256:
        raise PlanError(f"{directory / PLAN} was changed after the model was written; copy the model again")
    plan = Plan.load(directory)
    if (plan.model, plan.recipe) != (manifest.model, manifest.recipe):
        raise PlanError(
            f"{directory}: {PLAN} and {FILE_NAME} are of different models or recipes; copy the model again"
        )
    if quantization_config is None or plan.layout == "stock":  # whose entry is compressed-tensors'
        return
    promised = json.dumps(plan.quantization_config(), sort_keys=True)
    if json.dumps(quantization_config, sort_keys=True, default=str) != promised:
        raise PlanError(f"{directory}: config.json and {PLAN} give the experts different options")
