"""Whether files stayed as they were while a run worked: the model that it read, and what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_rco.ckpt.reader import CONFIG, Checkpoint
from moe_rco.ckpt.writer import sha256_of
from moe_rco.errors import ModelError, OutputError

Mark = tuple[int, int, int]


@dataclass(frozen=True)
class Steady:
    """A model's files as they are now: of the weights time, size and inode, of the files to be copied the SHA-256."""

    checkpoint: Checkpoint
    marks: dict[Path, Mark]
    digests: dict[Path, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Steady:
        """Raises OSError."""
        paths = (checkpoint.directory / CONFIG, *checkpoint.files)
        return cls(
            checkpoint,
            {path: _mark(path) for path in paths},
            {path: sha256_of(path) for path in checkpoint.companions()},
        )

    def check(self) -> None:
        """Raises ModelError naming a file that is another one now. What is gone was there when it was read."""
        for path, digest in self.digests.items():
            if path.exists() and sha256_of(path) != digest:
                raise _changed(path)
        for path, mark in self.marks.items():
            if path.exists() and _mark(path) != mark and not self._same_bytes():
                raise _changed(path)

    def _same_bytes(self) -> bool:
        """Of what was only touched, or copied again."""
        try:
            return Checkpoint(self.checkpoint.directory).digest() == self.checkpoint.digest()
        except ModelError:
            return False


@contextmanager
def staying(checkpoint: Checkpoint, forget: Callable[[], None]) -> Iterator[None]:
    """However it ends: raises ModelError where the model has changed within, after `forget`, so that nothing that was made of
    two models is put in place, or gone on from.
    """
    steady = Steady.of(checkpoint)
    try:
        yield
    finally:
        try:
            steady.check()
        except ModelError:
            forget()
            raise


@dataclass(frozen=True)
class Sealed:
    """The files of a written model as they were when they were complete: hours may pass until they are put in place."""

    directory: Path
    marks: dict[Path, Mark]

    @classmethod
    def of(cls, directory: Path) -> Sealed:
        """Raises OSError."""
        return cls(directory, _marks(directory))

    def check(self) -> None:
        """Raises OutputError where one is gone or another one."""
        found = _marks(self.directory) if self.directory.is_dir() else {}
        damaged = sorted(path for path, mark in self.marks.items() if found.get(path) != mark)
        if damaged:
            raise OutputError(
                f"{damaged[0]} was changed or removed after the run had written it; run the same command again to write it anew"
            )


def _marks(directory: Path) -> dict[Path, Mark]:
    return {path: _mark(path) for path in directory.iterdir() if path.is_file()}


def _mark(path: Path) -> Mark:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _changed(path: Path) -> ModelError:
    return ModelError(
        f"{path} was changed while the run read the model, so that what was made of it is of no use and has been removed; "
        "run again once the model stays as it is"
    )
