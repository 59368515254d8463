"""The search for an assignment: RCO on the model's own loss, refined by races; or a rival's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
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
    StepRecord,
    evolution_steps,
    refine,
    solve,
)
from moe_rco.optim.gumbel import temperature
from moe_rco.optim.races import RACES
from moe_rco.optim.solve import SEARCHES, step_passes
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


def predicted(q: np.ndarray, choice: np.ndarray) -> float:
    """KL of an assignment, were the effects [N, K] of its options to add up."""
    return float(q[np.arange(len(q)), choice].sum())


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

    def told(name: str, assignment: Assignment) -> Candidate:
        candidate = Candidate(name, assignment, judge(assignment.choice))
        _log.info(
            "candidate %s: KL %.5f on text kept out, %s bytes", name, candidate.kl, f"{assignment.cost:,}"
        )
        return candidate

    with progress.stage("judge the candidates", len(candidates)) as advance:
        for name, assignment in candidates.items():
            tried.append(told(name, assignment))
            advance(1)
    best, rival = tried[0], min(tried, key=lambda candidate: candidate.kl)
    if job.prefers(rival, best):
        best = rival
    history: tuple[StepRecord, ...] = ()
    final = None
    smallest, largest = model.table.range
    # Where the budget leaves no choice there is nothing to search.
    if search.method in SEARCHES and smallest < budget.bytes < largest:
        for found in job.results(best, rival):
            tried.append(told(found.name, Assignment(model.table, found.choice)))
            history += found.history
            final = final if found.logits is None else found.logits
        # What races follow has to win one, and is then part of what they end with.
        if history and job.prefers(tried[-1], best):
            best = tried[-1]
    others = [Candidate(name, other, judge(other.choice)) for name, other in (mixed or {}).items()]
    compared = min(others, key=lambda candidate: candidate.kl, default=None)
    _log.info("chosen: %s", best.name)
    return Chosen(best, tuple(sorted(tried, key=lambda candidate: candidate.kl)), history, compared, final)


def _tell(name: str, record: StepRecord) -> None:
    parts = [f"loss {record.loss:.5f}"]
    if record.tau:  # races have none
        parts += [f"budget error {record.budget_error:.1e}", f"temperature {record.tau:.3f}"]
        parts += [f"entropy {record.entropy:.3f}"]
    if record.value is not None:
        parts.append(f"{record.value:.5f} on text kept out, best {record.best:.5f}")
    _log.info("%s step %d: %s", name, record.step, ", ".join(parts))


@dataclass(frozen=True)
class _Found:
    """What a part of the search ended with; `logits` are None where it has none."""

    name: str
    choice: np.ndarray
    history: tuple[StepRecord, ...]
    logits: torch.Tensor | None = None

    def pays(self, last: int) -> bool:
        """Whether the `last` steps found something better on the kept-out sequences."""
        bests = [record.best for record in self.history]
        return bests[-1] < bests[max(0, len(bests) - 1 - last)]

    def state(self) -> dict[str, Any]:
        """What `load` needs."""
        choice, history = torch.from_numpy(self.choice), pack_history(self.history)
        return {"found": choice, "found.history": history, "found.logits": self.logits}

    @classmethod
    def load(cls, name: str, state: Mapping[str, Any]) -> _Found | None:
        """None where there is none in the state."""
        if "found" not in state:
            return None
        history = tuple(unpack_history(state["found.history"]))
        return cls(name, state["found"].numpy(), history, state["found.logits"])


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

    def results(self, best: Candidate, lowest: Candidate) -> list[_Found]:
        """What the recipe's method finds from the lowest KL; then, with `rco`, what races make of it and the best."""
        search, state = self.search, (self.resume.load() if self.resume else None) or {}
        found, gradients = _Found.load(search.method, state), None
        if search.search_steps and found is None:
            gradients = _Gradients(self, lowest, state)
            with self.progress.stage("search", gradients.total) as advance:
                found = gradients.begin(advance)
        if not search.races:
            return [] if found is None else [found]

        def more() -> int:
            return 0 if found is None else max(0, len(found.history) - search.search_steps)

        each = step_passes(search.samples, search.batch)
        with self.progress.stage("refine", search.races * each) as advance:
            advance(more() * each)
            if gradients is not None:
                found = gradients.go_on(lambda steps: advance(steps * each))
            refined = self._raced(best, lowest, found, (search.races - more()) * each, state, advance)
        return [result for result in (found, refined) if result is not None]

    def _raced(
        self,
        best: Candidate,
        lowest: Candidate,
        found: _Found | None,
        passes: int,
        state: Mapping[str, Any],
        advance: Callable[[int], None],
    ) -> _Found | None:
        """What races of so many passes make of the best; None where none are left."""
        if not passes:
            return None
        table = self.model.table
        doubt = np.full(len(table.options), DOUBT)
        if table.prune_index is not None:
            doubt[table.prune_index] = DOUBT_OF_PRUNING
        begun = state if "races.best" in state else None
        done = min(passes, int(begun["races.passes"])) if begun else 0
        advance(done)
        challengers, first, before = [lowest.assignment.choice], dict[str, Any](), 0
        if found is not None:
            challengers.append(found.choice)
            first, before = found.state(), len(found.history)

        def counted(record: StepRecord) -> StepRecord:
            return replace(record, step=before + record.step)

        def on_step(record: StepRecord) -> None:
            nonlocal done
            self.watch(RACES, counted(record))
            self.save(record, first)
            _tell("races", record)
            advance(min(passes, record.evaluations) - done)
            done = min(passes, record.evaluations)

        result = refine(
            row_losses(self.model, self.pools[0], self.references[0]), len(self.pools[0]),
            feasible(table, self.budget), best.assignment.choice, self.q, doubt * self.q, passes=passes,
            challengers=challengers, controls=self.by_sequence,
            units=table.layer if table.layout == "stock" else None,
            on_step=on_step, state=begun, seed=self.search.seed,
        )  # fmt: skip
        return _Found(REFINED, result.choice, tuple(counted(record) for record in result.history))

    def save(self, record: StepRecord, more: Mapping[str, Any]) -> None:
        if self.resume and record.step % self.search.evaluate_every == 0:
            self.resume.save({**record.state(), **more})


