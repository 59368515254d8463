"""What every command of `moe-rco` takes: --debug, --json, --quiet and --verbose, and what they do to what is printed."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import click
from click.shell_completion import CompletionItem

from moe_rco._version import __version__
from moe_rco.types import Progress, Silent

LIBRARIES_BARS = "TQDM_DISABLE"
"""Where it is set, libraries that load, download or score draw no bars."""
_QUIET = "moe_rco.quiet"
_LOG = logging.getLogger("moe_rco")

json_option = click.option("--json", "as_json", is_flag=True, help="Print the same as JSON.")


def say(line: str) -> None:
    """A line on standard error."""
    try:
        click.echo(line, err=True)
    except OSError:
        # A log on the disk that is full. What waits in the stream must not fail again, and change the exit code.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def note(line: str) -> None:
    """A line on standard error, unless --quiet was said."""
    if not quiet():
        say(line)


def quiet() -> bool:
    """Whether the command that runs was told to be."""
    return bool(click.get_current_context().meta.get(_QUIET))


def hush() -> None:
    """Be quiet from here on: another process tells."""
    click.get_current_context().meta[_QUIET] = True
    _LOG.setLevel(logging.WARNING)


def bars() -> Progress:
    """Bars or lines, unless --quiet was said."""
    from moe_rco.console import RichProgress

    return Silent() if quiet() else RichProgress()


def show(shown: Callable[[Any], None], value: Any, as_json: bool) -> None:
    """A command's result: as JSON, or else by `shown` unless --quiet was said."""
    if as_json:
        print_json(value)
    elif not quiet():
        shown(value)


def print_json(value: Any) -> None:
    """A dataclass, a model of pydantic's, or what is made of them."""
    from pydantic import TypeAdapter

    click.echo(TypeAdapter(Any).dump_json(value, indent=2).decode())


def habits(letters: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator of a command's function: it takes --debug, --quiet and --verbose, also as -q and -v if `letters`."""

    def decorated(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option(
            *(["-q"] if letters else []),
            "--quiet",
            is_flag=True,
            help="Print errors only, and what --json asks for; the exit code tells the rest.",
        )
        @click.option(
            *(["-v"] if letters else []),
            "--verbose",
            is_flag=True,
            help="Also tell what is found, reused, tried and written, a line each.",
        )
        @click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_debug,
            help="Show the traceback of an internal error.",
        )
        @wraps(command)
        def run(*arguments: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
            if quiet and verbose:
                raise click.UsageError("--quiet and --verbose contradict each other; leave one out")
            with _quietly() if quiet else _verbosely() if verbose else nullcontext():
                return command(*arguments, **options)

        return run

    return decorated


@contextmanager
def _quietly() -> Iterator[None]:
    click.get_current_context().meta[_QUIET] = True
    before = os.environ.get(LIBRARIES_BARS)
    os.environ[LIBRARIES_BARS] = "1"
    try:
        yield
    finally:
        os.environ.pop(LIBRARIES_BARS)
        if before is not None:
            os.environ[LIBRARIES_BARS] = before


@contextmanager
def _verbosely() -> Iterator[None]:
    lines, level = _Lines(), _LOG.level
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    _LOG.addHandler(lines)
    _LOG.setLevel(logging.INFO)
    try:
        _LOG.info("moe-rco %s, Python %s, %s", __version__, platform.python_version(), platform.platform())
        yield
    finally:
        _LOG.removeHandler(lines)
        _LOG.setLevel(level)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def recipes(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """For the shell's completion: names of shipped recipes, and files."""
    from moe_rco.recipe import shipped

    # In this order: where bash is told of files it forgets what it was told before.
    return [CompletionItem(begun, type="file"), *_beginning(shipped(), begun)]


def directories(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """For the shell's completion."""
    return [CompletionItem(begun, type="dir")]


def one_of(*words: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """For the shell's completion: some words, which need not be all there are."""
    return lambda ctx, parameter, begun: _beginning(words, begun)


def _beginning(words: Iterable[str], begun: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(begun)]


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        sys.excepthook = sys.__excepthook__
