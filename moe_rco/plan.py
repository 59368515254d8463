"""The plan: which option every expert and every other group takes, at which cost, found from which inputs. Stored as
`plan.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from moe_rco.errors import PlanError, RecipeError
from moe_rco.files import check_regular, first_complaint
from moe_rco.types import Assignment, Budget, CostTable, Layout, Option

FILE_NAME = "plan.json"
METHOD = "moe_rco"
FORMAT_VERSION = 1
DENSE_FORMAT_VERSION = 2
"""That of models whose dense groups were chosen for as well: readers that know experts only refuse it."""

Layers = dict[NonNegativeInt, dict[str, tuple[NonNegativeInt, ...]]]
"""Layer -> option name -> ids of the experts that take it, ascending. An option no expert takes is left
out.
"""
DenseGroups = dict[str, tuple[str, ...]]
"""Option name -> names of the dense groups that take it, sorted. Those that were not chosen for are left out."""


class Plan(BaseModel):
    """A chosen assignment and what it was chosen for.

    `cost` and `budget` are bytes of the tensors of routed experts, and of the groups in `dense`, as written; `slack` is their
    difference.
    `model`, `recipe` and `costs` are SHA-256 digests (hex) of the original model, the recipe and the cost
    table. Ids in `layers` are those of the original model for both layouts; see `kept`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    layout: Layout = "mixed"
    model: str
    recipe: str
    costs: str
    options: tuple[str, ...]
    budget: NonNegativeInt
    cost: NonNegativeInt
    slack: int
    layers: Layers
    dense: DenseGroups = Field(default={}, exclude_if=lambda dense: not dense)
    losses: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}

    @field_validator("layers")
    @classmethod
    def _ordered(cls, layers: Layers) -> Layers:
        return {
            layer: {name: tuple(sorted(ids)) for name, ids in sorted(by_option.items())}
            for layer, by_option in sorted(layers.items())
        }

    @field_validator("dense")
    @classmethod
    def _sorted(cls, dense: DenseGroups) -> DenseGroups:
        return {name: tuple(sorted(groups)) for name, groups in sorted(dense.items())}

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.cost > self.budget:
            raise ValueError(f"it needs {self.cost:,} bytes, its budget is {self.budget:,}")
        if self.slack != self.budget - self.cost:
            raise ValueError(f"it says its slack is {self.slack:,} bytes, it is {self.budget - self.cost:,}")
        return self

    @classmethod
    def from_assignment(
        cls,
        assignment: Assignment,
        budget: Budget,
        *,
        model_digest: str,
        recipe_digest: str,
        losses: Mapping[str, float] | None = None,
    ) -> Plan:
        """The plan of an assignment. Raises PlanError if the assignment violates the budget or a layer's
        floor.
        """
        assignment.check(budget)
        table = assignment.table
        layers: dict[int, dict[str, list[int]]] = {layer: {} for layer in table.layers}
        for row, group in enumerate(table.experts.groups):
            layers[group.layer].setdefault(assignment.option(row).name, []).append(group.index)
        dense: dict[str, list[str]] = {}
        for group, option, _ in assignment.dense():
            dense.setdefault(option.name, []).append(group.name)
        return cls(
            layout=table.layout,
            model=model_digest,
            recipe=recipe_digest,
            costs=costs_digest(table),
            options=tuple(option.name for option in table.options),
            budget=budget.bytes,
            cost=assignment.cost,
            slack=budget.bytes - assignment.cost,
            layers={layer: {name: tuple(ids) for name, ids in by.items()} for layer, by in layers.items()},
            dense={name: tuple(groups) for name, groups in dense.items()},
            losses=dict(losses or {}),
        )

    def assignment(self, table: CostTable) -> Assignment:
        """The assignment over a table's groups. Raises PlanError unless each takes exactly one of its
        options.
        """
        options = {option.name: index for index, option in enumerate(table.options)}
        rows = {(group.layer, group.index): row for row, group in enumerate(table.experts.groups)}
        dense = {table.groups[row].name: int(row) for row in table.dense}
        choice = np.full(len(table.groups), -1, dtype=np.int64)

        def choose(who: str, row: int | None, option: Option) -> None:
            if row is None:
                raise PlanError(f"the plan names {who}, which the model does not have")
            if option.name not in options:
                raise PlanError(
                    f"the plan gives {who} the option {option.name}, "
                    f"which is not one of its options ({', '.join(options)})"
                )
            choice[row] = options[option.name]

        for (layer, expert), option in by_expert(self.layers).items():
            choose(f"expert {expert} of layer {layer}", rows.get((layer, expert)), option)
        for name, option in by_name(self.dense).items():
            choose(name, dense.get(name), option)
        if (choice < 0).any():
            group = table.groups[int(np.argmax(choice < 0))]
            who = group.name if group.is_dense else f"expert {group.index} of layer {group.layer}"
            raise PlanError(f"the plan gives {who} no option")
        return Assignment(table, choice)

    def check(self, table: CostTable) -> Assignment:
        """Check the plan against the model's cost table and return its assignment.

        Raises PlanError where it does not cover every expert once, names unknown options, misstates its
        cost, exceeds its budget, breaks a layer's floor or its layout, or was made from other costs.
        """
        if self.layout != table.layout:
            raise PlanError(f"the plan's layout is {self.layout}, the cost table's {table.layout}")
        if self.options != tuple(option.name for option in table.options):
            raise PlanError(
                f"the plan's options are {', '.join(self.options)}, the cost table's "
                f"{', '.join(option.name for option in table.options)}"
            )
        if self.costs != costs_digest(table):
            raise PlanError("the plan was made from other costs; search again")
        assignment = self.assignment(table)
        if assignment.cost != self.cost:
            raise PlanError(
                f"the plan says it costs {self.cost} bytes, its options cost {assignment.cost} bytes"
            )
        assignment.check(Budget(self.budget, f"{self.budget} bytes"))
        return assignment

    def kept(self, layer: int) -> tuple[int, ...]:
        """The original ids of the experts a layer keeps, ascending.

        Layout stock numbers experts anew: the expert written as j is the j-th of these. Layout mixed writes
        original ids.
        """
        by_option = self.layers[layer].items()
        return tuple(sorted(e for name, ids in by_option if not Option.parse(name).is_prune for e in ids))

    def quantization_config(self) -> dict[str, Any]:
        """The entry of that name in config.json, by which loaders know what every expert became."""
        entry = {
            "quant_method": METHOD,
            "format_version": DENSE_FORMAT_VERSION if self.dense else FORMAT_VERSION,
            "layers": {
                str(layer): {name: list(ids) for name, ids in by_option.items()}
                for layer, by_option in self.layers.items()
            },
        }
        return (
            entry | {"dense": {name: list(groups) for name, groups in self.dense.items()}}
            if self.dense
            else entry
        )

    def to_json(self) -> str:
        """Sorted JSON: the same plan always gives the same text."""
        return json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan to a file (usually `plan.json`). Raises OSError."""
        Path(path).write_text(self.to_json(), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file, or from `plan.json` in a directory. Raises PlanError."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        check_regular(path, PlanError)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PlanError(f"cannot read the plan {path} ({error.strerror})") from error
        except ValidationError as error:
            raise PlanError(f"{path} is not a plan: {first_complaint(error)}") from error


def by_expert(layers: Mapping[int, Mapping[str, tuple[int, ...]]]) -> dict[tuple[int, int], Option]:
    """(layer, expert) -> option. Raises PlanError for an unknown option or an expert named twice."""
    result: dict[tuple[int, int], Option] = {}
    for layer, by_option in layers.items():
        for name, ids in by_option.items():
            try:
                option = Option.parse(name)
            except RecipeError as error:
                raise PlanError(f"layer {layer}: {error}") from error
            for expert in ids:
                if (layer, expert) in result:
                    raise PlanError(f"expert {expert} of layer {layer} is given two options")
                result[layer, expert] = option
    return result


def by_name(dense: Mapping[str, tuple[str, ...]]) -> dict[str, Option]:
    """Name of a dense group -> its option. Raises PlanError for an option that no such group has, or a group named twice."""
    result: dict[str, Option] = {}
    for name, groups in dense.items():
        try:
            option = Option.parse(name)
        except RecipeError as error:
            raise PlanError(str(error)) from error
        for group in groups:
            if option.is_prune:
                raise PlanError(f"{group} cannot be pruned")
            if group in result:
                raise PlanError(f"{group} is given two options")
            result[group] = option
    return result


def costs_digest(table: CostTable) -> str:
    """SHA-256 (hex) over a table's groups, options, floor and costs."""
    groups = [
        (group.name, group.layer, group.index, [(w.name, w.shape) for w in group.weights])
        for group in table.groups
    ]
    head = [groups, [option.name for option in table.options], table.floor, table.original_bytes]
    digest = hashlib.sha256(json.dumps(head, separators=(",", ":")).encode())
    digest.update(np.ascontiguousarray(table.costs, dtype="<i8").tobytes())
    return digest.hexdigest()
