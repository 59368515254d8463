"""The directory beside an output in which a run keeps what it needs to go on, and the lock that lets one run in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from moe_rco.ckpt.state import SavedState
from moe_rco.ckpt.writer import write_text
from moe_rco.errors import LockError, OutputError

SUFFIX = ".work"
TRIAL = "moe-rco-"
"""What directories begin with in which a run tries how fast it goes; nothing in them is kept."""
_TRIES, _PAUSE = 5, 0.05
"""Who asks for a run's status holds its lock for a moment, which must not pass for a run."""


@dataclass(frozen=True)
class Holder:
    """The process that took the lock; `started` is ISO 8601 in UTC."""

    pid: int
    host: str
    started: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


@dataclass(frozen=True)
class Part:
    """One budget's files in a work directory: its own `directory`, and its model, `checkpoint`, while that is made."""

    directory: Path
    checkpoint: Path

    def search(self, store: str, recipe: str) -> SavedState:
        """Where the search is. It depends on a store (its fingerprint) and a recipe (its `search_digest`)."""
        return SavedState(self.directory / "search.safetensors", f"{store} {recipe}")

    def found(self, store: str, recipe: str) -> SavedState:
        """What the search has found, for the next budget to start from."""
        return SavedState(self.directory / "found.safetensors", f"{store} {recipe}")

    @property
    def shards(self) -> Path:
        """Which shards of `checkpoint` are complete (`ShardManifest`)."""
        return self.directory / "shards.json"


@dataclass(frozen=True)
class Lock:
    """The lock of a work directory while it is held, by an open file."""

    path: Path
    descriptor: int

    @property
    def held(self) -> bool:
        """Whether the file is still the one that others look at."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises OutputError where the directory was removed: what is there now may be another run's."""
        if not self.held:
            raise OutputError(
                f"the work directory {self.path.parent} was removed while the run worked in it; run the same command again"
            )


@dataclass(frozen=True)
class WorkDirectory:
    """`<output>.work`: the names of the files in it, and its lock.

    The lock is the operating system's, so that it is gone with the process that held it, however that ended.
    """

    path: Path

    @classmethod
    def of(cls, output: Path) -> Self:
        return cls(output.parent / (output.name + SUFFIX))

    @property
    def output(self) -> Path:
        return self.path.with_name(self.path.name.removesuffix(SUFFIX))

    @property
    def store(self) -> Path:
        """The quantised experts (`Store`)."""
        return self.path / "store"

    def measured(self, store: str, costs: str, seed: int) -> SavedState:
        """What every option would do. It depends on a store (its fingerprint), a cost table (its digest) and a seed."""
        return SavedState(self.path / "measured.safetensors", f"{store} {costs} {seed}, by sequence")

    @property
    def checkpoint(self) -> Path:
        """The output while it is written and checked."""
        return self.path / "checkpoint"

    def part(self, name: str = "") -> Part:
        """What belongs to one budget of several; without a name, to the only one."""
        return Part(self.path / name, self.checkpoint / name)

    @property
    def run(self) -> Path:
        """What the run is about (`progress.Run`)."""
        return self.path / "run.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def _publishing(self) -> Path:
        return self.path / "publishing"

    @property
    def published(self) -> bool:
        """Whether the run was killed after its output was in place: nothing here is needed any more."""
        return self._publishing.exists() and not self.checkpoint.exists()

    @property
    def interrupted(self) -> bool:
        """Whether something is kept here that a run would go on from. Meaningful while no run holds the lock."""
        return self.lock.exists() and not self.published and any(p != self.lock for p in self.path.iterdir())

    def keep_parts(self, names: Collection[str]) -> None:
        """Remove from `checkpoint` what belongs to none of the named parts: a run of other budgets left it."""
        for path in self.checkpoint.iterdir() if self.checkpoint.is_dir() else ():
            if path.is_dir() and path.name not in names:
                shutil.rmtree(path)
            elif path.is_file() and "" not in names:
                path.unlink()

    def will_publish(self) -> None:
        """Note that `checkpoint` is finished: should it be gone, it is because it is in its place."""
        write_text(self._publishing, "")

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Make the directory, with missing parents, and be the only process to use it.

        What was made is removed again if nothing was put into it. Raises LockError where another process uses it, and
        OutputError where it cannot be made.
        """
        made = missing_parents(self.path.parent)
        lock = Lock(self.lock, self._acquire())
        try:
            self._sign(lock.descriptor)
            if self.published:
                self.clear()
            self._publishing.unlink(missing_ok=True)
            for left in self.path.glob(f"{TRIAL}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            yield lock
        finally:
            # Before the lock is let go, so that nobody else's files are taken for ours.
            if lock.held:
                self._remove_if_unused()
            os.close(lock.descriptor)
            for directory in made:
                with contextlib.suppress(OSError):
                    directory.rmdir()

    def holder(self) -> Holder | None:
        """The process that uses the directory now. Raises OSError."""
        try:
            descriptor = os.open(self.lock, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self.last_holder() or Holder(0, "an unknown host", "an unknown time")
        finally:
            os.close(descriptor)
        return None

    def last_holder(self) -> Holder | None:
        """The process that used the directory last, as far as the lock file tells."""
        try:
            found = Holder(**json.loads(self.lock.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        sound = isinstance(found.pid, int) and isinstance(found.host, str) and isinstance(found.started, str)
        return found if sound else None

    def held_bytes(self) -> int:
        """What the files here take."""
        total = 0
        for place, _, names in os.walk(self.path):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += (Path(place) / name).lstat().st_size
        return total

    def clear(self) -> None:
        """Remove everything but the lock, last of all what tells that it is not needed. What cannot be removed stays."""
        with contextlib.suppress(OSError):
            for path in sorted(self.path.iterdir(), key=lambda path: path == self._publishing):
                if path == self.lock:
                    continue
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def _acquire(self) -> int:
        """A descriptor that holds the lock until it is closed."""
        for _ in range(_TRIES):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                # A run that has just finished may have removed the directory, even within mkdir.
                if isinstance(error, FileNotFoundError | FileExistsError) and not self.path.is_file():
                    continue
                raise OutputError(
                    f"the work directory {self.path} cannot be made or used: {error.strerror}"
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # While we opened it, whoever held it may have removed the file: then it keeps nobody out.
                if Lock(self.lock, descriptor).held:
                    return descriptor
            except BlockingIOError:
                time.sleep(_PAUSE)
            except OSError as error:
                os.close(descriptor)
                raise OutputError(
                    f"{self.lock} cannot be locked ({error.strerror}); name an output on another file system"
                ) from error
            os.close(descriptor)
        raise LockError(
            f"another run works in {self.path} ({self.last_holder() or 'which one is not known'}); wait until it has "
            "finished, stop it, or name another output"
        )

    def _sign(self, descriptor: int) -> None:
        """Say in the lock who holds it."""
        holder = Holder(os.getpid(), socket.gethostname(), _now())
        text = (json.dumps(asdict(holder)) + "\n").encode()
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, text)
        except OSError as error:
            raise OutputError(f"cannot write {self.lock}: {error}") from error

    def _remove_if_unused(self) -> None:
        with contextlib.suppress(OSError):
            if {path.name for path in self.path.iterdir()} <= {self.lock.name, self.run.name}:
                self.run.unlink(missing_ok=True)
                self.lock.unlink()
                # Fails, as it should, where another run has come in between.
                self.path.rmdir()


def missing_parents(path: Path) -> list[Path]:
    """The directories `mkdir(parents=True)` of `path` will make, deepest first."""
    return [directory for directory in (path.absolute(), *path.absolute().parents) if not directory.exists()]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
