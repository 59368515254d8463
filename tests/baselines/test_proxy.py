"""The proxy's errors against a direct computation in float64, token by token, on every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moe_rco.adapters import get_adapter
from moe_rco.baselines.proxy import OutputErrors, output_errors, proxy
from moe_rco.calib.bank import LayerBank, OptionBank
from moe_rco.calib.calibrate import calibrate
from moe_rco.calib.data import TokenPool
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.runner import Runner
from moe_rco.ckpt.reader import Checkpoint
from moe_rco.ckpt.store import Store
from moe_rco.quant.packing import cost_table
from moe_rco.types import Budget, Option, Silent
from tests.baselines.tables import make_table
from tests.tiny_models import FAMILIES, save_tiny

OPTIONS = tuple(map(Option.parse, ("prune", "int2-g64", "int4-g64", "bf16")))


def tiny_model(family: str, path: Path, pool: TokenPool) -> AssignedModel:
    """A random model whose experts are rounded to nearest at every option."""
    checkpoint = Checkpoint(save_tiny(family, path / "model"))
    config, device = checkpoint.config, torch.device("cpu")
    adapter = get_adapter(config)
    table = cost_table(adapter.groups(config), OPTIONS, adapter.top_k(config), 1)
    runner = Runner(checkpoint, adapter, device, torch.float32)
    bank, store = OptionBank(checkpoint, table, device, torch.float32), Store(path / "store", "test")
    calibrate(AssignedModel(runner, adapter, config, bank), store, (pool, pool), "rtn", Silent())
    return AssignedModel(runner, adapter, config, bank, store)


def expert(bank: LayerBank, x: torch.Tensor, index: int, option: int) -> torch.Tensor:
    gate_up, down = (weight.double() for weight in bank.weights(index, option))
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


def mixture(
    model: AssignedModel, bank: LayerBank, x: torch.Tensor, logits: torch.Tensor, choice: list[int]
) -> torch.Tensor:
    """Output [H] of one layer for one token x [H] when every expert takes its option in `choice`."""
    alive = [index for index, option in enumerate(choice) if option != model.table.prune_index]
    p = torch.softmax(logits.double()[alive], 0)
    mass, order = torch.sort(p, descending=True)
    mass, order = mass[: model.top_k], order[: model.top_k].tolist()
    weights = mass / mass.sum() if model.renormalise else mass
    outputs = [expert(bank, x, alive[position], choice[alive[position]]) for position in order]
    return sum((w * f for w, f in zip(weights, outputs, strict=True)), torch.zeros_like(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_errors_equal_those_of_every_move_on_its_own(family: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    pool = TokenPool(torch.randint(3, 96, (2, 9), generator=generator), ("a",) * 2)
    model = tiny_model(family, tmp_path, pool)
    found = output_errors(model, pool, Silent())
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    original = model.experts(None)

    def record(layer: int, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.setdefault(layer, []).extend(zip(x.double(), logits, strict=True))
        return original(layer, x, logits)

    with torch.no_grad():
        model.runner.run(pool.ids, record)
    for layer in model.table.layers:
        bank, rows = model.layer_bank(layer), model.table.rows(layer)
        expected, block = np.zeros((len(rows), len(OPTIONS))), 0.0
        for x, logits in seen[layer]:
            unchanged = [bank.original] * len(rows)
            y = mixture(model, bank, x, logits, unchanged)
            block += float(y.square().sum())
            for index in range(len(rows)):
                for option in range(len(OPTIONS)):
                    moved = [*unchanged[:index], option, *unchanged[index + 1 :]]
                    expected[index, option] += float(
                        (mixture(model, bank, x, logits, moved) - y).square().sum()
                    )
        assert expected[:, :3].max(0).min() > 0
        np.testing.assert_allclose(found.errors[rows], expected, rtol=1e-4, atol=1e-9 * block)
        np.testing.assert_allclose(found.block[rows], block, rtol=1e-5)
        assert (found.stream[rows] > 0).all()


def test_relative_errors_let_a_layer_of_small_outputs_count() -> None:
    table = make_table(2, 2, 1)
    errors = np.tile(np.array([[8.0, 6, 4, 3, 1, 0]]), (4, 1))
    errors[2:] *= 1e-6
    norm = np.array([1.0, 1, 1e-6, 1e-6])
    measured = OutputErrors(errors, norm, np.ones(4))
    all_int8 = Budget(4 * int(table.costs[0, 4]), "")
    absolute = proxy(table, all_int8, measured, "absolute")
    assert absolute.cost <= all_int8.bytes
    assert absolute.choice[:2].min() > absolute.choice[2:].max()
    balanced = proxy(table, all_int8, measured, "block")
    assert sorted(balanced.choice[:2]) == sorted(balanced.choice[2:])
