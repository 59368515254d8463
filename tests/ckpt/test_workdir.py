"""The work directory: one run at a time, nothing taken from a run, nothing left of none."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_rco.ckpt import workdir
from moe_rco.ckpt.workdir import TRIAL, WorkDirectory
from moe_rco.errors import LockError, OutputError


@pytest.fixture
def work(tmp_path: Path) -> WorkDirectory:
    return WorkDirectory.of(tmp_path / "new" / "out")


def test_names() -> None:
    work = WorkDirectory.of(Path("a/out"))
    assert work.path == Path("a/out.work")
    assert work.output == Path("a/out")


def test_a_second_run_is_refused_and_told_of_the_first(work: WorkDirectory) -> None:
    with work.locked():
        with (
            pytest.raises(LockError, match=f"process {os.getpid()} on {socket.gethostname()}, since 20"),
            work.locked(),
        ):
            pytest.fail("two runs at once")
        holder = work.holder()
        assert holder is not None
        assert holder.pid == os.getpid()
    assert work.holder() is None
    with work.locked():
        pass


def test_nothing_is_left_of_a_run_that_did_nothing(work: WorkDirectory, tmp_path: Path) -> None:
    with work.locked():
        work.run.write_text("{}")
    assert not list(tmp_path.iterdir())


def test_what_a_run_has_done_stays(work: WorkDirectory) -> None:
    def run() -> None:
        with work.locked():
            work.store.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert work.store.exists()
    assert work.interrupted
    with work.locked():
        assert work.store.exists()
        work.clear()
    assert not work.path.exists()


HOLD = """
import sys, time
from pathlib import Path
from moe_rco.ckpt.workdir import TRIAL, WorkDirectory
work = WorkDirectory(Path(sys.argv[1]))
with work.locked():
    work.store.mkdir()
    print("locked", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_over(work: WorkDirectory) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, work.path], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(LockError, match=f"process {process.pid} on"), work.locked():
                pass
            assert not work.interrupted or work.holder() is not None
        finally:
            process.send_signal(signal.SIGKILL)
    assert work.holder() is None
    last = work.last_holder()
    assert last is not None
    assert last.pid == process.pid
    with work.locked():
        assert work.store.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "\x00"])
def test_a_lock_file_that_says_nothing_is_no_lock(work: WorkDirectory, text: str) -> None:
    work.path.mkdir(parents=True)
    work.lock.write_text(text)
    assert work.last_holder() is None
    with work.locked():
        assert work.last_holder() is not None


def test_who_asks_for_the_holder_does_not_keep_a_run_out(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    work.path.mkdir(parents=True)
    asking = os.open(work.lock, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: os.close(asking))
    with work.locked():
        pass


def test_a_directory_removed_while_its_lock_was_opened_is_made_anew(
    work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends removes the file that another one has just opened: a lock on that keeps nobody out."""
    flock, removed = workdir.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not removed:
            removed.append(work.lock.stat().st_ino)
            work.lock.unlink()
            work.path.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(workdir.fcntl, "flock", late)
    with work.locked():
        assert removed
        with pytest.raises(LockError), work.locked():
            pass


def test_many_runs_that_end_and_begin_are_never_two_at_once(work: WorkDirectory) -> None:
    inside, entered, faults = threading.Lock(), [0], list[BaseException]()

    def run() -> None:
        for _ in range(60):
            try:
                with work.locked():
                    assert inside.acquire(blocking=False), "two runs at once"
                    work.store.mkdir()
                    entered[0] += 1
                    work.clear()
                    inside.release()
            except LockError:
                continue
            except BaseException as fault:
                faults.append(fault)
                raise

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert entered[0] > 60
    assert not work.path.exists()


def test_what_a_run_killed_after_its_end_left_is_removed(work: WorkDirectory) -> None:
    with work.locked():
        work.store.mkdir()
        work.checkpoint.mkdir()
        work.will_publish()
    with work.locked():  # not moved yet: all of it is needed
        assert work.store.exists()
        work.will_publish()
        work.checkpoint.rmdir()
    assert not work.interrupted
    with work.locked():
        assert {path.name for path in work.path.iterdir()} == {"lock"}


@pytest.mark.parametrize("name", ["file/out", "out"])
def test_where_it_cannot_be_made(tmp_path: Path, name: str) -> None:
    for taken in ("file", "out.work"):
        (tmp_path / taken).write_text("x")
    with pytest.raises(OutputError, match="cannot be made"), WorkDirectory.of(tmp_path / name).locked():
        pass


def test_a_file_system_without_locks(work: WorkDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(workdir.fcntl, "flock", fail)
    with pytest.raises(OutputError, match="name an output on another file system"), work.locked():
        pass


def test_held_bytes(work: WorkDirectory) -> None:
    assert work.held_bytes() == 0
    work.store.mkdir(parents=True)
    (work.store / "a").write_bytes(bytes(100))
    work.part().shards.write_bytes(bytes(11))
    assert work.held_bytes() == 111


def test_parts_of_other_budgets_are_not_kept(work: WorkDirectory) -> None:
    work.keep_parts(("",))
    for name in ("", "50pct", "25pct"):
        work.part(name).checkpoint.mkdir(parents=True, exist_ok=True)
        (work.part(name).checkpoint / "config.json").write_text(name)
    work.keep_parts(("50pct", "35pct"))
    assert {path.name for path in work.checkpoint.iterdir()} == {"50pct"}
    (work.checkpoint / "config.json").write_text("")
    work.keep_parts(("",))
    assert {path.name for path in work.checkpoint.iterdir()} == {"config.json"}
    names = ("50pct", "25pct", "")
    assert len({work.part(name).search("s", "r").path for name in names}) == 3
    assert work.part().search("s", "r").path == work.path / "search.safetensors"


def test_a_directory_removed_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.work")
    with work.locked() as lock:
        lock.check()
        shutil.rmtree(work.path)
        with pytest.raises(OutputError, match="was removed while the run worked in it"):
            lock.check()
        with work.locked() as other:  # which another run may do now
            with pytest.raises(OutputError, match="was removed"):
                lock.check()
            other.check()


def test_the_lock_of_another_run_is_not_removed_in_the_end(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.work")
    first = work.locked()
    first.__enter__()
    shutil.rmtree(work.path)
    with work.locked() as other:
        first.__exit__(None, None, None)
        other.check()
    assert not work.path.exists()


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", '{"pid": -7, "host": null, "started": 1e400}', '{"pid": "x"}', "\x00"]
)
def test_a_lock_that_says_nothing_sensible_tells_of_nobody(tmp_path: Path, text: str) -> None:
    work = WorkDirectory(tmp_path / "out.work")
    work.path.mkdir()
    work.lock.write_text(text)
    assert work.last_holder() is None
    with work.locked():
        assert work.last_holder() is not None


def test_trials_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out.work")
    (work.path / f"{TRIAL}x").mkdir(parents=True)
    (work.path / "kept").touch()
    with work.locked():
        assert {path.name for path in work.path.iterdir()} == {"lock", "kept"}
