"""The command `moe-rco`. Parses arguments, calls the package, maps errors to exit codes.

0: done. 1: a fault of ours. 2: the input cannot be used as given, or the system refused something. 130: interrupted;
143: asked to end. Modules that load torch
are imported inside the commands, so that `--help` and `validate` answer at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from moe_rco._version import __version__
from moe_rco.cli_options import (
    LIBRARIES_BARS,
    bars,
    directories,
    habits,
    hush,
    json_option,
    note,
    one_of,
    quiet,
    recipes,
    say,
    show,
)
from moe_rco.errors import (
    FileError,
    HubError,
    MemoryShortageError,
    OutputError,
    PlanError,
    RecipeError,
    ScoringError,
    UserError,
    is_fault,
)
from moe_rco.explain import explained, unsaid
from moe_rco.stopping import LINE, Stopping
from moe_rco.witness import Witness

EXIT_INTERRUPTED = 130
_DEBUG_VARIABLE = "MOE_RCO_DEBUG"
_SPINS = "20000"
"""How often a thread without work looks for some before it sleeps. libgomp's 300,000 are milliseconds, which two busy programs
on the same cores take from each other at every barrier; these cost an idle machine 2 % at most."""
_witness = Witness()
_stopping = Stopping(_witness.over)


class _Commands(click.Group):
    """Turns errors of the user, and what the system refuses, into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say(LINE)
            ctx.exit(EXIT_INTERRUPTED)
        except BaseException as fault:
            # What was interrupted may raise something else, as an import does.
            error = fault if isinstance(fault, UserError) else explained(fault) if is_fault(fault) else None
            if error is None or _stopping.number:
                raise
            if isinstance(error, FileError | MemoryShortageError) and sys.excepthook is sys.__excepthook__:
                traceback.print_exception(fault)
            say(f"error: {_one_line(error)}")
            ctx.exit(error.exit_code)


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", str(error)).strip()


def _report_fault(kind: type[BaseException], fault: BaseException, trace: TracebackType | None) -> None:
    """Installed as sys.excepthook: whatever reaches it is our fault, and Python exits with 1 after it."""
    click.echo(
        f"internal error: {kind.__name__}: {_one_line(fault)}\n"
        "This is a bug in moe_rco. Please report it, with what --debug shows for the same command.",
        err=True,
    )


def _example(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


_set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the recipe; can be repeated.",
)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_example("moe-rco prune --recipe demo", "moe-rco prune --help"),
)
@click.version_option(__version__, prog_name="moe-rco")
def app() -> None:
    """Fit a mixture-of-experts model into a number of bytes.

    For every expert at once it is decided whether to prune it or at how many bits to keep it, so that the
    files never exceed the budget and the model's own loss is as low as it can be.
    """