class _Gradients:
    """The steps of a search from `start`; where the estimate is far off, they may go on in place of races.

    `total` is how many there are before that.
    """

    def __init__(self, job: _Job, start: Candidate, state: Mapping[str, Any]) -> None:
        search, table, reference = job.search, job.model.table, job.references[0]
        far_off = start.kl > FAR_OFF * predicted(job.q, start.assignment.choice)
        self._most = search.search_steps + (search.races if far_off else 0)
        self._job, self._state, self._done = job, state, int(state.get("step", 0))
        self._loss = SampledLoss(job.model, job.q, job.pools[0], reference, search)
        self._loss.skip(self._done)
        self._given: dict[str, Any] = {
            "feasible": feasible(table, job.budget), "evaluate": job.judge, "evaluate_every": search.evaluate_every,
            "seed": search.seed, "samples": search.samples,
            "floor": table.floors, "layer": table.layer, "allowed": torch.from_numpy(table.allowed),
        }  # fmt: skip
        self.total = search.search_steps
        if search.method == "evolution":
            self.total = evolution_steps(search.search_steps, search.samples)
            value = batch_losses(job.model, job.pools[0], reference, search)
            self._given |= {"value": value, "start": start.assignment.choice}
        else:
            logits = start_logits(job.q, start.assignment) if job.logits is None else job.logits
            self._given |= {
                "lr": search.learning_rate,
                "init_logits": logits,
                "weight": search.penalty * start.kl,
            }

    def begin(self, advance: Callable[[int], None]) -> _Found:
        """What the recipe's steps find."""
        advance(min(self._done, self.total))
        self._found = self._until(self._job.search.search_steps, advance)
        return self._found

    def go_on(self, advance: Callable[[int], None]) -> _Found:
        """What more steps make of it, for as long as one of the last two looks found something better."""
        end, every = self._job.search.search_steps, self._job.search.evaluate_every
        # What was done before an interruption had paid.
        while end < self._most and (end < self._done or self._found.pays(2 * every)):
            end = min(end + every, self._most)
            if end >= self._done:
                self._found = self._until(end, advance)
        return self._found

    def _until(self, end: int, advance: Callable[[int], None]) -> _Found:
        job, search, table = self._job, self._job.search, self._job.model.table

        def on_step(record: StepRecord) -> None:
            job.watch(SEARCH, record)
            job.save(record, {})
            _tell("search", record)
            advance(1)
            self._state = record.state()

        given = self._given | {"steps": end, "on_step": on_step, "state": self._state or None}
        if search.method != "evolution":
            first, last = search.tau_start, search.tau_end
            # One schedule over all steps there may be.
            given["tau"] = first, temperature(end - 1, self._most, (first, last))
        result = solve(
            torch.from_numpy(table.costs),
            job.budget.bytes,
            self._loss,
            method=SEARCHES[search.method],
            **given,
        )
        logits = result.logits if result.logits.numel() else None
        return _Found(search.method, result.choice, result.history, logits)
