"""The README's first steps as they are timed; what takes minutes is not run here."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from eval.first_steps import Step, first_steps, render, walk
from tests.documents import ROOT

SERVER = """
import http.server, sys
assert sys.argv[1] == "serve"
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"85")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answers).serve_forever()
"""


def test_they_are_those_of_the_readme() -> None:
    steps = first_steps((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [step.split()[0] for step in steps] == [
        "make",
        ".venv/bin/pip",
        "source",
        "moe-rco",
        "curl",
        "moe-rco",
    ]


def test_a_server_answers_and_is_ended(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "server.py").write_text(SERVER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ours").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "bin" / "ours").chmod(0o755)
    address = f"http://127.0.0.1:{port}"
    steps = [f"python3 server.py serve {port}", f"curl -s {address}", "source bin/activate", "ours"]
    taken = walk(steps, tmp_path, dict(os.environ), address)
    assert [step.printed for step in taken] == ["", "85", "found\n"]
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        pass
    with pytest.raises(subprocess.CalledProcessError):
        walk(["false"], tmp_path, dict(os.environ), address)


def test_the_table_has_every_step() -> None:
    answer = '{"choices": [{"text": " 85.\\n"}]}'
    steps = [
        Step("make demo", 100.0, ""),
        Step("curl -s here -H x", 1.0, answer),
        Step("moe-rco eval", 61.0, "a\n"),
    ]
    text = render(steps, 40.0, None, "this")
    for line in (
        "| `make demo`: compresses the demo | 1 min 00 s |",
        "| all | 2 min 42 s |",
        "answered: `85.`",
    ):
        assert line in text
