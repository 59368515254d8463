"""What every command of `moe-rco` takes: --debug, --json, --quiet and --verbose, and what they do to what is printed."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from moe_rco._version import __version__
from moe_rco.types import Progress, Silent

Command = TypeVar("Command", bound=Callable[..., Any])
LIBRARIES_BARS = "TQDM_DISABLE"
"""Where it is set, libraries that load, download or score draw no bars."""
_QUIET, _VERBOSE = "moe_rco.quiet", "moe_rco.verbose"
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


def habits(quiet: str = "-q", verbose: str = "-v") -> Callable[[Command], Command]:
    """A decorator: --quiet, --verbose and --debug, the first two by these short names, too; by none where these are empty."""
    options = (
        click.option(
            *filter(None, (quiet, "--quiet")), is_flag=True, expose_value=False, callback=_be_quiet,
            help="Print errors only, and what --json asks for; the exit code tells the rest.",
        ),
        click.option(
            *filter(None, (verbose, "--verbose")), is_flag=True, expose_value=False, callback=_be_verbose,
            help="Also tell what is found, reused, tried and written, a line each.",
        ),
        click.option(
            "--debug", is_flag=True, expose_value=False, callback=_debug,
            help="Show the traceback of an internal error.",
        ),
    )  # fmt: skip

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def _be_quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    _once(ctx, _QUIET, value)
    if value and LIBRARIES_BARS not in os.environ:
        os.environ[LIBRARIES_BARS] = "1"
        ctx.call_on_close(lambda: os.environ.pop(LIBRARIES_BARS, None))


def _be_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    _once(ctx, _VERBOSE, value)
    if not value:
        return
    lines, level = _Lines(), _LOG.level
    lines.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    _LOG.addHandler(lines)
    _LOG.setLevel(logging.INFO)

    def end() -> None:
        _LOG.removeHandler(lines)
        _LOG.setLevel(level)

    ctx.call_on_close(end)
    _LOG.info("moe-rco %s, Python %s, %s", __version__, platform.python_version(), platform.platform())


def _once(ctx: click.Context, name: str, value: bool) -> None:
    ctx.meta[name] = value
    if ctx.meta.get(_QUIET) and ctx.meta.get(_VERBOSE):
        raise click.UsageError("--quiet and --verbose contradict each other; leave one out", ctx)


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        sys.excepthook = sys.__excepthook__
