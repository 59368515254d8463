"""A Hugging Face model directory, checked on opening and read tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_rco.adapters.base import Adapter
from moe_rco.ckpt.data import read_rows, read_tensor
from moe_rco.ckpt.header import HeaderError, TensorInfo, read_header
from moe_rco.errors import ModelError
from moe_rco.types import Group, Progress, Silent

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT_DTYPES = ("BF16", "F16", "F32")
AGAIN = "download or copy it again"

# What a model directory holds beside its weights and is needed to use it. Patterns are Path.match's.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "generation_config.json"),
)


class Checkpoint:
    """A model's config.json and safetensors files.

    Opening reads and checks config.json, the index and every header, but no weights. `allow_quantized` opens
    models that already have a quantization_config, such as our own outputs. Raises ModelError.
    """

    def __init__(self, directory: str | Path, *, allow_quantized: bool = False) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ModelError(f"no model directory {self.directory}; name a directory with a {CONFIG}")
        self.config: dict[str, Any] = self._json(CONFIG)
        entry = self.config.get("quantization_config")
        if entry is not None and not isinstance(entry, dict):
            raise ModelError(f"{self.directory / CONFIG}: quantization_config is not a JSON object; {AGAIN}")
        if entry is not None and not allow_quantized:
            raise ModelError(
                f"{self.directory} is already quantised (its {CONFIG} has a quantization_config); "
                "name the original model"
            )
        self.tensors: Mapping[str, TensorInfo] = self._tensors()
        self._digest: str | None = None
        self._companions: tuple[Path, ...] | None = None

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted by name."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    def read(self, name: str) -> Tensor:
        """One tensor. Raises ModelError if the model has none of this name, or it cannot be read."""
        return self._data(name, read_tensor)

    def read_rows(self, name: str, rows: Iterable[int]) -> Tensor:
        """Some rows of one tensor, in the order given. Raises ModelError as `read`."""
        return self._data(name, lambda tensor: read_rows(tensor, rows))

    def _data(self, name: str, reader: Callable[[TensorInfo], Tensor]) -> Tensor:
        if name not in self.tensors:
            raise ModelError(f"{self.directory} has no tensor {name}")
        try:
            return reader(self.tensors[name])
        except (HeaderError, OSError) as error:
            raise ModelError(f"{self.tensors[name].file}: {error}; {AGAIN}") from error

    def check_experts(self, adapter: Adapter) -> None:
        """Check that exactly the expert and router tensors the configuration implies are there, with right
        shapes and dtypes. Raises ModelError naming the first tensor that is not.
        """
        expected = {weight.name for group in adapter.groups(self.config) for weight in group.weights}
        fused = next((name for name in self.tensors if name.endswith(".experts.gate_up_proj")), None)
        if fused is not None and not expected & self.tensors.keys():
            raise ModelError(
                f"{self.directory} stores its experts fused ({fused}); load it with transformers 5 and "
                "save it again, which writes one tensor per expert"
            )
        self.check_groups(adapter.groups(self.config))
        hidden = adapter.expert_shape(self.config)[0]
        for layer in adapter.moe_layers(self.config):
            self._check_tensor(adapter.router_name(layer), (adapter.num_experts(self.config), hidden))
        for name, tensor in self.tensors.items():
            if ".experts." in name and name not in expected:
                raise ModelError(
                    f"{tensor.file} holds expert tensor {name}, which {CONFIG} does not account for; "
                    "check the number of experts and the expert layers there"
                )

    def check_groups(self, groups: Sequence[Group]) -> None:
        """Check that the tensors of some groups are there, with right shapes and dtypes. Raises ModelError."""
        for group in groups:
            for weight in group.weights:
                self._check_tensor(weight.name, weight.shape)
                dtype = self.tensors[weight.name].dtype
                if dtype not in EXPERT_DTYPES:
                    raise ModelError(
                        f"{_kind(group)}tensor {weight.name} in {self.tensors[weight.name].file} is {dtype}; "
                        f"{'experts' if not group.is_dense else 'weights'} must be bfloat16, float16 or float32: name the "
                        "original, unquantised model"
                    )

    def check_finite(self, groups: Sequence[Group], progress: Progress | None = None) -> None:
        """Read some groups, one tensor at a time. Raises ModelError naming the first that is not finite."""
        with (progress or Silent()).stage("check expert weights", len(groups)) as advance:
            for group in groups:
                for weight in group.weights:
                    if not bool(torch.isfinite(self.read(weight.name)).all()):
                        raise ModelError(
                            f"{_kind(group)}tensor {weight.name} in {self.tensors[weight.name].file} has NaN or "
                            f"infinite values; {AGAIN}, or retrain the model"
                        )
                advance(1)

    def digest(self, progress: Progress | None = None) -> str:
        """SHA-256 (hex) over config.json and the weight files: their names, sizes and bytes. Computed once."""
        if self._digest is None:
            paths = [self.directory / CONFIG, *self.files]
            digest = hashlib.sha256()
            total = sum(path.stat().st_size for path in paths)
            with (progress or Silent()).stage("read the weights", total) as advance:
                for path in paths:
                    digest.update(f"{path.name} {path.stat().st_size}\n".encode())
                    with path.open("rb") as file:
                        while chunk := file.read(1 << 22):
                            digest.update(chunk)
                            advance(len(chunk))
            self._digest = digest.hexdigest()
        return self._digest

    def companions(self) -> tuple[Path, ...]:
        """The files to copy with the weights, sorted by name: tokenizer, chat template, generation settings.

        Looked for once: what is gone later is to be missed.
        """
        if self._companions is None:
            found = {
                path for pattern in COMPANIONS for path in self.directory.glob(pattern) if path.is_file()
            }
            self._companions = tuple(sorted(self._inside(path.name) for path in found))
        return self._companions

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.tensors:
            raise ModelError(f"{self.directory} has no tensor {name}, which its {CONFIG} implies; {AGAIN}")
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} in {tensor.file} has shape {list(tensor.shape)}, but {CONFIG} implies "
                f"{list(shape)}"
            )

    def _inside(self, name: str) -> Path:
        """The path of a file of this directory, refusing names and links that lead out of it.

        The Hub's cache keeps a snapshot's files as links into the `blobs` directory of the same model; these
        are allowed.
        """
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ModelError(
                f"{self.directory / INDEX} names the file '{name}', which is not in the model directory"
            )
        path = self.directory / name
        try:
            target, home = path.resolve(), self.directory.resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop, up to Python 3.12
            raise ModelError(f"{path} is a link that leads nowhere; {AGAIN}") from error
        in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
        if path.is_symlink() and target.parent != home and not in_cache:
            raise ModelError(
                f"{path} is a link to {target}, outside the model directory; copy the file there"
            )
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        if not path.is_file():
            raise ModelError(f"no {name} in {self.directory}; name the directory of a Hugging Face model")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not JSON ({error}); {AGAIN}") from error
        if not isinstance(value, dict):
            raise ModelError(f"{path} is not a JSON object; {AGAIN}")
        return value

    def _tensors(self) -> dict[str, TensorInfo]:
        if (self.directory / WEIGHTS).exists() or not (self.directory / INDEX).exists():
            return self._header(WEIGHTS)
        placed = self._json(INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(f, str) for f in placed.values()):
            raise ModelError(f"{self.directory / INDEX} has no weight_map of tensor to file names; {AGAIN}")
        tensors: dict[str, TensorInfo] = {}
        files = sorted(set(placed.values()))
        for file in files:
            self._inside(file)
        for file in files:
            for name, tensor in self._header(file).items():
                if placed.get(name) != file:
                    raise ModelError(
                        f"{tensor.file} holds tensor {name}, which {INDEX} does not place there; {AGAIN}"
                    )
                tensors[name] = tensor
        for name, file in placed.items():
            if name not in tensors:
                raise ModelError(
                    f"{INDEX} places tensor {name} in {self.directory / file}, which has none; {AGAIN}"
                )
        return tensors

    def _header(self, name: str) -> dict[str, TensorInfo]:
        path = self._inside(name)
        if not path.is_file():
            if name == WEIGHTS:
                raise ModelError(
                    f"no {WEIGHTS} or {INDEX} in {self.directory}; only safetensors models can be read"
                )
            raise ModelError(f"{INDEX} names {path}, which does not exist; {AGAIN}")
        try:
            return read_header(path)
        except (HeaderError, OSError) as error:
            raise ModelError(f"{path}: {error}; {AGAIN}") from error


def _kind(group: Group) -> str:
    return "" if group.is_dense else "expert "
