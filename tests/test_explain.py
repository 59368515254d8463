"""What the system refuses comes out as one line: where it was, and what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_rco.errors import DataError, FileError, MemoryShortageError, OutputError, StoreError, UserError
from moe_rco.explain import Needs, explained, explaining
from moe_rco.recipe import DEMO_MODEL


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def full(path: str | None = None) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    error = explained(
        caused(StoreError(f"cannot write store/x: {full()}"), full()), Needs(tmp_path, disk=3 << 20)
    )
    assert isinstance(error, StoreError)
    for part in (
        "cannot write store/x",
        "the disk is full",
        "free, the run still needs about 3.00 MiB",
        "run the same",
    ):
        assert part in str(error)
    assert "Errno" not in str(error)


def test_of_a_named_file_the_directory_is_told() -> None:
    error = explained(full("/proc/self/x"))
    assert isinstance(error, FileError)
    assert str(error).startswith(
        "/proc/self/x: No space left on device: the disk is full (/proc/self: 0 B free)"
    )


@pytest.mark.parametrize(
    ("code", "part"),
    [
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "writable again"),
        (errno.EACCES, "permission"),
        (errno.ENOENT, "put it back"),
        (errno.EIO, "failing"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOTEMPTY, "run the same command again"),
    ],
)
def test_every_refusal_says_what_to_do(code: int, part: str) -> None:
    error = explained(OSError(code, os.strerror(code), "some/file"))
    assert isinstance(error, FileError)
    assert part in str(error)
    assert "some/file" in str(error)


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ..."
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
        caused(
            StoreError("cannot keep 2 MiB of activations"), OSError(errno.ENOMEM, "Cannot allocate memory")
        ),
    ],
)
def test_memory_that_ends_names_the_setting(fault: Exception) -> None:
    error = explained(fault, Needs(memory=1 << 30, stage="search"))
    assert isinstance(error, MemoryShortageError)
    for part in ("out of memory (in: search)", "1.00 GiB", "set execution.memory_limit", "search.batch"):
        assert part in str(error)
    assert "lower execution.memory_limit" in str(explained(fault, Needs(streamed=True)))
    assert "calibration.sequence_length" in str(explained(fault, Needs(stage="calibrate and quantise")))


def test_torch_really_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert isinstance(explained(caught.value), MemoryShortageError)


def test_what_is_ours_passes() -> None:
    ours = DataError("too short")
    assert explained(ours) is ours
    assert explained(KeyError("x")) is None
    assert explained(RuntimeError("shapes differ")) is None
    assert explained(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None


def test_an_error_with_advice_of_its_own_is_left_alone() -> None:
    error = OutputError("output x is not writable (Read-only file system); name another directory")
    assert str(explained(caused(error, OSError(errno.EROFS, "Read-only file system")))) == str(error)


def test_explaining() -> None:
    with pytest.raises(FileError, match="put it back") as caught, explaining(Needs):
        Path("/nowhere/at/all").read_bytes()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(KeyError), explaining(Needs):
        raise KeyError
    with pytest.raises(UserError, match=r"^x$"), explaining(Needs):
        raise UserError("x")


NO_THREADS = """
import resource, sys
from transformers import AutoTokenizer
from moe_rco.errors import MemoryShortageError
from moe_rco.explain import Needs, explaining

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 19),) * 2)
try:
    with explaining(Needs):
        tokenizer("Its library starts threads now, which need memory.")
except MemoryShortageError as error:
    print(type(error.__cause__).__name__, isinstance(error.__cause__, Exception), error)
"""


def test_a_library_in_rust_that_gives_up_is_explained() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS, str(DEMO_MODEL)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        check=False,
    )
    assert done.stdout.startswith("PanicException False out of memory; "), done.stderr