@app.command(
    epilog=_example(
        "moe-rco prune --recipe demo",
        "moe-rco prune --recipe qwen-moe --set model=/models/Qwen3-30B-A3B --dry-run",
        "moe-rco prune --recipe my.yaml --set budget=20GiB --output out/20gib",
        "moe-rco prune --recipe my.yaml --set budget=[50%,35%,25%] --output out/three",
    )
)
@click.option(
    "--recipe",
    required=True,
    metavar="RECIPE",
    shell_complete=recipes,
    help="A recipe file, or the name of a shipped recipe.",
)
@click.option(
    "--output",
    metavar="DIR",
    shell_complete=directories,
    help="Where to write, instead of the recipe's output.",
)
@_set_option
@click.option("--overwrite", is_flag=True, help="Replace the output directory if it exists.")
@click.option("--dry-run", is_flag=True, help="Show sizes, memory and settings, and stop.")
@click.option(
    "--report-to",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb"]),
    help="Log the search there, too; can be repeated.",
)
@click.option("--push-to-hub", metavar="REPO", help="Publish the result on the Hub, as `moe-rco push` does.")
@click.option("--private", is_flag=True, help="Make a new repository on the Hub private.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the report as JSON; for several budgets, all by their directory.",
)
@habits()
def prune(
    recipe: str,
    output: str | None,
    overrides: tuple[str, ...],
    overwrite: bool,
    dry_run: bool,
    report_to: tuple[str, ...],
    push_to_hub: str | None,
    private: bool,
    as_json: bool,
) -> None:
    """Choose, quantise, write, reload and measure, as a recipe says."""
    from moe_rco.recipe import load

    if output is not None:
        # JSON text is YAML text in quotes: a directory named 35 stays a name.
        overrides = (*overrides, f"output={json.dumps(output, ensure_ascii=False)}")
    loaded = load(recipe, overrides)
    if private and push_to_hub is None:
        raise HubError(
            "--private says how to publish, but nothing is to be published; add --push-to-hub REPO"
        )
    if push_to_hub is not None and len(loaded.budget) > 1:
        raise RecipeError(
            "--push-to-hub publishes one model, and the recipe has several budgets; use `moe-rco push` for each"
        )

    from moe_rco import console, page, pipeline, publishing, tracking
    from moe_rco.calib.team import leads
    from moe_rco.curve import Curve
    from moe_rco.report import Preflight

    callbacks = tracking.trackers(report_to)
    if push_to_hub is not None and leads():
        publishing.check_account(push_to_hub)
    if dry_run:
        show(
            console.show_preflight, pipeline.preflight(loaded, progress=bars(), overwrite=overwrite), as_json
        )
        return
    if not leads():
        hush()

    def told(expected: Preflight) -> None:
        if not quiet():
            console.show_forecast(expected)
        if push_to_hub is not None:
            publishing.make_repository(push_to_hub, private)  # what the Hub refuses is to be known now

    reports = pipeline.prune_all(loaded, progress=bars(), overwrite=overwrite, told=told, callbacks=callbacks)
    if not leads():
        return
    if len(reports) == 1:
        show(console.show_summary, reports[0], as_json)
        if push_to_hub is not None:
            _push(loaded.output, push_to_hub, private, None)
        return
    names = [point.directory for point in Curve.load(Path(loaded.output)).points]
    named = dict(zip(names, reports, strict=True))
    written = (
        f"Written to {loaded.output}: a model and its report in each directory, the curve in curve.json and curve.svg, "
        f"and a page for your browser: {loaded.output}/{page.FILE_NAME}"
    )
    show(lambda named: console.show_comparison(named, written), named, as_json)


def _push(directory: str, repo: str, private: bool, revision: str | None) -> None:
    from moe_rco import publishing

    # After `prune` the same command would begin anew.
    _stopping.line = f"interrupted; `{publishing.command(directory, repo, private, revision)}` goes on"
    what = publishing.collect(directory, repo, bars())
    if what.paths:
        note(f"note: recipe and report are published with the paths in them: {', '.join(what.paths)}")
    _stopping.at_once()  # the client's threads would be waited for, and files are only read from here on
    done = publishing.publish(what, repo, private=private, revision=revision)
    note(f"Published {done.files} files, {done.bytes:,} bytes: {done.url} (commit {done.commit})")


@app.command(
    epilog=_example(
        "moe-rco push out/qwen3 you/Qwen3-30B-A3B-24GB --private",
        "moe-rco push out/qwen3 you/Qwen3-30B-A3B-24GB --card",
    )
)
@click.argument("directory", shell_complete=directories)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Publish to this branch, made where there is none.")
@click.option("--card", is_flag=True, help="Print the model card, and stop.")
@habits()
def push(directory: str, repo: str, private: bool, revision: str | None, card: bool) -> None:
    """Publish what `prune` wrote on the Hugging Face Hub.

    DIRECTORY holds one finished model, and REPO is a name such as you/your-model, made where there is none. Every byte is checked
    first. Recipe and report are published as they are: paths of this machine in them are named before, and are not in the
    model card. That is made from the report; a README.md in DIRECTORY takes its place.
    """
    from moe_rco import publishing

    if card:
        click.echo(publishing.card_of(directory, repo), nl=False)
        return
    publishing.check_account(repo)
    _push(directory, repo, private, revision)


@app.command(epilog=_example("moe-rco status out/demo", "moe-rco status out/demo --json"))
@click.argument("directory", shell_complete=directories)
@json_option
@habits()
def status(directory: str, as_json: bool) -> None:
    """Show how far a run of `prune` is, whether or not it is running.

    DIRECTORY is a recipe's output, finished or not, or the directory ending in .work beside it.
    """
    from moe_rco import console, progress

    show(console.show_status, progress.status(directory), as_json)


