"""What a run reports (`report.json`, the summary on the screen), and what it is about to do (`--dry-run`)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_rco.errors import PlanError
from moe_rco.files import check_regular, first_complaint
from moe_rco.types import Budget, Kind, Layout, Room, Score
from moe_rco.units import format_size

FILE_NAME = "report.json"
SIGNIFICANT = 0.05
"""Below this `p` a difference is called more than chance."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Software(_Part):
    """What computed the result: versions by package name, the system, and the device with the threads it was given.

    On another system, device or number of threads sums are rounded otherwise, and the result may differ.
    """

    python: str
    packages: dict[str, str]
    system: str = ""
    device: str = ""
    threads: int = 0


class BudgetPart(_Part):
    """`text` is how the recipe put it, `bytes` what it came to; `room` tells how, where the model is to fit a GPU."""

    text: str
    bytes: int
    room: Room | None = None

    @classmethod
    def of(cls, budget: Budget) -> Self:
        return cls(text=budget.text, bytes=budget.bytes, room=budget.room)

    @property
    def rooms(self) -> str:
        """The room's parts in a line; empty where there is none."""
        if self.room is None:
            return ""
        parts = {
            "other weights": self.room.other_weights,
            "KV cache": self.room.kv_cache,
            "activations (estimated)": self.room.activations,
            "CUDA (estimated)": self.room.reserve,
        }
        listed = ", ".join(f"{format_size(size)} {name}" for name, size in parts.items())
        return f"{format_size(self.room.usable)} usable, less {listed}"


class BytesPart(_Part):
    """File bytes. Experts are the routed experts' tensors and those of the dense groups that were chosen for; `other`
    everything else in the weight files.

    `slack` is budget minus `experts_after`, `slack_ratio` that over the budget; `total` is experts and other.
    """

    experts_before: int
    experts_after: int
    budget: int
    slack: int
    slack_ratio: float
    other: int
    total: int


class Layer(_Part):
    """By the experts' original ids: `options` are the options' names, `tokens` how many of the calibration tokens that are used
    for gradients the original model gave to each.
    """

    layer: int
    options: tuple[str, ...]
    tokens: tuple[int, ...] = ()


class DenseGroup(_Part):
    """A group other than a routed expert: its option, and its bytes in the files."""

    name: str
    kind: Kind
    layer: int
    option: str
    bytes: int


def by_layer(groups: Sequence[DenseGroup]) -> Iterator[tuple[str, str, int]]:
    """Of dense groups, first to last, a line for each layer: its number, or what is before or behind them; options; bytes."""
    for layer, found in itertools.groupby(groups, key=lambda group: group.layer):
        of = list(found)
        inside = of[0].kind not in ("embeddings", "head")
        options = (
            f"{group.name.rpartition('.')[2]} {group.option}" if inside else group.option for group in of
        )
        yield str(layer) if inside else of[0].kind, ", ".join(options), sum(group.bytes for group in of)


class Candidate(_Part):
    """An assignment that was tried: KL in nats per token on calibration sequences kept out, cost in bytes."""

    name: str
    kl: float
    cost: int


class QuantizerOption(_Part):
    """Relative squared error of the experts' outputs on calibration tokens, by either way of rounding."""

    rtn_error: float
    gptq_error: float | None = None


class QuantizerPart(_Part):
    """`undersampled`: by layer, the experts that had too few calibration tokens for a Hessian of their own (fewer than
    `TOKENS_PER_INPUT` for each input of a matrix), which was mixed with their layer's (`quant.hessian.shrink`).
    """

    method: str
    options: dict[str, QuantizerOption]
    undersampled_experts: int
    undersampled: dict[int, tuple[int, ...]] = {}


class Reload(_Part):
    """The written checkpoint against the searched model: largest difference of a logit.

    `by` read it: transformers, or our own layers where the model need not fit into memory. `sample_loss`, in `dtype`, is what
    `moe-rco verify` finds again (`reload.sample_loss`).
    """

    by: Literal["transformers", "our own layers"] = "transformers"
    max_logit_difference: float
    tolerance: float
    passed: bool
    dtype: str = ""
    sample_loss: float | None = None


