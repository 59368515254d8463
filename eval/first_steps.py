"""The README's first steps on a machine that has nothing of ours: each command, timed, in a clone with an empty home.

    python3 -m eval.first_steps
    python3 -m eval.first_steps --output out/first_steps.md

Needs nothing but Python, git and make, as the README says; caches of pip, vLLM and the like are not used. Where a Chromium
is installed, the page of the run is opened in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.browser import find_browser, loaded
from tests.documents import ROOT, blocks, commands

HEALTH = "http://localhost:8000/health"
PATIENCE = 1800
PAGE = Path("out", "demo", "report.html")


@dataclass(frozen=True)
class Step:
    """A command with the seconds it took (a server's until it answered) and what it printed."""

    command: str
    seconds: float
    printed: str


def first_steps(readme: str) -> list[str]:
    """The commands of the README's first two blocks but `make test`."""
    first, second, *_ = blocks(readme, "bash")
    return [line for line in commands(f"```bash\n{first}```\n```bash\n{second}```") if line != "make test"]


def walk(steps: Iterable[str], place: Path, environment: dict[str, str], health: str = HEALTH) -> list[Step]:
    """Run the commands in `place`, a server until somebody has asked it. Raises CalledProcessError, TimeoutError."""
    taken, server = list[Step](), None
    try:
        for command in steps:
            print(f"$ {command}", flush=True)
            start, printed = time.monotonic(), ""
            if command.startswith("source "):  # bin/activate, for the commands after it
                scripts = place / Path(shlex.split(command)[1]).parent
                environment = {**environment, "PATH": f"{scripts}{os.pathsep}{environment['PATH']}"}
                continue
            words = ["bash", "-c", command if " serve " not in command else f"exec {command}"]
            if " serve " in command:
                server = subprocess.Popen(words, cwd=place, env=environment)
                _wait(server, health)
            else:
                done = subprocess.run(
                    words, cwd=place, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                printed = done.stdout
                print(printed, flush=True)
            taken.append(Step(command, time.monotonic() - start, printed))
            if command.startswith("curl ") and server is not None:
                server.terminate()
                server.wait(PATIENCE)
                server = None
    finally:
        if server is not None:
            server.terminate()
            server.wait(PATIENCE)
    return taken


def _wait(server: subprocess.Popen[bytes], health: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise subprocess.CalledProcessError(server.returncode, server.args)
        with suppress(OSError), urllib.request.urlopen(health, timeout=10):
            return
        time.sleep(0.5)
    raise TimeoutError(f"no answer from {health} in {PATIENCE} s")


def minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


def render(steps: list[Step], installing: float, opened: float | None, command: str) -> str:
    """The table in Markdown; `installing` is the part of the first step before the run began."""
    count = len(os.sched_getaffinity(0))
    cores = "one core" if count == 1 else f"{count} cores"
    rows = [
        (f"`{steps[0].command}`: installs the package", installing),
        (f"`{steps[0].command}`: compresses the demo", steps[0].seconds - installing),
    ]
    if opened is not None:
        rows.append((f"`{PAGE}` in a browser", opened))
    rows += [(f"`{step.command.split(' -H ')[0]}`", step.seconds) for step in steps[1:]]
    (answer,) = (json.loads(step.printed) for step in steps if step.command.startswith("curl "))
    return "\n".join(
        [
            "# First steps", "",
            f"Made by `{command}` on {cores} without a GPU: the README's first commands in a new clone, with empty caches.",
            "", "| step | time |", "|:--|--:|",
            *(f"| {name} | {minutes(seconds)} |" for name, seconds in rows),
            f"| all | {minutes(sum(seconds for _, seconds in rows))} |",
            "", f"The server answered: `{answer['choices'][0]['text'].strip()}`",
            "", "The scores:", "", "```text", steps[-1].printed.rstrip(), "```", "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("eval/results/first_steps.md"))
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="moe-rco-") as directory:
        clone, home = Path(directory) / "clone", Path(directory) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        kept = {
            name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")
        }
        environment = {**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
        begun = time.time()
        steps = walk(first_steps((clone / "README.md").read_text(encoding="utf-8")), clone, environment)
        installing = (clone / ".venv" / ".installed").stat().st_mtime - begun
        opened = None
        if browser := find_browser():
            start = time.monotonic()
            document, said = loaded(browser, clone / PAGE, home)
            if said or "demo" not in document:
                sys.exit(f"the page says: {said}")
            opened = time.monotonic() - start
    command = shlex.join(["python3", "-m", "eval.first_steps", *sys.argv[1:]])
    arguments.output.write_text(render(steps, installing, opened, command), encoding="utf-8")


if __name__ == "__main__":
    main()
