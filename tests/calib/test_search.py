"""The Fisher seed and the search, on tiny models: against finite differences, and against their own promises."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from moe_rco.calib.bank import LayerBank, StackedLayer
from moe_rco.calib.losses import KeptOut, _rows, batch_losses, row_losses
from moe_rco.calib.objective import Pass
from moe_rco.calib.reference import divergence
from moe_rco.calib.search import FAR_OFF, REFINED, SEED, find, knapsack
from moe_rco.ckpt.store import Store
from moe_rco.optim.solve import BACKWARD, SEARCHES
from moe_rco.recipe_sections import Search
from moe_rco.types import Assignment, Budget, Option, Silent
from tests.calibrated import CPU, Calibration, Totals, calibration_of


def test_gptq_beats_rounding_on_the_calibration_tokens(ready: Calibration) -> None:
    for layer in ready.model.table.layers:
        for name, error in ready.store.stats[str(layer)]["error"].items():
            assert error["gptq"] < error["rtn"], name


def test_usage_counts_every_routed_token(ready: Calibration) -> None:
    routed = ready.pools[0].ids.numel() * ready.model.top_k
    for counts in ready.calibrated.usage.counts.values():
        assert int(counts.sum()) == routed


def test_fisher_effects_rank_single_moves_as_the_true_divergence_does(ready: Calibration) -> None:
    """Random weights make routing jump, so magnitudes may differ; the order over groups and options must hold."""
    table = ready.model.table
    truth, predicted = [], []
    for row in range(0, len(table.groups), 3):
        for name in ("prune", "int3-g64", "int4-g64"):
            assignment = Assignment.uniform(table, Option.parse("bf16"))
            assignment.choice[row] = table.option_index(Option.parse(name))
            truth.append(
                ready.model.divergences(assignment.choice, ready.pools[0], ready.calibrated.train).mean()
            )
            predicted.append(ready.q[row, assignment.choice[row]])
    correlation: Any = spearmanr(truth, predicted)
    assert correlation.statistic > 0.8
    bf16 = table.option_index(Option.parse("bf16"))
    assert (ready.q[:, bf16] == 0).all()  # the model is bf16 on disk: nothing moves


def test_only_what_is_asked_for_is_measured(ready: Calibration) -> None:
    """And the rest is what it is when all is measured, for an assignment with pruned experts, too."""
    model, ids = ready.model, ready.pools[0].ids[:4]
    choice = knapsack(ready.q, model.table, Budget(int(model.table.original_bytes * 0.2), "")).choice
    reference = ready.calibrated.train.of(slice(0, 4), CPU)
    wanted = [0, 2]

    def loss(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return divergence(reference.at(row, positions), logits).sum()

    for start in (None, choice):
        (_, everything), (_, some) = model.effects([Pass(start, loss), Pass(start, loss, wanted)], ids)
        for part, whole in ((some.linear, everything.linear), (some.squared, everything.squared)):
            assert (part[:, [1, 3]] == 0).all()
            assert np.array_equal(part[:, wanted], whole[:, wanted])


def test_summed_effects_are_the_derivative_of_the_loss(
    ready: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All experts move together a small step from 4 bits towards the original; against the loss itself."""
    model, ids = ready.model, ready.pools[0].ids[:6]
    reference = ready.calibrated.train.of(slice(0, 6), CPU)
    step, here, there = 1e-3, 0, 1

    def moving(layer: int, store: Store) -> LayerBank:
        bank = model.bank._layers[layer, True]
        assert isinstance(bank, StackedLayer)
        start, end = bank.stacks[2], bank.stacks[bank.original]
        moved = (start[0] + step * (end[0] - start[0]), start[1] + step * (end[1] - start[1]))
        return dataclasses.replace(
            bank,
            prune_index=None,
            quantities=(here, there),
            stacks={here: start, there: moved, bank.original: end},
        )

    def loss(row: int, positions: slice, logits: torch.Tensor) -> torch.Tensor:
        return divergence(reference.at(row, positions), logits).double().sum()

    monkeypatch.setattr(model.bank, "layer", moving)
    groups = len(model.table.groups)
    passes = [Pass(np.full(groups, option), loss) for option in (here, there)]
    (before, effects), (after, _) = model.effects(passes, ids)
    promised = effects.linear[:, there].sum() * ids.numel()
    assert promised == pytest.approx(after - before, rel=0.05)


