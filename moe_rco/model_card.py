"""The model card of an output: the README.md that the Hub shows, made from report and recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from moe_rco import marked_yaml
from moe_rco.recipe import Recipe
from moe_rco.report import Report, TaskScore
from moe_rco.units import format_size

TAGS = ["moe_rco", "mixture-of-experts", "expert-pruning", "mixed-precision", "vllm"]


def model_card(report: Report, recipe: Recipe, repo: str) -> str:
    """Markdown with the Hub's metadata, for the repository `repo`. It names no path of this machine."""
    return f"---\n{_metadata(report, repo)}\n---\n\n" + "\n".join(_body(report, recipe, repo)) + "\n"


def is_own_path(text: str) -> bool:
    """Whether a text of a recipe or a report is a path that says something of the machine it is from."""
    return text.startswith(("/", "~"))


def _metadata(report: Report, repo: str) -> str:
    scores = [
        EvalResult(
            task_type="text-generation", dataset_type=score.task, dataset_name=score.task,
            metric_type=score.metric, metric_name=_metric(score), metric_value=score.score,
        )
        for score in report.scores
    ]  # fmt: skip
    return ModelCardData(
        base_model=report.model if report.from_hub else None,
        base_model_relation="quantized" if report.from_hub else None,
        model_name=_name(repo),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=scores or None,
    ).to_yaml()


def _body(report: Report, recipe: Recipe, repo: str) -> Iterator[str]:
    yield f"# {_name(repo)}\n"
    yield from _summary(report)
    if report.scores:
        yield from _scores(report.scores)
    yield from _usage(report, repo)
    yield from _origin(report, recipe)


def _summary(report: Report) -> Iterator[str]:
    sizes, (before, after) = report.bytes, report.losses
    base = (
        f"[{report.model}](https://huggingface.co/{report.model})"
        if report.from_hub
        else f"A model of the family `{report.family}`"
    )
    others = report.covers.removeprefix("routed experts").removeprefix(", ")
    and_others = f", and at how many bits {others}," if others else ","
    yield (
        f"{base}, compressed by moe_rco: for all routed experts together it was decided which to prune and at how many bits to "
        f"keep each of the others{and_others} so that they take at most {format_size(sizes.budget)} ({report.budget.text})."
    )
    if report.stock:
        yield f"Every layer keeps {report.stock.experts_per_layer} experts at one precision, renumbered; the routers fit them.\n"
    else:
        yield "All other weights are the original's, bit by bit.\n"
    whole = "" if report.stock else format_size(sizes.experts_before + sizes.other)
    error = "" if report.kl_stderr is None else f" ± {report.kl_stderr:.5f}"
    yield "| | original | this model |\n|:--|--:|--:|"
    yield f"| {report.covers} | {format_size(sizes.experts_before)} | {format_size(sizes.experts_after)} |"
    yield f"| all weights | {whole} | {format_size(sizes.total)} |"
    yield f"| loss, nats per token | {before:.4f} | {after:.4f} |"
    yield f"| KL divergence from the original, nats per token | | {report.kl:.5f}{error} |\n"
    tokens = sum(part.tokens for part in report.domains)
    yield f"Loss and KL divergence are those of {tokens:,} tokens of text that the choice was not made on.\n"
    counts = ", ".join(f"{count:,} {name}" for name, count in report.counts.items() if count)
    yield (
        f"The experts' options: {counts}. `report.html` shows every expert's, and what else was measured; `plan.json` and "
        "`report.json` say the same to programs.\n"
    )


def _scores(scores: tuple[TaskScore, ...]) -> Iterator[str]:
    yield "## Scores\n"
    yield "By lm-eval, both models on the same items; ± is the standard error, p is two-sided.\n"
    yield "| task | metric | items | original | this model | difference | p |\n|:--|:--|--:|--:|--:|--:|--:|"
    for score in scores:
        base, p = ("", ""), ""
        if score.baseline is not None:
            found = score.baseline
            base = (
                _figure(found.score, found.stderr),
                _figure(found.difference, found.difference_stderr, "+"),
            )
            p = "" if found.p is None else "<.001" if found.p < 0.001 else f"{found.p:.3f}"
        cells = [score.task, _metric(score), f"{score.items:,}", base[0], _figure(score.score, score.stderr)]
        yield f"| {' | '.join([*cells, base[1], p])} |"
    yield ""


def _usage(report: Report, repo: str) -> Iterator[str]:
    yield "## Use it\n"
    by_itself = report.stock is not None
    if not by_itself:
        yield "vLLM and transformers read it once the package moe_rco is installed beside them.\n"
    options = f" {report.budget.room.serve}" if report.budget.room else ""
    yield f"```bash\nvllm serve {repo}{options}\n```\n"
    if report.stock is None or report.stock.transformers_reads:
        taught = "" if by_itself else "import moe_rco  # transformers knows the format from here on\n"
        yield (
            f"```python\n{taught}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repo}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n```\n'
        )


def _origin(report: Report, recipe: Recipe) -> Iterator[str]:
    yield "## How it was made\n"
    packages = ", ".join(f"{name} {version}" for name, version in report.software.packages.items())
    yield f"moe_rco {report.version}, Python {report.software.python}, {packages}. The recipe, but for defaults and paths:\n"
    asked = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output"})
    yield f"```yaml\n{marked_yaml.dump(_without_paths(asked)).strip()}\n```\n"
    yield (
        "`manifest.json` has the SHA-256 of every file and tensor, and `moe-rco verify` compares a copy with it. Its own is "
        f"`{report.manifest}`, that of the original model `{report.model_digest}`."
    )
    if report.warnings:
        yield "\nWarnings of the run:\n"
        yield from (f"- {warning}" for warning in report.warnings)


def _without_paths(value: Any) -> Any:
    """Of a path only the last part is left."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and is_own_path(value) else value


def _name(repo: str) -> str:
    return repo.rpartition("/")[2]


def _metric(score: TaskScore) -> str:
    shots = "" if score.num_fewshot is None else f"{score.num_fewshot}-shot"
    more = ", ".join(part for part in ("" if score.filter == "none" else score.filter, shots) if part)
    return f"{score.metric} ({more})" if more else score.metric


def _figure(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
