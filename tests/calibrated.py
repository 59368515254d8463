"""A tiny calibrated and quantised model of every family, for tests of the search and of the methods beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_rco.adapters import get_adapter
from moe_rco.calib.bank import OptionBank
from moe_rco.calib.calibrate import Calibrated, calibrate
from moe_rco.calib.data import TokenPool
from moe_rco.calib.fisher import fisher_effects
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Store
from moe_rco.types import Silent
from tests.compressed import table_of
from tests.tiny_models import save_tiny

CPU = torch.device("cpu")
OPTIONS = ("prune", "int3-g64", "int4-g64", "bf16")


class Totals:
    """A Progress that remembers how long every stage was to be, and how far it came."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        self.seen[title], self.done[title] = total, 0

        def advance(units: int) -> None:
            self.done[title] += units

        yield advance


@dataclass
class Calibration:
    model: AssignedModel
    store: Store
    pools: tuple[TokenPool, TokenPool]
    calibrated: Calibrated
    by_sequence: np.ndarray

    @property
    def q(self) -> np.ndarray:
        """The Fisher estimate [N, K]."""
        return self.by_sequence.mean(0, dtype=np.float64)


def calibration_of(family: str, place: Path, dense: bool = False, **config: Any) -> Calibration:
    checkpoint = Checkpoint(save_tiny(family, place / "model", **config))
    adapter = get_adapter(checkpoint.config)
    table = table_of(checkpoint, OPTIONS, dense)
    bank = OptionBank(checkpoint, table, CPU, torch.float32)
    runner = Runner(checkpoint, adapter, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    pools = tuple(
        TokenPool(torch.randint(0, 96, (n, 16), generator=generator), ("random",) * n) for n in (24, 8)
    )
    store = Store(place / "store", "tiny")
    original = AssignedModel(runner, adapter, checkpoint.config, bank)
    calibrated = calibrate(original, store, (pools[0], pools[1]), "gptq", Silent())
    model = AssignedModel(runner, adapter, checkpoint.config, bank, store)
    effects = fisher_effects(model, pools[0], 0, Silent())
    return Calibration(model, store, (pools[0], pools[1]), calibrated, effects)