class SearchStep(_Part):
    """One line of the search's history; `kl` in nats per token is the mean of the step's samples, of a race the loss of
    the better assignment where it has been run.

    Of steps with logits also the relative `budget_error`, the `temperature`, and the mean `entropy` of a group in nats.
    """

    step: int
    kl: float
    budget_error: float | None = None
    temperature: float | None = None
    entropy: float | None = None


class SearchPart(_Part):
    steps: int
    history: tuple[SearchStep, ...]


class StockPart(_Part):
    """What the stock layout came to, and cost: KL in nats per token on calibration sequences kept out.

    `experts_per_layer` are written, `kl` is the winner's. `mixed` is the best of what the mixed layout would
    start its search from at the same budget, without that search. `transformers_reads` says whether transformers loads the
    result without this package, as vLLM does.
    """

    experts_per_layer: int
    kl: float
    mixed: Candidate
    transformers_reads: bool


class Stage(_Part):
    """How long a stage took, and how long the preflight had said it would, if it had."""

    name: str
    seconds: float
    predicted: float | None = None


class MemoryPart(_Part):
    """The largest resident memory of the process so far, what was predicted, and the same of a device; in bytes."""

    host: int
    predicted_host: int
    device: int = 0
    predicted_device: int = 0


class Comparison(_Part):
    """The same items by another model (a directory or Hub name, SHA-256 of its files).

    `difference` is this model's score minus that one's; `p` is two-sided, of the named test over the items.
    Both are null where the score is no function of single items.
    """

    model: str
    digest: str
    score: float
    stderr: float | None
    difference: float
    difference_stderr: float | None
    p: float | None
    test: str | None


class TaskScore(_Part):
    """One metric of one lm-eval task. `group` is the task group it is counted in.

    `items` were scored, after `limit`; the standard error is over them. `files` is where lm-eval's own output
    is, below the report's directory unless absolute.
    """

    backend: str
    task: str
    group: str | None
    metric: str
    filter: str
    num_fewshot: int | None
    limit: int | None
    dtype: str
    higher_is_better: bool | None
    items: int
    score: float
    stderr: float | None
    baseline: Comparison | None
    files: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a later score of the same thing replaces, in the order the report keeps."""
        settings = (-1 if value is None else value for value in (self.num_fewshot, self.limit))
        return (self.backend, self.task, self.metric, self.filter, *settings)


class Report(_Part):
    """The whole run. `kl` and `kl_stderr` are over all held-out text.

    `model_digest`, `recipe_digest` and `manifest` are SHA-256 (hex) of the original model, what in the recipe decides the
    result, and the output's manifest.json. `digest` is that of all else here, as it was saved. `from_hub` tells that `model` is
    a name on the Hub, not a directory.
    """

    version: str
    software: Software
    model: str
    from_hub: bool = Field(default=False, exclude_if=lambda value: not value)
    model_digest: str
    family: str
    recipe_digest: str
    manifest: str = ""
    seed: int
    output: str
    budget: BudgetPart
    bytes: BytesPart
    layers: tuple[Layer, ...]
    dense: tuple[DenseGroup, ...] = Field(default=(), exclude_if=lambda dense: not dense)
    counts: dict[str, int]
    candidates: tuple[Candidate, ...]
    winner: str
    stock: StockPart | None = None
    domains: tuple[Score, ...]
    kl: float
    kl_stderr: float | None
    quantizer: QuantizerPart
    reload: Reload
    search: SearchPart
    stages: tuple[Stage, ...]
    memory: MemoryPart | None = None
    warnings: tuple[str, ...] = ()
    scores: tuple[TaskScore, ...] = ()
    digest: str = ""

    @property
    def dense_counts(self) -> dict[str, dict[str, int]]:
        """Kind of dense group -> option -> how many of them have it."""
        return {
            kind: dict(Counter(group.option for group in self.dense if group.kind == kind))
            for kind in dict.fromkeys(group.kind for group in self.dense)
        }

    @property
    def covers(self) -> str:
        """What the budget covers, as a title."""
        kinds = dict.fromkeys(group.kind.replace("_", " ") for group in self.dense)
        return ", ".join(["routed experts", *kinds])

    @property
    def losses(self) -> tuple[float, float]:
        """On held-out text, before and after, in nats per token."""
        tokens = sum(part.tokens for part in self.domains)
        before = sum(part.tokens * part.loss_before for part in self.domains) / tokens
        return before, sum(part.tokens * part.loss_after for part in self.domains) / tokens

    @property
    def own_digest(self) -> str:
        """What `digest` must be."""
        rest = json.dumps(self.model_dump(mode="json", exclude={"digest"}), sort_keys=True)
        return hashlib.sha256(rest.encode()).hexdigest()

    def with_scores(self, scores: Iterable[TaskScore]) -> Self:
        """This report with scores added; each replaces an earlier one of the same key."""
        by_key = {score.key: score for score in (*self.scores, *scores)}
        return self.model_copy(update={"scores": tuple(by_key[key] for key in sorted(by_key))})

    def check(self) -> None:
        """Raise PlanError, naming both figures, where the bytes of the files and the plan disagree."""
        sizes = self.bytes
        counted: dict[str, int] = {}
        for layer in self.layers:
            for option in layer.options:
                counted[option] = counted.get(option, 0) + 1
        costs = {candidate.name: candidate.cost for candidate in self.candidates}
        agreements: tuple[tuple[str, Any, str, Any], ...] = (
            ("budget in bytes", sizes.budget, "resolved budget", self.budget.bytes),
            ("slack", sizes.slack, "budget minus experts' bytes", sizes.budget - sizes.experts_after),
            ("total bytes", sizes.total, "experts and others together", sizes.experts_after + sizes.other),
            ("experts' bytes in the files", sizes.experts_after, "the plan's cost", costs.get(self.winner)),
            (
                "counts per option",
                {name: count for name, count in self.counts.items() if count},
                "counts over the layers",
                counted,
            ),
        )
        for name, value, other_name, other in agreements:
            if value != other:
                raise PlanError(f"report: {name} ({value}) and {other_name} ({other}) disagree")
        if sizes.experts_after > sizes.budget:
            raise PlanError(
                f"report: the experts take {sizes.experts_after} bytes, the budget is {sizes.budget} bytes"
            )

    def to_json(self) -> str:
        """Keys sorted, with its digest; the same report gives the same text."""
        value = self.model_dump(mode="json") | {"digest": self.own_digest}
        return json.dumps(value, indent=2, sort_keys=True) + "\n"

    def save(self, directory: Path) -> Path:
        """Write `report.json` into a directory, whole or not at all."""
        path = directory / FILE_NAME
        temporary = path.with_name(f".{FILE_NAME}.part")
        temporary.write_text(self.to_json(), encoding="utf-8")
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read and check the report in a directory. Raises PlanError."""
        path = directory / FILE_NAME
        check_regular(path, PlanError)
        try:
            report = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"{path}: not text: {error}") from error
        except ValidationError as error:
            raise PlanError(f"{path}: not a report of this version: {first_complaint(error)}") from error
        report.check()
        return report


