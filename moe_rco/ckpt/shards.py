"""Weights in several files: how they are spread, and which files an interrupted run has completed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_rco.ckpt.reader import INDEX
from moe_rco.ckpt.writer import Entry, replace_text, sha256_of, sync_directory, write_file, write_text

_log = logging.getLogger(__name__)


class ShardManifest:
    """A file with the SHA-256 of every complete shard, and how many there will be.

    `inputs` stands for everything the shards depend on: those made from others do not count. Raises OSError.
    """

    def __init__(self, path: Path, inputs: str) -> None:
        self.path, self.inputs = path, inputs
        self.total, self.digests = 0, dict[str, str]()
        found = read_manifest(path)
        if found is not None and found["inputs"] == inputs:
            self.total, self.digests = found["total"], found["shards"]

    def begin(self, total: int) -> None:
        self.total = total
        self._save()

    def add(self, name: str, digest: str) -> None:
        self.digests[name] = digest
        self._save()

    def holds(self, shard: Path) -> bool:
        """Whether a shard is there and complete, by its bytes."""
        return shard.name in self.digests and shard.is_file() and sha256_of(shard) == self.digests[shard.name]

    def _save(self) -> None:
        value = {"inputs": self.inputs, "total": self.total, "shards": self.digests}
        replace_text(self.path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """`inputs`, `total` and `shards` (name to SHA-256); None where there is no manifest, or no sound one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sound = isinstance(found["total"], int) and isinstance(found["shards"], dict) and "inputs" in found
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if sound else None


class ShardWriter:
    """Writes tensors into `model-00001-of-0000N.safetensors` files and `model.safetensors.index.json`.

    A shard takes tensors in the order given until the next would exceed `shard_bytes` of data; a tensor
    larger than that has a shard to itself. The same entries give the same bytes. A shard has its name once it is
    complete; one that `manifest` holds is not written again. Memory: one chunk of one tensor.
    """

    def __init__(
        self,
        directory: Path,
        shard_bytes: int,
        metadata: Mapping[str, str] | None = None,
        manifest: ShardManifest | None = None,
    ) -> None:
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, not {shard_bytes}")
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.metadata = dict(metadata or {})
        self.manifest = manifest

    def write(
        self, entries: Iterable[Entry], advance: Callable[[int], None] = lambda nbytes: None
    ) -> list[Path]:
        """Write all entries; the shards' paths in order. Raises OSError, ValueError as `write_file`."""
        shards: list[list[Entry]] = []
        room = 0
        for entry in entries:
            if not shards or entry.nbytes > room:
                shards.append([])
                room = self.shard_bytes
            shards[-1].append(entry)
            room -= entry.nbytes
        if self.manifest is not None:
            self.manifest.begin(len(shards))
        paths, weight_map = [], {}
        for number, shard in enumerate(shards, 1):
            path = self.directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._write_shard(path, shard, advance)
            weight_map |= {entry.name: path.name for entry in shard}
            paths.append(path)
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.directory / INDEX, json.dumps(index, indent=2) + "\n")
        return paths

    def _write_shard(self, path: Path, shard: list[Entry], advance: Callable[[int], None]) -> None:
        if self.manifest is not None and self.manifest.holds(path):
            _log.info("%s is there from an earlier run", path.name)
            advance(sum(entry.nbytes for entry in shard))
            return
        partial = path.with_name(path.name + ".tmp")
        digest = write_file(partial, shard, self.metadata, advance)
        os.replace(partial, path)
        sync_directory(self.directory)
        if self.manifest is not None:
            self.manifest.add(path.name, digest)
        _log.info("wrote %s: %d tensors", path.name, len(shard))
