"""Quality against bytes over several budgets: `curve.json`, and the same as a picture, `curve.svg`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_rco.chart import Mark, Panel, draw
from moe_rco.ckpt.destination import CURVE, CURVE_PICTURE
from moe_rco.ckpt.writer import replace_text
from moe_rco.errors import OutputError, PlanError
from moe_rco.files import check_regular, first_complaint
from moe_rco.report import Candidate, Report


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoint(_Part):
    """One budget's model, in a `directory` beside the curve. Bytes are those that the budget covers.

    `kl` (to the original, with its standard error) and `loss` are over all held-out text, in nats per token.
    `candidates` are the assignments that were tried within this budget; their KL is on the calibration text kept out.
    """

    directory: str
    budget: str
    budget_bytes: int
    expert_bytes: int
    total_bytes: int
    kl: float
    kl_stderr: float | None
    loss: float
    winner: str
    candidates: tuple[Candidate, ...]


class Curve(_Part):
    """The models that one run made for several budgets, the largest first. `original_loss` is before, on the same text."""

    model: str
    recipe_digest: str
    experts_before: int
    original_loss: float
    points: tuple[CurvePoint, ...]

    @classmethod
    def of(cls, directories: Iterable[str], reports: Iterable[Report]) -> Self:
        """The curve of at least one report."""
        reports = tuple(reports)
        first = reports[0]
        return cls(
            model=first.model,
            recipe_digest=first.recipe_digest,
            experts_before=first.bytes.experts_before,
            original_loss=first.losses[0],
            points=tuple(
                CurvePoint(
                    directory=directory,
                    budget=report.budget.text,
                    budget_bytes=report.budget.bytes,
                    expert_bytes=report.bytes.experts_after,
                    total_bytes=report.bytes.total,
                    kl=report.kl,
                    kl_stderr=report.kl_stderr,
                    loss=report.losses[1],
                    winner=report.winner,
                    candidates=report.candidates,
                )
                for directory, report in zip(directories, reports, strict=True)
            ),
        )

    def save(self, directory: Path) -> None:
        """Write both files into a directory, each whole or not at all. Raises OutputError."""
        try:
            replace_text(directory / CURVE, json.dumps(self.model_dump(), indent=2, sort_keys=True) + "\n")
            replace_text(directory / CURVE_PICTURE, self.picture())
        except OSError as error:
            raise OutputError(f"cannot write {directory / CURVE}: {error}") from error

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the curve in a directory. Raises PlanError."""
        path = directory / CURVE
        check_regular(path, PlanError)
        try:
            curve = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise PlanError(f"{path}: not a curve of this version: {first_complaint(error)}") from error
        for point in curve.points:
            if not re.fullmatch(r"[\w%][\w.%-]*", point.directory):
                raise PlanError(f"{path}: {point.directory!r} is not the name of a directory beside it")
        return curve

    def panels(self) -> tuple[Panel, Panel]:
        """The KL and the loss on held-out text against the experts' bytes."""
        kl = [
            Mark(point.expert_bytes, point.kl, point.kl_stderr or 0.0, point.directory)
            for point in self.points
        ]
        tried = [
            Mark(candidate.cost, candidate.kl)
            for point in self.points
            for candidate in point.candidates
            if candidate.name != point.winner
        ]
        loss = [Mark(point.expert_bytes, point.loss, 0.0, point.directory) for point in self.points]
        return (
            Panel("KL to the original, held-out text (nats per token)", kl, tried),
            Panel("Loss, held-out text (nats per token)", loss, base=self.original_loss),
        )

    def picture(self) -> str:
        """The same as an SVG document."""
        return draw(
            f"{self.model}: quality against the bytes that the budget covers",
            *self.panels(),
            notes=(
                "Bars: one standard error. Grey: other candidates of the search, on calibration text kept out of it.",
                "Dashed: the original.",
            ),
        )
