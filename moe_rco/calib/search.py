"""The search for an assignment: RCO on the model's own loss, refined by races; or a rival's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from moe_rco.calib.data import TokenPool
from moe_rco.calib.losses import KeptOut, SampledLoss, batch_losses, row_losses
from moe_rco.calib.objective import AssignedModel
from moe_rco.calib.reference import Reference
from moe_rco.optim import (
    EqualLayers,
    FeasibleSet,
    Knapsack,
    SolveResult,
    StepRecord,
    evolution_steps,
    refine,
    solve,
)
from moe_rco.optim.gumbel import temperature
from moe_rco.optim.races import RACES
from moe_rco.optim.solve import BACKWARD, SEARCHES
from moe_rco.optim.solver import SEARCH
from moe_rco.optim.trace import pack_history, unpack_history
from moe_rco.recipe_sections import Search
from moe_rco.types import Assignment, Budget, CostTable, Progress

_log = logging.getLogger(__name__)
SEED, REFINED = "fisher seed", "rco, refined"
START_BONUS = 1.0
DOUBT, DOUBT_OF_PRUNING = 0.25, 0.5
"""Standard error of the Fisher estimate of an option, as a part of it; the races find by how much that is off."""
FAR_OFF = 1.75
"""How many times what is predicted of the first assignment its loss has to be for gradients to go before races, which rely
on what is predicted."""


def feasible(table: CostTable, budget: Budget) -> FeasibleSet:
    """The assignments within the budget that keep the table's options, floor and layout. Raises BudgetError."""
    if table.layout == "stock":
        return EqualLayers(table.costs, budget.bytes, floor=table.floor, layer=table.layer)
    return Knapsack(table.costs, budget.bytes, floor=table.floors, layer=table.layer, allowed=table.allowed)


def knapsack(losses: np.ndarray, table: CostTable, budget: Budget) -> Assignment:
    """The feasible assignment with the least sum of `losses` [N, K], exactly. Raises BudgetError."""
    return Assignment(table, feasible(table, budget).solve(-losses).choice)


def start_logits(q: np.ndarray, start: Assignment) -> torch.Tensor:
    """-q / T with T the mean predicted loss of `start`: differences that matter are of order one.

    Options of `start` get a bonus, so that the search begins near it even where q would choose otherwise.
    """
    groups = np.arange(len(q))
    temperature = q[groups, start.choice].mean()
    logits = -q / max(temperature, 1e-12)
    logits[groups, start.choice] += START_BONUS
    return torch.from_numpy(logits)


Watch = Callable[[str, StepRecord], None]
"""Is called with the stage, `search` or `races`, and each of its steps."""


