"""The processes that share the work of one run: started by torchrun, or one alone.

Only what is expensive is shared, piece by piece; every process gets all results, in the order that one alone would have made
them in, and then decides the same. So a run's result does not depend on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from moe_rco.errors import TeamError

Item = TypeVar("Item")
Made = TypeVar("Made")
_PATIENCE = timedelta(days=7)
"""One may wait for another's longest stage; that one is gone is noticed by its closed connection."""


class Team:
    """This process, number `rank` of `size`. Alone unless told otherwise."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.sent = 0

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def map(self, make: Callable[[Item], np.ndarray], items: Sequence[Item]) -> list[np.ndarray]:
        """`make` of every item, float64 arrays of one shape, each made by one process. Raises TeamError."""
        mine = [make(items[index]) for index in range(self.rank, len(items), self.size)]
        if self.size == 1:
            return mine
        # Who has none of them does not know their shape: somebody always has the first.
        shape = torch.zeros(8, dtype=torch.int64)
        if self.leads and mine:
            shape[: mine[0].ndim + 1] = torch.tensor([mine[0].ndim, *mine[0].shape])
        with _together():
            dist.broadcast(shape, 0)
        each = tuple(shape[1 : 1 + int(shape[0])].tolist())
        own = torch.zeros((-(-len(items) // self.size), *each), dtype=torch.float64)
        for row, values in enumerate(mine):
            own[row] = torch.from_numpy(np.asarray(values, dtype=np.float64))
        all_ = [torch.empty_like(own) for _ in range(self.size)]
        with _together():
            dist.all_gather(all_, own)
        self.sent += own.nbytes
        return [all_[index % self.size][index // self.size].numpy() for index in range(len(items))]

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """`make`, by one process after the other: what it does to files is not done by two at once."""
        made = list[Made]()
        for rank in range(self.size):
            if rank == self.rank:
                made.append(make())
            self.wait()
        return made[0]

    def wait(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            with _together():
                dist.barrier()


def leads() -> bool:
    """Whether this process is the one that reports, also before a team is joined."""
    return os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The number of this process on its machine: that of the device it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def processes_here() -> int:
    """How many processes of the run share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun started this process in; leaves it in the end. Raises TeamError."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Team()
        return
    with _together():
        # What is exchanged are small arrays of the host, on GPUs as well.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Team(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TeamError(
            "another process of this run was lost or does not answer (its own message is above, if it had time for one); run "
            "the same command again to go on, with as many processes as there are now"
        ) from error