def test_samples_of_a_step_share_a_batch_and_steps_do_not(ready: Calibration) -> None:
    batches = [_rows(24, 4, step, 0).tolist() for step in range(6)]
    epoch = [row for batch in batches for row in batch]
    assert sorted(epoch) == list(range(24))
    assert _rows(24, 4, 6, 0).tolist() != batches[0]
    assert _rows(24, 4, 0, 1).tolist() != batches[0]


def test_choices_of_a_generation_are_compared_on_the_same_batches(ready: Calibration) -> None:
    search = Search(samples=2, batch=2, steps=4)
    value = batch_losses(ready.model, ready.pools[0], ready.calibrated.train, search)
    table = ready.model.table
    choice = knapsack(ready.q, table, Budget(int(table.original_bytes * 0.3), "test")).choice
    rows = _rows(len(ready.pools[0]), 8, 3, search.seed)
    everything = KeptOut(ready.model, ready.pools[0], ready.calibrated.train).sequences(choice)
    assert value(choice, 3, 4) == pytest.approx(everything[rows].mean(), rel=1e-4)
    assert value(choice, 3, 1) == pytest.approx(everything[rows[:2]].mean(), rel=1e-4)
    assert value(choice, 4, 1) != value(choice, 3, 1)
    by_row = row_losses(ready.model, ready.pools[0], ready.calibrated.train)
    assert by_row(choice, rows.numpy()) == pytest.approx(everything[rows], rel=1e-4)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Of one family: what rivals are given is the same for all."""
    return calibration_of("qwen3_moe", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("cut", [1, 11, 12, 14, -1])
def test_the_search_stays_within_the_budget_and_goes_on_where_it_was(ready: Calibration, cut: int) -> None:
    stays_and_goes_on(ready, "rco", cut)


@pytest.mark.parametrize("method", [method for method in SEARCHES if method != "rco"])
def test_so_does_every_rival(one: Calibration, method: str) -> None:
    stays_and_goes_on(one, method, 1)


def stays_and_goes_on(ready: Calibration, method: Any, cut: int) -> None:
    """A search ends within the budget, and the same whether or not it was cut off after one of its snapshots."""
    table = ready.model.table
    references = (ready.calibrated.train, ready.calibrated.kept_out)
    budget = Budget(int(table.original_bytes * 0.2), "test")
    start = {"random": knapsack(np.random.default_rng(0).random(ready.q.shape), table, budget)}
    settings = Search(method=method, steps=12, refine=12, samples=2, batch=2, evaluate_every=1)

    class Kept:
        """Remembers one of the snapshots, as if the run had been cut off after it."""

        saved: ClassVar[list[Any]] = []

        def load(self) -> Any:
            return self.saved[cut] if self.saved else None

        def save(self, values: Any) -> None:
            self.saved.append(dict(values))

    keep = Kept()
    keep.saved.clear()
    at_once, in_two = Totals(), Totals()
    whole, resumed = (
        find(ready.model, budget, ready.by_sequence, ready.pools, references, settings, start, stages, keep)
        for stages in (at_once, in_two)
    )
    whole.best.assignment.check(budget)
    refined = {REFINED} if method == "rco" else set()
    assert {candidate.name for candidate in whole.candidates} == {"random", method} | refined
    assert [record.step for record in whole.history] == list(range(1, len(whole.history) + 1))
    assert whole.best.kl < next(c.kl for c in whole.candidates if c.name == "random")
    assert whole.history == resumed.history
    assert all(at_once.done[name] == done for name, done in in_two.done.items())
    assert np.array_equal(whole.best.assignment.choice, resumed.best.assignment.choice)


@pytest.mark.parametrize("far_off", [True, False])
def test_where_the_estimate_is_far_off_gradients_go_on_in_place_of_races(
    one: Calibration, far_off: bool
) -> None:
    table, references = one.model.table, (one.calibrated.train, one.calibrated.kept_out)
    budget = Budget(int(table.original_bytes * 0.2), "test")
    settings = Search(steps=6, refine=6, samples=2, batch=2, evaluate_every=2)
    start = knapsack(np.random.default_rng(0).random(one.q.shape), table, budget)
    judge = KeptOut(one.model, one.pools[1], references[1])
    predicted = one.q[np.arange(len(one.q)), start.choice].sum()
    off = judge(start.choice) / predicted / FAR_OFF * (1 - 1e-9 if far_off else 1 + 1e-9)
    stages, each = Totals(), 2 * 2 * (1 + BACKWARD)
    chosen = find(
        one.model, budget, one.by_sequence * off, one.pools, references, settings, {"start": start}, stages
    )
    steps = sum(record.tau > 0 for record in chosen.history)
    best = [record.best for record in chosen.history[1:steps:2]]  # after every look
    better = [later < earlier for earlier, later in zip(best, best[2:], strict=False)]
    assert not far_off or (steps > 6 and all(better[:-1]) and (steps == 12 or not better[-1]))
    assert far_off or steps == 6
    tau = settings.tau_start * (settings.tau_end / settings.tau_start) ** (5 / (11 if far_off else 5))
    assert chosen.history[5].tau == pytest.approx(tau)
    assert stages.seen["refine"] == 6 * each
    raced = max((record.evaluations for record in chosen.history[steps:]), default=0)
    assert (raced > 0) == (steps < 12)
    assert stages.done["refine"] == (steps - 6) * each + min(raced, (12 - steps) * each)
    assert judge(chosen.best.assignment.choice) <= judge(start.choice)


def test_the_result_is_never_worse_than_a_candidate(ready: Calibration) -> None:
    table = ready.model.table
    references = (ready.calibrated.train, ready.calibrated.kept_out)
    judge = KeptOut(ready.model, ready.pools[1], references[1])
    for ratio in (0.15, 0.3):
        budget = Budget(int(table.original_bytes * ratio), "test")
        random = knapsack(np.random.default_rng(0).random(ready.q.shape), table, budget)
        seed = knapsack(ready.q, table, budget)
        chosen = find(
            ready.model, budget, ready.by_sequence, ready.pools, references, Search(steps=3, refine=3, samples=2, batch=4),
            {SEED: seed, "random": random}, Silent(),
        )  # fmt: skip
        chosen.best.assignment.check(budget)
        assert {candidate.name for candidate in chosen.candidates} - {REFINED} == {SEED, "random", "rco"}
        for candidate in chosen.candidates:
            assert candidate.kl == pytest.approx(judge(candidate.assignment.choice))
            choices = candidate.assignment.choice, chosen.best.assignment.choice
            raced = candidate.name == "rco"
            assert raced or candidate.kl >= chosen.best.kl or not judge.prefers(*choices)
        assert len(chosen.history) > 3
        assert max(record.budget_error for record in chosen.history) <= 1e-12


def test_where_the_budget_leaves_no_choice_there_is_no_search(ready: Calibration) -> None:
    table = ready.model.table
    references = (ready.calibrated.train, ready.calibrated.kept_out)
    budget = Budget(table.original_bytes, "everything")
    seed = {SEED: knapsack(ready.q, table, budget)}
    chosen = find(ready.model, budget, ready.by_sequence, ready.pools, references, Search(), seed, Silent())
    assert chosen.best.kl == pytest.approx(0, abs=1e-5)
    assert not chosen.history


def test_the_stock_layout_holds_from_the_seed_to_the_result(
    ready: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed, samples and result of a search are of the layout; what is only compared is not."""
    mixed = ready.model.table
    table = dataclasses.replace(mixed, layout="stock")
    monkeypatch.setattr(ready.model, "table", table)
    references = (ready.calibrated.train, ready.calibrated.kept_out)
    budget = Budget(int(table.original_bytes * 0.23), "test")
    seed, free = knapsack(ready.q, table, budget), knapsack(ready.q, mixed, budget)
    rows = np.arange(len(ready.q))
    assert ready.q[rows, free.choice].sum() < ready.q[rows, seed.choice].sum()
    sampled, effects = [], ready.model.effects

    def watched(passes: list[Pass], *rest: Any, **named: Any) -> Any:
        sampled.extend(one.choice for one in passes)
        return effects(passes, *rest, **named)

    monkeypatch.setattr(ready.model, "effects", watched)
    others = {"free": free, "worse": Assignment.uniform(mixed, Option.parse("prune"))}
    others["worse"].choice[:] = knapsack(-ready.q, mixed, budget).choice
    chosen = find(
        ready.model, budget, ready.by_sequence, ready.pools, references, Search(steps=3, refine=3, samples=2, batch=4),
        {SEED: seed}, Silent(), mixed=others,
    )  # fmt: skip
    assert len(sampled) == 2 * sum(record.tau > 0 for record in chosen.history)
    for choice in (*sampled, seed.choice, *(candidate.assignment.choice for candidate in chosen.candidates)):
        Assignment(table, choice).check(budget)
    assert {candidate.name for candidate in chosen.candidates} - {REFINED} == {SEED, "rco"}
    judge = KeptOut(ready.model, ready.pools[1], references[1])
    kls = {name: judge(other.choice) for name, other in others.items()}
    assert chosen.mixed is not None
    assert (chosen.mixed.name, chosen.mixed.kl) == min(kls.items(), key=lambda pair: pair[1])
