"""`--set a.b=value`: changes to a recipe before it is checked."""

from __future__ import annotations

from collections.abc import Sequence

from moe_rco.budget import FORMS
from moe_rco.errors import RecipeError
from moe_rco.marked_yaml import Document, Path, parse_value


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Set keys in the document's data; messages about them will name the override. Raises RecipeError."""
    set_here: set[Path] = set()
    for text in overrides:
        source = f"--set {text}"
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise RecipeError(f"{source}: write key=value, as in --set search.steps=100")
        form = path[1] if path[0] == "budget" and path[1:2] and path[1] in FORMS else None
        if form and not isinstance(document.data.get("budget"), dict):
            document.data.update(budget=None)  # a list, or a short form such as 35%, is replaced as a whole
        section = document.data
        for depth, part in enumerate(path[:-1], start=1):
            if section.get(part) is None:
                section[part] = {}
                document.marks.setdefault(path[:depth], source)
            section = section[part]
            if not isinstance(section, dict):
                above = ".".join(path[:depth])
                raise RecipeError(f"{source}: {above} has no keys of its own; set it as a whole")
        if form:
            # Another form than the file's is a change of mind; two on the command line are a contradiction.
            for other in (name for name in FORMS if name != form):
                if any(earlier[:2] == ("budget", other) for earlier in set_here):
                    raise RecipeError(
                        f"{source}: budget: two budget forms, '{other}' and '{form}'; keep one of them"
                    )
                document.data["budget"].pop(other, None)
        section[path[-1]] = parse_value(value, source)
        set_here.add(path)
        for inside in [mark for mark in document.marks if mark[: len(path)] == path]:
            del document.marks[inside]
        document.marks[path] = source