@app.command(
    epilog=_example(
        "moe-rco verify out/demo",
        "moe-rco verify out/qwen3 --original /models/Qwen3-30B-A3B",
        "moe-rco verify out/qwen3 --json",
    )
)
@click.argument("directory", shell_complete=directories)
@click.option(
    "--original",
    metavar="DIR",
    shell_complete=directories,
    help="Compare what was not to change with this model, too.",
)
@json_option
@habits()
def verify(directory: str, original: str | None, as_json: bool) -> None:
    """Check every byte of what `prune` wrote, and that it still computes what it did.

    DIRECTORY is a finished output. Exits with 2 where anything differs, and says what.
    """
    from moe_rco import integrity
    from moe_rco.console.integrity import show_verification

    found = integrity.verify(directory, original, bars())
    show(show_verification, found, as_json)
    wrong = [verification.directory for verification in found if not verification.passed]
    if wrong:
        raise PlanError(f"{', '.join(wrong)}: not what was written; copy it again, or make it again")


@app.command(
    epilog=_example(
        "moe-rco compare out/qwen3-35 out/qwen3-25",
        "moe-rco compare out/* --output all.html",
    )
)
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...", shell_complete=directories)
@click.option(
    "-o", "--output", default="compare.html", metavar="FILE", help="Write the page there.", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON; write no page.")
@habits()
def compare(directories: tuple[str, ...], output: str, as_json: bool) -> None:
    """Put several results beside each other: a table here, and a page for your browser.

    Each DIRECTORY holds what `prune` wrote, for one budget or for several.
    """
    from moe_rco import comparison, console

    reports = comparison.collect(directories)
    if not as_json:
        comparison.write(Path(output), reports)
    written = f"Written to {output}, a page for your browser."
    show(lambda reports: console.show_comparison(reports, written), reports, as_json)


@app.command(epilog=_example("moe-rco validate my.yaml", "moe-rco validate demo --set budget.ratio=0.35"))
@click.argument("recipe", shell_complete=recipes)
@_set_option
@habits()
def validate(recipe: str, overrides: tuple[str, ...]) -> None:
    """Check a recipe without touching a model."""
    from moe_rco.recipe import load

    loaded = load(recipe, overrides)
    options = ", ".join(option.name for option in loaded.options)
    budgets = ("budget " if len(loaded.budget) == 1 else "budgets ") + ", ".join(
        b.text for b in loaded.budget
    )
    show(click.echo, f"{recipe}: valid. {loaded.model}, options {options}, {budgets}.", as_json=False)


@app.command(epilog=_example("moe-rco inspect /models/Qwen3-30B-A3B", "moe-rco inspect out/demo"))
@click.argument("directory", shell_complete=directories)
@json_option
@habits()
def inspect(directory: str, as_json: bool) -> None:
    """Show layers, experts, options and bytes of a model directory.

    DIRECTORY holds an original mixture-of-experts model or what `prune` wrote.
    """
    from moe_rco import console, inspection

    show(console.show_inspect, inspection.inspect(directory), as_json)


@app.command(
    epilog=_example("moe-rco init /models/Qwen3-30B-A3B", "moe-rco init /models/Qwen3-30B-A3B -o qwen.yaml")
)
@click.argument("model_dir", shell_complete=directories)
@click.option("-o", "--output", metavar="FILE", help="Write the recipe to a new file, not to the screen.")
@habits()
def init(model_dir: str, output: str | None) -> None:
    """Write a commented recipe for the model in MODEL_DIR."""
    from moe_rco.template import recipe_for

    text = recipe_for(model_dir)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        with Path(output).open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise OutputError(f"{output} exists; choose another name or remove it") from error
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}") from error
    show(click.echo, f"wrote {output}; next: moe-rco prune --recipe {output} --dry-run", as_json=False)