class Resume(Protocol):
    """Where an interrupted search is kept."""

    def load(self) -> dict[str, Any] | None: ...

    def save(self, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Candidate:
    """An assignment that was tried, and its KL on the kept-out sequences in nats per token."""

    name: str
    assignment: Assignment
    kl: float


@dataclass(frozen=True)
class Chosen:
    """The best candidate, all of them (best first), and the history of the search.

    `mixed` is the best of the assignments that were only to be compared with; None where there were none. `logits` [N, K]
    are those that the search ended with, None where it has none.
    """

    best: Candidate
    candidates: tuple[Candidate, ...]
    history: tuple[StepRecord, ...]
    mixed: Candidate | None = None
    logits: torch.Tensor | None = None


def find(
    model: AssignedModel,
    budget: Budget,
    by_sequence: np.ndarray,
    pools: tuple[TokenPool, TokenPool],
    references: tuple[Reference, Reference],
    search: Search,
    candidates: Mapping[str, Assignment],
    progress: Progress,
    resume: Resume | None = None,
    mixed: Mapping[str, Assignment] | None = None,
    logits: torch.Tensor | None = None,
    watch: Watch = lambda stage, record: None,
) -> Chosen:
    """The best assignment found on the kept-out sequences by the recipe's method, which starts from the best candidate.

    `by_sequence` [R, N, K] is what `fisher_effects` says of the first pool.
    With `rco` the first candidate stays unless another is clearly better; what has won its races on the calibration text
    already has only to be better. A method that does not search has its own
    assignments as candidates. `mixed` are assignments outside the table's layout, judged on the same text to tell what
    the layout costs. `logits` [N, K] are where the search begins, in place of those of the best candidate. `watch` is called
    with every record of the history, those of races counted on, before it is kept in `resume`.
    """
    judge = KeptOut(model, pools[1], references[1])
    job = _Job(model, budget, by_sequence, pools, references, search, judge, progress, resume, logits, watch)
    tried = list[Candidate]()
    with progress.stage("judge the candidates", len(candidates)) as advance:
        for name, assignment in candidates.items():
            tried.append(_told(Candidate(name, assignment, judge(assignment.choice))))
            advance(1)
    best, rival = tried[0], min(tried, key=lambda candidate: candidate.kl)
    if job.prefers(rival, best):
        best = rival
    history: tuple[StepRecord, ...] = ()
    final = None
    smallest, largest = model.table.range
    # Where the budget leaves no choice there is nothing to search.
    if search.method in SEARCHES and smallest < budget.bytes < largest:
        for found, records, ended in job.results(best, rival):
            tried.append(_told(found))
            history += records
            final = final if ended is None else ended
        # What races follow has to win one, and is then part of what they end with.
        if history and job.prefers(tried[-1], best):
            best = tried[-1]
    others = [Candidate(name, other, judge(other.choice)) for name, other in (mixed or {}).items()]
    compared = min(others, key=lambda candidate: candidate.kl, default=None)
    _log.info("chosen: %s", best.name)
    return Chosen(best, tuple(sorted(tried, key=lambda candidate: candidate.kl)), history, compared, final)


def _told(candidate: Candidate) -> Candidate:
    cost = candidate.assignment.cost
    _log.info("candidate %s: KL %.5f on text kept out, %s bytes", candidate.name, candidate.kl, f"{cost:,}")
    return candidate


def _pays(result: SolveResult, last: int) -> bool:
    """Whether the `last` steps found something better on the kept-out sequences."""
    bests = [record.best for record in result.history]
    return bests[-1] < bests[max(0, len(bests) - 1 - last)]


def _tell(name: str, record: StepRecord) -> None:
    parts = [f"loss {record.loss:.5f}"]
    if record.tau:  # races have none
        parts += [f"budget error {record.budget_error:.1e}", f"temperature {record.tau:.3f}"]
        parts += [f"entropy {record.entropy:.3f}"]
    if record.value is not None:
        parts.append(f"{record.value:.5f} on text kept out, best {record.best:.5f}")
    _log.info("%s step %d: %s", name, record.step, ", ".join(parts))


@dataclass(frozen=True)
class _Job:
    """What the stages of a search share."""

    model: AssignedModel
    budget: Budget
    by_sequence: np.ndarray
    pools: tuple[TokenPool, TokenPool]
    references: tuple[Reference, Reference]
    search: Search
    judge: KeptOut
    progress: Progress
    resume: Resume | None
    logits: torch.Tensor | None
    watch: Watch

    @cached_property
    def q(self) -> np.ndarray:
        """The Fisher estimate [N, K]."""
        return self.by_sequence.mean(0, dtype=np.float64)

    def prefers(self, candidate: Candidate, best: Candidate) -> bool:
        """Whether a candidate is to take the best one's place."""
        if self.search.method != "rco" or candidate.name == REFINED:
            return candidate.kl < best.kl
        return self.judge.prefers(candidate.assignment.choice, best.assignment.choice)

    def results(
        self, best: Candidate, lowest: Candidate
    ) -> Iterator[tuple[Candidate, tuple[StepRecord, ...], torch.Tensor | None]]:
        """What the recipe's method finds from the lowest KL; then, with `rco`, what races make of it and the best.

        With each its history and the logits it ended with, None where it has none.
        """
        search, state = self.search, (self.resume.load() if self.resume else None) or {}
        first, history = dict[str, torch.Tensor](), tuple[StepRecord, ...]()
        challengers = [lowest.assignment.choice]
        if search.search_steps:
            if "found" in state:
                choice, history = state["found"].numpy(), tuple(unpack_history(state["found.history"]))
                logits = state["found.logits"]
            else:
                result = self._searched(lowest, state)
                choice, history, logits = result.choice, result.history, result.logits
            first = {"found": torch.from_numpy(choice), "found.history": pack_history(history)}
            first["found.logits"] = logits
            challengers.append(choice)
            yield self._candidate(search.method, choice), history, logits if logits.numel() else None
        before = len(history)
        if (races := search.races - max(0, before - search.search_steps)) > 0:
            result = self._refined(best.assignment.choice, challengers, state, first, before, races)
            later = (replace(record, step=before + record.step) for record in result.history)
            yield self._candidate(REFINED, result.choice), tuple(later), None

    def _candidate(self, name: str, choice: np.ndarray) -> Candidate:
        return Candidate(name, Assignment(self.model.table, choice), self.judge(choice))

    def _searched(self, start: Candidate, state: Mapping[str, Any]) -> SolveResult:
        """The search's steps; where the estimate is far off more of them in place of races, for as long as that pays."""
        search, table, budget = self.search, self.model.table, self.budget
        steps, every = search.search_steps, search.evaluate_every
        predicted = self.q[np.arange(len(self.q)), start.assignment.choice].sum()
        most = steps + (search.races if start.kl > FAR_OFF * predicted else 0)
        loss = SampledLoss(self.model, self.q, self.pools[0], self.references[0], search)
        shared: dict[str, Any] = {
            "feasible": feasible(table, budget), "evaluate": self.judge, "evaluate_every": every,
            "seed": search.seed, "samples": search.samples,
            "floor": table.floors, "layer": table.layer, "allowed": torch.from_numpy(table.allowed),
        }  # fmt: skip
        total = steps
        if search.method == "evolution":
            total = evolution_steps(steps, search.samples)
            value = batch_losses(self.model, self.pools[0], self.references[0], search)
            shared |= {"value": value, "start": start.assignment.choice}
        else:
            logits = start_logits(self.q, start.assignment) if self.logits is None else self.logits
            shared |= {"lr": search.learning_rate, "init_logits": logits, "weight": search.penalty * start.kl}

        def run(end: int, advance: Callable[[int], None]) -> SolveResult:
            def on_step(record: StepRecord) -> None:
                nonlocal state
                self.watch(SEARCH, record)
                self._save(record, {})
                _tell("search", record)
                advance(1)
                state = record.state()

            costs, method = torch.from_numpy(table.costs), SEARCHES[search.method]
            if search.method != "evolution":
                shared["tau"] = (
                    search.tau_start,
                    temperature(end - 1, most, (search.tau_start, search.tau_end)),
                )
            given = shared | {"steps": end, "on_step": on_step, "state": state or None}
            return solve(costs, budget.bytes, loss, method=method, **given)

        done = int(state["step"]) if state else 0
        loss.skip(done)
        with self.progress.stage("search", total) as advance:
            advance(min(done, total))
            result = run(steps, advance)
        end = steps
        if end == most:
            return result
        with self.progress.stage("search on", most - steps) as advance:
            advance(max(0, done - steps))
            # What was done before an interruption had paid.
            while end < most and (end < done or _pays(result, 2 * every)):
                end = min(end + every, most)
                if end >= done:
                    result = run(end, advance)
        return result

    def _refined(
        self,
        start: np.ndarray,
        challengers: list[np.ndarray],
        state: Mapping[str, Any],
        first: Mapping[str, torch.Tensor],
        before: int,
        races: int,
    ) -> SolveResult:
        search, table = self.search, self.model.table
        doubt = np.full(len(table.options), DOUBT)
        if table.prune_index is not None:
            doubt[table.prune_index] = DOUBT_OF_PRUNING
        passes = races * search.samples * (1 + BACKWARD) * search.batch
        begun = state if "races.best" in state else None
        done = min(passes, int(begun["races.passes"])) if begun else 0
        with self.progress.stage("refine by races", passes) as advance:
            advance(done)

            def on_step(record: StepRecord) -> None:
                nonlocal done
                self.watch(RACES, replace(record, step=before + record.step))
                self._save(record, first)
                _tell("races", record)
                advance(min(passes, record.evaluations) - done)
                done = min(passes, record.evaluations)

            return refine(
                row_losses(self.model, self.pools[0], self.references[0]), len(self.pools[0]),
                feasible(table, self.budget), start, self.q, doubt * self.q, passes=passes,
                challengers=challengers, controls=self.by_sequence,
                units=table.layer if table.layout == "stock" else None,
                on_step=on_step, state=begun, seed=search.seed,
            )  # fmt: skip

    def _save(self, record: StepRecord, more: Mapping[str, Any]) -> None:
        if self.resume and record.step % self.search.evaluate_every == 0:
            self.resume.save({**record.state(), **more})