class TextPart(_Part):
    """A part of the calibration text: its sequences, and the share of their tokens that counts (of a conversation: what the
    assistant says).
    """

    name: str
    sequences: int
    counted: float


class OptionCost(_Part):
    """`bytes_per_expert` is the mean over the experts (they differ only where their shapes do)."""

    name: str
    bytes_per_expert: int


class Preflight(_Part):
    """What `--dry-run` prints: everything known before any work. Sizes in bytes, the largest budget first.

    `groups` are what the budget covers, `experts_before` what that takes now, and `other_bytes` all other weights.
    `smallest` and `largest` bound what the options can cost; `memory` and
    `device_memory` estimate the run's peaks; `streamed` tells that weights are read from disk as they are needed. `stages` are
    what a short measurement says that each stage will take in seconds, for all budgets together; empty where the model is
    not here.
    """

    model: str
    family: str
    layers: int
    experts_per_layer: int
    top_k: int
    layout: Layout = "mixed"
    options: tuple[OptionCost, ...]
    groups: tuple[Kind, ...] = ("experts",)
    experts_before: int
    other_bytes: int
    smallest: int
    largest: int
    budgets: tuple[BudgetPart, ...]
    sequences: int
    tokens: int
    holdout_sequences: int
    text: tuple[TextPart, ...] = ()
    search_method: str
    search_steps: int
    search_races: int
    search_samples: int
    output: str
    disk_needed: int
    disk_free: int
    memory: int
    device_memory: int = 0
    streamed: bool = False
    stages: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