@app.command(
    # Letters are left to vLLM: -q is its --quantization, and -dph would be taken apart into -d, -p and -h.
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    epilog=_example(
        "moe-rco serve out/demo",
        "moe-rco serve out/qwen3 --tensor-parallel-size 2 --max-model-len 8192 --port 8001",
        "moe-rco serve out/qwen3 --dry-run",
    ),
)
@click.argument("directory", shell_complete=directories)
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--dry-run", is_flag=True, help="Show what memory it takes, and stop.")
@json_option
@habits(letters=False)
def serve(directory: str, vllm_options: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Check a model's files and memory, then run `vllm serve` on it.

    DIRECTORY holds what `prune` wrote, or any supported model. Every option that is not ours goes to vLLM.
    """
    from moe_rco import console, serving

    plan = serving.plan_serving(directory, vllm_options)
    show(console.show_serving, plan, as_json)
    if not dry_run:
        serving.start(plan)


@app.command(
    "eval",
    epilog=_example(
        "moe-rco eval out/demo",
        "moe-rco eval out/qwen3 --backend vllm --tasks default",
        "moe-rco eval out/qwen3 --tasks hellaswag,gsm8k --limit 200 --baseline /models/Qwen3-30B-A3B",
        "moe-rco eval /models/Qwen3-30B-A3B --tasks mytask --include-path my-tasks --output scores",
    ),
)
@click.argument("directory", shell_complete=directories)
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAMES",
    shell_complete=one_of("demo", "default", "generative"),
    help="lm-eval tasks, groups or tags, separated by commas, or the suites default and generative. "
    "Without it: demo for the demo model, otherwise default.",
)
@click.option(
    "--backend",
    default="hf",
    metavar="NAME",
    shell_complete=one_of("hf", "vllm"),
    help="What runs the model: hf (the default) or vllm.",
)
@click.option(
    "--baseline",
    metavar="MODEL",
    help="Compare with this directory or Hub model; otherwise with the original.",
)
@click.option("--no-baseline", is_flag=True, help="Do not score the original.")
@click.option("--limit", type=click.IntRange(min=1), help="Score this many items of each task.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), help="Examples in the prompt; otherwise the task's."
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Items at a time; otherwise by the device.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1; for the backend hf.")
@click.option(
    "--model-arg",
    "model_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Passed to lm-eval's backend; repeatable.",
)
@click.option(
    "--include-path", "include_paths", multiple=True, metavar="DIR", help="Your own lm-eval task files."
)
@click.option("--allow-code", is_flag=True, help="Allow tasks that run code written by the model.")
@click.option("--output", metavar="DIR", help="Where lm-eval's output goes, instead of DIRECTORY/eval.")
@json_option
@habits()
def eval_(
    directory: str,
    tasks: tuple[str, ...],
    baseline: str | None,
    no_baseline: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Score a model with lm-eval, beside the original it was made from.

    DIRECTORY holds what `prune` wrote, or any model. Scores, their differences and whether these are more than chance are shown
    and, for what `prune` wrote, kept in its report.json.
    """
    from moe_rco import scoring
    from moe_rco.console.scores import show_scores

    scoring.needs_installed(options["backend"])
    if baseline is not None and no_baseline:
        raise ScoringError("--baseline and --no-baseline contradict each other; leave one out")

    output = options.pop("output")
    chosen = scoring.make_settings(
        tasks=tasks or (("demo",) if scoring.is_demo(directory) else ("default",)), **options
    )
    if chosen.model_args.get("trust_remote_code"):
        say("note: trust_remote_code is on: code that comes with the model will be run")
    outcome = scoring.evaluate(
        directory,
        chosen,
        baseline=baseline,
        compare_to_original=not no_baseline,
        output=output,
        progress=bars(),
        say=note,
    )
    show(show_scores, outcome, as_json)


def main() -> None:
    """Entry point of the installed command."""
    if not os.environ.get(_DEBUG_VARIABLE):
        sys.excepthook = _report_fault
    # The Hub client logs every retry; what failed is in our one-line error.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault(LIBRARIES_BARS, "1")
    if sys.argv[1:2] == ["prune"]:
        # libgomp reads it when torch is loaded. Threads that spin while others want their core make everything wait.
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
        _witness.begin(f"error: {unsaid()}")
    _stopping.install()
    try:
        app(prog_name="moe-rco")
    except BaseException:
        if not _stopping.number:
            raise
        _stopping.tell()
        sys.exit(_stopping.code)
    finally:
        _witness.over()


if __name__ == "__main__":
    main()
