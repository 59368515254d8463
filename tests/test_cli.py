"""The command line as a user meets it: help, exit codes, one-line errors."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

from moe_rco import _version, cli, recipe
from moe_rco.errors import ModelError
from moe_rco.recipe import DEMO_MODEL
from moe_rco.report import Report
from moe_rco.scoring.settings import BACKENDS, SUITES
from tests.conftest import MINIMAL
from tests.reports import report
from tests.tiny_models import save_tiny

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = sorted(cli.app.commands)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from moe_rco.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def assert_refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert part in result.stderr


def test_the_commands() -> None:
    assert COMMANDS == [
        "compare",
        "eval",
        "init",
        "inspect",
        "prune",
        "push",
        "serve",
        "status",
        "validate",
        "verify",
    ]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_shows_an_example_that_parses(command: str) -> None:
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    examples = [line.split() for line in result.output.split("Examples:")[1].splitlines() if line.strip()]
    assert examples
    for words in examples:
        assert words[:1] == ["moe-rco"]
        if words[-1] == "--help":
            continue
        # Parsing alone: options that do not exist or lack a value raise here.
        cli.app.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str) -> None:
    for parameter in cli.app.commands[command].params:
        assert not isinstance(parameter, click.Option) or parameter.help


def test_version_stands_in_one_place() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output == f"moe-rco, version {_version.__version__}\n"


def test_validate(recipe_file: Path) -> None:
    result = run("validate", recipe_file)
    assert result.exit_code == 0
    assert result.output == (
        f"{recipe_file}: valid. demo, options prune, int4-g64, int8-g64, bf16, budget ratio 0.25.\n"
    )
    assert "budget 12.00 MiB" in run("validate", "demo", "--set", "budget.bytes=12MiB").output
    assert "budgets ratio 0.5, 2.00 MiB" in run("validate", "demo", "--set", "budget=[50%, 2MiB]").output


@pytest.mark.parametrize("name", sorted(recipe.shipped()))
def test_shipped_recipes_validate_by_name(name: str) -> None:
    assert run("validate", name).exit_code == 0


@pytest.mark.parametrize("command", [["validate"], ["prune", "--recipe"]])
@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("output:", "outptu:", [":7: outptu: unknown key; did you mean 'output'?"]),
        ("ratio: 0.25", "ratio: 0.25, bytes: 1MiB", [":4: budget: two budget forms, 'bytes' and 'ratio'"]),
        ("ratio: 0.25", "ratio: lots", [":4: budget.ratio: must be a valid number, not 'lots'"]),
        ("ratio: 0.25", "ratio: -1", [":4: budget.ratio: must be greater than 0, not -1"]),
        ("int4-g64", "int2-g64", [":3: options: int2-g64", "experimental: true"]),
        ("  data: demo", "  data: [", ["not valid YAML"]),
        ("model: demo", 'model: "a\\nb"\nbad: 1', [":3: bad: unknown key"]),
    ],
)
def test_bad_recipes(recipe_file: Path, command: list[str], old: str, new: str, parts: list[str]) -> None:
    recipe_file.write_text(MINIMAL.replace(old, new))
    assert_refused(run(*command, recipe_file), str(recipe_file), *parts)


def test_no_such_recipe() -> None:
    assert_refused(run("prune", "--recipe", "qwen-mo.yaml"), "no such recipe file; did you mean 'qwen-moe'?")


def test_bad_override(recipe_file: Path) -> None:
    result = run("prune", "--recipe", recipe_file, "--set", "search.stpes=3")
    assert_refused(result, "--set search.stpes=3: search.stpes: unknown key; did you mean 'steps'?")


def test_a_message_with_line_breaks_stays_one_line(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModelError("first\n  second\r\nthird\n")

    monkeypatch.setattr(recipe, "load", fail)
    result = run("validate", recipe_file)
    assert result.exit_code == 2
    assert result.stderr == "error: first second third\n"


@pytest.mark.parametrize(
    "arguments", [["prune"], ["prune", "--recipe"], ["nonsense"], ["validate"], ["prune", "--x"]]
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error:" in result.stderr


def test_prune_passes_on_what_was_asked(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object, bool]] = []
    shown: list[str] = []
    fake = SimpleNamespace(
        preflight=lambda loaded, *, progress, overwrite: (
            calls.append(("preflight", loaded, overwrite)) or "preflight"
        ),
        prune_all=lambda loaded, *, progress, overwrite, told, callbacks: (
            told("forecast") or calls.append(("prune", loaded, overwrite)) or ("report",)
        ),
    )
    monkeypatch.setitem(sys.modules, "moe_rco.pipeline", fake)
    monkeypatch.setattr("moe_rco.pipeline", fake, raising=False)
    monkeypatch.setattr("moe_rco.console.show_preflight", shown.append)
    monkeypatch.setattr("moe_rco.console.show_forecast", shown.append)
    monkeypatch.setattr("moe_rco.console.show_summary", shown.append)

    dry = run("prune", "--recipe", recipe_file, "--output", "35", "--set", "search.steps=7", "--dry-run")
    assert dry.exit_code == 0, dry.output
    wet = run("prune", "--recipe", recipe_file, "--overwrite")
    assert wet.exit_code == 0, wet.output

    expected = recipe.load(recipe_file, ["output='35'", "search.steps=7"])
    assert expected.output == "35"
    assert calls == [("preflight", expected, False), ("prune", recipe.load(recipe_file), True)]
    assert shown == ["preflight", "forecast", "report"]


def test_inspect_and_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen3_moe", "tiny")
    result = run("inspect", "tiny")
    assert result.exit_code == 0, result.output
    assert "qwen3_moe, 2 MoE layers x 8 experts (64 x 64), 2 used per token" in result.stdout
    assert "16.00 bits per original weight" in result.stdout

    printed = run("init", "tiny")
    assert printed.exit_code == 0, printed.output
    written = run("init", "tiny", "-o", "mine.yaml")
    assert written.exit_code == 0, written.output
    assert Path("mine.yaml").read_text() == printed.stdout
    assert run("validate", "mine.yaml").exit_code == 0
    assert_refused(run("init", "tiny", "-o", "mine.yaml"), "mine.yaml exists")
    assert_refused(run("init", "tiny", "-o", "no/such/place.yaml"), "cannot be written")
    assert_refused(run("inspect", "nowhere"), "no model directory nowhere")
    assert_refused(run("init", "nowhere"), "no model directory nowhere")


def test_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run("status", "out")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == f"{tmp_path / 'out'}: not started\n"
    as_json = run("status", "out", "--json")
    assert json.loads(as_json.stdout)["state"] == "not started"
    save_tiny("qwen3_moe", "out")
    assert_refused(run("status", "out"), "neither what moe-rco prune wrote nor where it works")


# Real processes: exit codes and hooks that live outside click.


def test_process_user_error(tmp_path: Path) -> None:
    result = run_process("validate", str(tmp_path / "missing.yaml"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


def test_answers_without_loading_torch(recipe_file: Path) -> None:
    code = (
        "import sys; from moe_rco.cli import app; app({!r}, standalone_mode=False); "
        "print(sorted({{'torch', 'transformers', 'numba', 'datasets'}} & sys.modules.keys()))"
    )
    for arguments in (["prune", "--help"], ["validate", str(recipe_file)]):
        result = subprocess.run(
            [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments", [["inspect", str(DEMO_MODEL)], ["status", "nothing"], ["compare", "a", "b"]]
)
def test_looks_at_outputs_without_loading_transformers(arguments: list[str]) -> None:
    code = (
        "import sys; from moe_rco.cli import app\n"
        "try: app({!r}, standalone_mode=False)\n"
        "finally: print('transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code.format(arguments)], capture_output=True, text=True, check=False
    )
    assert result.stdout.splitlines()[-1] == "False"


FAULT = (
    "import sys, moe_rco.recipe\n"
    "def fail(*_): raise {}\n"
    "moe_rco.recipe.load = fail\n"
    "from moe_rco.cli import main\n"
    "sys.argv = ['moe-rco', *{!r}]\n"
    "main()\n"
)


def run_fault(fault: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FAULT.format(fault, list(arguments))],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("given", "read"), [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_do_not_spin_on_cores_that_others_want(
    given: dict[str, str], read: str, tmp_path: Path
) -> None:
    """As libgomp tells itself, loaded by torch."""
    command = [sys.executable, "-m", "moe_rco.cli", "prune", "--recipe", "demo", "--dry-run"]
    command += ["--output", str(tmp_path / "none")]
    environment = {**os.environ, **given, "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    assert f"GOMP_SPINCOUNT = '{read}'" in done.stderr


def test_a_fault_of_ours_asks_for_a_report() -> None:
    result = run_fault("KeyError('a\\nb')", "validate", "x")
    assert result.returncode == 1
    assert "internal error: KeyError" in result.stderr
    assert "Please report" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(how: str) -> None:
    if how == "option":
        result = run_fault("KeyError('x')", "validate", "x", "--debug")
    else:
        result = run_fault("KeyError('x')", "validate", "x", MOE_RCO_DEBUG="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_interrupt() -> None:
    result = run_fault("KeyboardInterrupt", "validate", "x")
    assert result.returncode == 130
    assert result.stderr.startswith("interrupted")


def test_a_dry_run_counts_the_text_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_rco.checks.stage_times", lambda *arguments: {})
    settings = ("--output", tmp_path / "out", "--set", "calibration.sequences=100000000")
    result = run("prune", "--recipe", "demo", "--dry-run", *settings)
    assert result.exit_code == 0
    assert "fewer than the 100000000 asked for" in result.output
    memory = next(line for line in result.output.splitlines() if line.startswith("memory"))
    assert "GiB" in memory


@pytest.mark.parametrize("command", ["compare", "eval", "inspect", "prune", "serve", "status", "verify"])
def test_what_prints_a_table_prints_json_too(command: str) -> None:
    assert "--json" in run(command, "--help").stdout


def test_inspect_and_a_dry_run_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_rco.checks.stage_times", lambda *arguments: {})
    model = save_tiny("qwen3_moe", tmp_path / "model")
    found = json.loads(run("inspect", model, "--json").stdout)
    assert (found["num_experts"], found["top_k"], found["directory"]) == (8, 2, str(model))
    assert {option for layer in found["layers"] for option in layer["options"]} == {"bf16"}
    sets = ("calibration.sequences=8", "calibration.sequence_length=64", f"output={tmp_path / 'out'}")
    dry = run(
        *("prune", "--recipe", "demo", "--dry-run", "--json", "--quiet"),
        *(part for s in sets for part in ("--set", s)),
    )
    assert dry.stderr == ""
    told = json.loads(dry.stdout)
    assert told["budgets"][0]["bytes"] * 4 == told["experts_before"]
    assert sum(part["sequences"] for part in told["text"]) == told["sequences"]


def test_a_report_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from moe_rco import pipeline

    monkeypatch.setattr(pipeline, "prune_all", lambda *arguments, **options: [report()])
    found = run("prune", "--recipe", "demo", "--json", "--output", tmp_path / "out")
    assert Report.model_validate_json(found.stdout) == report()


SHELLS = {
    "bash": r'''eval "$(_MOE_RCO_COMPLETE=bash_source moe-rco)"
        compopt() { :; }  # outside of a completion there is none
        COMP_WORDS=(moe-rco TYPED); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _moe_rco_completion moe-rco; printf '%s\n' "${COMPREPLY[@]}"''',
    "fish": '''_MOE_RCO_COMPLETE=fish_source moe-rco | source; complete -C "moe-rco TYPED"''',
    "zsh": "",  # completes in a terminal only
}


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_can_complete(shell: str, tmp_path: Path) -> None:
    script = run_process(_MOE_RCO_COMPLETE=f"{shell}_source")
    assert script.returncode == 0
    assert "_moe_rco_completion" in script.stdout
    assert f"_MOE_RCO_COMPLETE={shell}_source" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    if not SHELLS[shell] or shutil.which(shell) is None:
        return
    command = tmp_path / "moe-rco"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_rco.cli "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    def completed(words: str) -> set[str]:
        done = subprocess.run(
            [shell, "-c", SHELLS[shell].replace("TYPED", words)],
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        return {line.split("\t")[0] for line in done.stdout.splitlines()}

    assert completed("pru") == {"prune"}
    assert completed("prune --recipe mixtral-8x7b-2") == {"mixtral-8x7b-24gb"}


def completions(command: str, name: str, begun: str) -> list[tuple[str, str]]:
    parameter = next(each for each in cli.app.commands[command].params if each.name == name)
    context = cli.app.commands[command].make_context(command, [], resilient_parsing=True)
    return [(item.type, item.value) for item in parameter.shell_complete(context, begun)]


def test_what_is_completed() -> None:
    assert completions("validate", "recipe", "demo") == [("file", "demo"), ("plain", "demo")]
    assert completions("eval", "tasks", "de") == [("plain", "demo"), ("plain", "default")]
    assert {("plain", word) for word in SUITES} <= set(completions("eval", "tasks", ""))
    assert completions("eval", "backend", "") == [("plain", word) for word in BACKENDS]
    for command in ("inspect", "init", "compare", "status", "verify", "serve", "eval"):
        name = next(
            each.name for each in cli.app.commands[command].params if isinstance(each, click.Argument)
        )
        assert completions(command, name or "", "o") == [("dir", "o")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_quiet_and_verbose(command: str) -> None:
    options = {option for each in cli.app.commands[command].params for option in each.opts}
    assert {"--quiet", "--verbose", "--debug"} <= options
    # Of `vllm serve` -q is --quantization, and other letters are parts of its options.
    assert {"-q", "-v"} & options == (set() if command == "serve" else {"-q", "-v"})


def test_quiet_commands_print_errors_and_json_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("qwen3_moe", "model")
    report().save(Path("model"))
    for words in (
        ["validate", "demo"], ["inspect", "model"], ["status", "out"], ["init", "model", "-o", "my.yaml"],
        ["compare", "model"],
    ):  # fmt: skip
        done = run(*words, "-q")
        assert (done.exit_code, done.output) == (0, ""), words
    assert Path("my.yaml").is_file()
    assert Path("compare.html").is_file()
    assert json.loads(run("inspect", "model", "-q", "--json").stdout)["num_experts"] == 8
    assert_refused(run("inspect", "nowhere", "--quiet"), "no model directory nowhere")
    both = run("inspect", "model", "-q", "-v")
    assert both.exit_code == 2
    assert "--quiet and --verbose contradict each other" in both.stderr
    assert "TQDM_DISABLE" not in os.environ
    monkeypatch.setenv("TQDM_DISABLE", "0")
    run("validate", "demo", "-q")
    assert os.environ["TQDM_DISABLE"] == "0"


def test_verbose_commands_tell_who_they_are_and_stop_when_they_end() -> None:
    told = run("validate", "demo", "-v")
    assert told.exit_code == 0
    assert re.fullmatch(rf"\d\d:\d\d:\d\d moe-rco {_version.__version__}, Python 3.*\n", told.stderr)
    logging.getLogger("moe_rco.pipeline").info("nobody listens")
    assert run("validate", "demo").stderr == ""
