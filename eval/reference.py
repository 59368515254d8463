"""Writes what is made from the code: docs/errors.md, docs/recipe.md, and the recipe's JSON Schema for editors.

python -m eval.reference
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_rco.errors import MoeRcoError, catalogue
from moe_rco.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
ERRORS = """\
# Errors

The command line prints `error: ` and one line: what is wrong, where, and what to do. It exits with

| code | |
|--:|:--|
| 0 | done |
| 1 | a fault of ours, or a lost process of several; nothing that looks finished is left |
| 2 | the input cannot be used as given: repair it and run the same command again |
| 130 | interrupted (Ctrl-C): the same command goes on where it was |
| 143 | asked to end (SIGTERM): the same |
| 134, 137, 139, 127 | killed, as the system does where memory ends, or given up by a library: `prune` says so, and goes on |

`--debug`, or `MOE_RCO_DEBUG=1`, shows the traceback of an internal error. In Python the same errors are raised as the classes of
`moe_rco.errors`. Made by `python -m eval.reference` from [moe_rco/errors.py](../moe_rco/errors.py).

| error | exit code | cause | remedy |
|:--|--:|:--|:--|
"""


RECIPE = """\
# Recipe

A recipe is a YAML file: everything a run is told. `moe-rco init MODEL` writes one for a model with its sizes in the comments,
`moe-rco validate FILE` checks it, and `--set search.steps=100` sets a key for one run. Only `version`, `model`, `options`,
`budget`, `calibration.data` and `output` must be given.

Editors complete and check recipes by [recipe.schema.json](../recipes/recipe.schema.json) where the first line is
`# yaml-language-server: $schema=recipe.schema.json` (a path from the recipe to a copy of that file). Some rules reach over
several keys, and only `moe-rco validate` knows those. This page is made by `python -m eval.reference`.

```yaml
{example}```
"""
EXAMPLE = ROOT / "recipes" / "qwen-moe.yaml"


def errors_page() -> str:
    """The catalogue of errors in Markdown."""
    rows = [
        f"| {kind.__name__} | {kind.exit_code} | {_cause(kind)} | {kind.remedy} |" for kind in catalogue()
    ]
    return ERRORS + "\n".join(rows) + "\n"


def _cause(kind: type[MoeRcoError]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe as a user writes it."""
    found = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def recipe_page() -> str:
    """Every key of a recipe in Markdown, section by section."""
    found = schema()
    parts = [RECIPE.format(example=EXAMPLE.read_text(encoding="utf-8")), *_section("", found, found["$defs"])]
    return "\n".join(parts)


def _section(path: str, section: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    """A table of a section's keys, and then those of the sections in it."""
    yield f"## {path or 'The whole'}\n\n{section['description']}\n"
    yield "| key | | default | |\n|:--|:--|:--|:--|"
    required, inner = section.get("required", ()), list[tuple[str, dict[str, Any]]]()
    for key, value in section["properties"].items():
        forms = list(_forms(value))
        default = "**required**" if key in required else _default(value.get("default"))
        what = " ".join(value.get("description", "").split())
        yield f"| `{key}` | {', '.join(_form(form) for form in forms)} | {default} | {what} |"
        inner += [
            (f"{path}.{key}".strip("."), known[form["$ref"].rpartition("/")[2]])
            for form in forms
            if "$ref" in form
        ]
    yield ""
    for name, found in inner:
        yield from _section(name, found, known)


def _forms(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for form in value.get("anyOf", (value,)):
        if form.get("type") != "null":
            yield form


def _form(form: dict[str, Any]) -> str:
    """What a value may be, in a word or two."""
    if "$ref" in form:
        return "section"
    if form.get("type") == "array":
        return "list"
    if "const" in form or "enum" in form:
        return " ".join(f"`{choice}`" for choice in form.get("enum", (form.get("const"),)))
    limits = [
        f"{sign} {form[name]:g}"
        for name, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if name in form and form[name] < 1e9
    ]
    names = {"string": "text", "boolean": "true, false", "integer": "whole number", "number": "number"}
    return " ".join([names[form["type"]], *limits])


def _default(value: Any) -> str:
    if isinstance(value, dict) or value is None:
        return ""
    return f"`{json.dumps(value) if isinstance(value, bool) else value}`"


PAGES = {
    ROOT / "docs" / "errors.md": errors_page,
    ROOT / "docs" / "recipe.md": recipe_page,
    ROOT / "recipes" / "recipe.schema.json": lambda: json.dumps(schema(), indent=1) + "\n",
}

if __name__ == "__main__":
    for path, made in PAGES.items():
        path.write_text(made(), encoding="utf-8")
