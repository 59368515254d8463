"""The layering: imports only go down, heavy libraries stay where they belong, only the console prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moe_rco

PACKAGE = Path(__file__).resolve().parent.parent / "moe_rco"

# Lowest first. A room may import itself and what stands before it.
ROOMS = (
    "_version",
    "demo",
    "errors",
    "types",
    "units",
    "files",
    "explain",
    "marked_yaml",
    "budget",
    "recipe_overrides",
    "recipe_errors",
    "recipe_sections",
    "recipe",
    "plan",
    "adapters",
    "quant",
    "ckpt",
    "optim",
    "calib",
    "baselines",
    "serve",
    "report",
    "heatmap",
    "chart",
    "curve",
    "page",
    "model_card",
    "tracking",
    "progress",
    "scoring",
    "capacity",
    "job",
    "reload",
    "footprint",
    "trial",
    "forecast",
    "checks",
    "clock",
    "reporting",
    "pipeline",
    "inspection",
    "integrity",
    "publishing",
    "serving",
    "comparison",
    "template",
    "console",
    "stopping",
    "witness",
    "cli_options",
    "cli",
)
# Its solver takes costs and a loss: it must not come to know what a model, a recipe or a file is.
OPTIM_MAY_IMPORT = {"optim", "errors", "types"}
SCREEN = {"console", "cli_options", "cli"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, path: Path) -> list[tuple[str, int]]:
    """Every imported dotted name with its line, those inside functions and `if TYPE_CHECKING` included."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(PACKAGE.parent).parent.parts
                above = package[: len(package) - node.level + 1]
                module = ".".join((*above, module) if module else above)
            # `from moe_rco import console` imports a room; `from moe_rco.types import X` a name in one.
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def rooms_imported(tree: ast.AST, path: Path) -> list[tuple[str, int]]:
    return [(name.split(".")[1], line) for name, line in imports(tree, path) if name.startswith("moe_rco.")]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    assert room in ROOMS, f"{path} is in no room; give it a place in ROOMS"
    wrong = [
        f"line {line}: {room} imports {other}"
        for other, line in rooms_imported(parsed(path), path)
        # A name the package itself offers (`from moe_rco import Recipe`) comes from its top and is not down.
        if other not in ROOMS or ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) == "optim"], ids=lambda p: p.name)
def test_optim_knows_no_models(path: Path) -> None:
    tree = parsed(path)
    assert {room for room, _ in rooms_imported(tree, path)} <= OPTIM_MAY_IMPORT
    assert not [name for name, _ in imports(tree, path) if name.split(".")[0] in ("transformers", "datasets")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_screen_prints(path: Path) -> None:
    if room_of(path) in SCREEN:
        return
    tree = parsed(path)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    printed = [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("print", "pprint")
    ]
    assert not printed, f"prints on lines {printed}"
    screen = [
        (name, line) for name, line in imports(tree, path) if name.split(".")[0] in ("click", "rich", "tqdm")
    ]
    assert not screen, screen


def test_the_checks_see_imports_inside_functions() -> None:
    code = "def f():\n    from moe_rco import pipeline\n    from . import types\n    import moe_rco.cli\n"
    path = PACKAGE / "recipe.py"
    assert rooms_imported(ast.parse(code), path) == [("pipeline", 2), ("types", 3), ("cli", 4)]
    nested = ast.parse("from ..errors import UserError\nfrom . import grid\n")
    assert rooms_imported(nested, PACKAGE / "quant" / "rtn.py") == [("errors", 1), ("quant", 2)]


def test_no_public_name_is_a_module_s_too() -> None:
    """Importing that module, as another public name may, would put it in the name's place."""
    modules = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert not modules & set(moe_rco.__all__)
