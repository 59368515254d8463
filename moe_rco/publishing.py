"""`moe-rco push`: a finished output as a model on the Hugging Face Hub, with a model card made from its report.

The Hub's client finds token (`hf auth login`, `HF_TOKEN`) and address (`HF_ENDPOINT`) by itself: neither is seen here.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, RepoUrl
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from moe_rco import integrity, recipe
from moe_rco.ckpt.destination import CURVE
from moe_rco.ckpt.manifest import NOT_LISTED, Manifest
from moe_rco.ckpt.rewrite import RECIPE
from moe_rco.errors import HubError, OutputError, PlanError
from moe_rco.model_card import is_own_path, model_card
from moe_rco.report import FILE_NAME as REPORT
from moe_rco.report import Report
from moe_rco.types import Progress

CARD = "README.md"
_REFUSED = {
    401: "does not accept the token",
    403: "does not let this token write there",
    404: "knows no such name, or does not show it to this token",
}


@dataclass(frozen=True)
class Publication:
    """A checked output: `files` are the names of what is to be published, `card` becomes README.md.

    `paths` are those of this machine that the recipe and the report name; they are published with them.
    """

    directory: Path
    files: tuple[str, ...]
    card: bytes
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """What is in a repository now: how many files, their bytes together, and in which commit."""

    url: str
    commit: str
    files: int
    bytes: int


def check_account(repo: str) -> None:
    """Ask the Hub who we are. Raises HubError where a name is none, nobody is logged in, or the Hub does not answer."""
    with _told(repo):
        validate_repo_id(repo)
        HfApi().whoami()


def make_repository(repo: str, private: bool, again: str = "") -> RepoUrl:
    """Make a repository if there is none; whose it is and whether it is private is then decided.

    Raises HubError, also where there is one that must not be written to; `again` is then added to what it says.
    """
    with _told(repo, again):
        api = HfApi()
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        api.auth_check(url.repo_id, write=True)
    return url


def card_of(directory: str | Path, repo: str) -> str:
    """The model card of a finished output, for a repository. Raises OutputError, PlanError, RecipeError."""
    directory = _finished(directory)
    return model_card(Report.load(directory), recipe.load(directory / RECIPE), repo)


def collect(directory: str | Path, repo: str, progress: Progress) -> Publication:
    """Check every byte of a finished output, and say what of it is to be published.

    That is what the manifest lists, and manifest, report, its page and the recipe: as they are, so that `moe-rco verify`
    finds them right on the other side, too. A README.md in the directory takes the place of the card that is made from the
    report. lm-eval's own output stays here. Raises PlanError where something is not what was written, OutputError.
    """
    card = card_of(directory, repo)
    directory = Path(directory)
    (found,) = integrity.verify(directory, progress=progress, run=False)
    for check in found.checks:
        if not check.passed:
            raise PlanError(
                f"{directory} is not what was written ({check.differences[0]}), so it is not published; "
                f"`moe-rco verify {directory}` says everything that differs"
            )
    names = (*Manifest.load(directory).files, *NOT_LISTED)
    own = directory / CARD
    told = (
        Report.load(directory).model_dump(mode="json"),
        recipe.load(directory / RECIPE).model_dump(mode="json"),
    )
    return Publication(
        directory,
        tuple(name for name in names if (directory / name).is_file()),
        own.read_bytes() if own.is_file() else card.encode(),
        tuple(sorted({text for text in _texts(told) if is_own_path(text)})),
    )


def publish(what: Publication, repo: str, *, private: bool = False, revision: str | None = None) -> Published:
    """Put an output into a repository, made where there is none, as one commit to a branch.

    What is there already is not sent again. Raises HubError, which says how to go on.
    """
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(what.directory / name))
        for name in what.files
    ]
    additions.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=what.card))
    if not sys.stderr.isatty():
        disable_progress_bars()
    again = f"; `{command(what.directory, repo, private, revision)}` goes on"
    url = make_repository(repo, private, again)
    with _told(repo, again):
        api = HfApi()
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            url.repo_id, additions, commit_message="Model, plan and report by moe_rco", revision=revision
        )
    return Published(
        str(url), commit.oid, len(additions), sum(addition.upload_info.size for addition in additions)
    )


def command(directory: Path | str, repo: str, private: bool, revision: str | None = None) -> str:
    """What to type to publish an output."""
    words = ["moe-rco", "push", str(directory), repo, *(["--private"] if private else [])]
    return shlex.join([*words, *([] if revision is None else ["--revision", revision])])


def _finished(directory: str | Path) -> Path:
    """The directory, if it holds one finished model. Raises OutputError."""
    directory = Path(directory)
    if (directory / CURVE).is_file():
        raise OutputError(
            f"{directory} holds a model for each of several budgets; name the directory of one of them, in it"
        )
    if not all((directory / name).is_file() for name in (REPORT, RECIPE)):
        raise OutputError(
            f"{directory} holds no finished output of moe-rco prune; `moe-rco status {directory}` tells how far it is"
        )
    return directory


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


@contextmanager
def _told(repo: str, again: str = "") -> Iterator[None]:
    """Turn what the Hub and its client refuse into HubError, with what to do; refusals of this system's pass."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"'{repo}' is no name of a repository, such as you/your-model: {_line(error)}"
        ) from error
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"{repo}: nobody is logged in to the Hub here; say `hf auth login`, or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{repo}: HF_HUB_OFFLINE forbids to ask the Hub; unset it{again}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        # The client wraps what an upload fails with in a RuntimeError; answers that make no sense to it are the last two.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        raise HubError(f"{repo}: {_reason(cause)}{again}") from error


def _reason(cause: BaseException) -> str:
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        said = cause.server_message or _line(cause)
        return f"the Hub {_REFUSED.get(status, 'refuses')} ({status}: {' '.join(said.split())})"
    if isinstance(cause, httpx2.TransportError):
        return f"{HfApi().endpoint} cannot be reached ({_line(cause)})"
    if isinstance(cause, KeyError | JSONDecodeError):
        return f"{HfApi().endpoint} does not answer as the Hub does"
    return f"publishing failed ({' '.join(str(cause).split()) or type(cause).__name__})"


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
