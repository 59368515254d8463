"""A server that speaks as much of the Hugging Face Hub's HTTP interface as its client needs to publish a model and fetch it.

What it answers was read off the client (huggingface_hub 2.4), for want of the Hub: accounts, repositories, branches, upload
modes, git-lfs, commits, trees and files. Xet, the client's other way to upload, is not spoken.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

USER, TOKEN = "you", "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"
STRANGER = "somebody"
"""Whose namespace our user must not write to."""
JSON = "application/json"


class RefusedError(Exception):
    """An answer with a status that is no success."""

    def __init__(self, status: int, error: str, url: str = "", **headers: str):
        super().__init__(error)
        self.status, self.headers = status, headers
        self.body = json.dumps({"error": error, **({"url": url} if url else {})}).encode()


@dataclass
class Repository:
    """Branches, each with its commits: what is in a commit by path."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def head(self, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise RefusedError(404, "no such revision", **{"X-Error-Code": "RevisionNotFound"})
        return commit, self.commits[commit]

    def add(self, branch: str, files: dict[str, bytes]) -> str:
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        text = f"{len(self.commits)} {sorted((name, sha256(data)) for name, data in content.items())}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit], self.branches[branch] = content, commit
        return commit


@dataclass
class Hub:
    """The server's state. `refusals` are answers by what a request's method and path begin with; `held` stops uploads while
    it is set, after `arrived` was; `received` are the bytes of all uploads to large file storage, `sent` the names in a commit.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    received: int = 0
    sent: list[list[str]] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].head(branch)[1]

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise RefusedError(404, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        return self.repositories[name]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(name: str) -> bool:
    """As `.gitattributes` of a new repository has it."""
    return name.endswith(".safetensors")


def oid(name: str, data: bytes) -> str:
    """What the client compares its own file with."""
    return sha256(data) if is_large(name) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def use(url: str, cache: Path, token: str | None = TOKEN) -> None:
    """What `HF_ENDPOINT=url HF_HUB_OFFLINE=0 HF_HOME=cache HF_TOKEN=token` in front of a command does, for a process that has
    loaded the client already.
    """
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = False, True
    constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH = str(cache / "hub"), str(cache / "token")
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token


@contextmanager
def logged_in(hub: Hub, home: Path) -> Iterator[pytest.MonkeyPatch]:
    """This process is one that uses the server, with a token."""
    names = (
        *("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET"),
        *("HF_HUB_CACHE", "HF_TOKEN_PATH"),
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(constants, name, getattr(constants, name))
        patch.setenv("HF_TOKEN", TOKEN)
        use(hub.url, home)
        yield patch


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        hub, path = self.state, self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(length)
        hub.requests.append(f"{self.command} {path}")
        try:
            for begin, (status, error) in hub.refusals.items():
                if f"{self.command} {path}".startswith(begin):
                    raise RefusedError(status, error)
            self._send(200, *self._route(path, body))
        except RefusedError as refusal:
            told = {"X-Error-Message": str(refusal), **refusal.headers}
            self._send(refusal.status, refusal.body, told)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": JSON, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        kind = "GET" if self.command == "HEAD" else self.command
        for method, pattern, answer in _ROUTES:
            if method == kind and (match := re.fullmatch(pattern, path)):
                if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise RefusedError(401, "Invalid username or password.")
                found = answer(self, body, *match.groups())
                return found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
        raise RefusedError(404, f"no such page: {kind} {path}")

    def whoami(self, body: bytes) -> Any:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise RefusedError(401, "Invalid username or password.")
        return {"type": "user", "name": USER, "orgs": []}

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        owner = asked.get("organization") or USER
        if owner != USER:
            raise RefusedError(
                403, f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        name = f"{owner}/{asked['name']}"
        if name in self.state.repositories:
            raise RefusedError(409, "You already created this model repo", url=f"{self.state.url}/{name}")
        made = Repository(private=asked.get("visibility") == "private")
        made.add("main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.state.repositories[name] = made
        return {"url": f"{self.state.url}/{name}", "name": name}

    def auth_check(self, body: bytes, name: str) -> Any:
        self.state.repository(name)
        if not name.startswith(f"{USER}/"):
            raise RefusedError(403, "Forbidden: you must have write access to content of the repo")
        return {}

    def branch(self, body: bytes, name: str, branch: str) -> Any:
        repository = self.state.repository(name)
        if branch in repository.branches:
            raise RefusedError(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def validate(self, body: bytes) -> Any:
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
        data = yaml.safe_load(content.split("---\n")[1])
        if not isinstance(data, dict) or not all(isinstance(tag, str) for tag in data.get("tags", [])):
            raise RefusedError(400, "Invalid metadata")
        return {"errors": [], "warnings": []}

    def preupload(self, body: bytes, name: str, revision: str) -> Any:
        files = self.state.repository(name).head(revision)[1]
        answers = []
        for asked in json.loads(body)["files"]:
            path = asked["path"]
            mode = "lfs" if is_large(path) else "regular"
            known = {"oid": oid(path, files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def batch(self, body: bytes, name: str) -> Any:
        self.state.repository(name)
        found = []
        for asked in json.loads(body)["objects"]:
            upload = {"href": f"{self.state.url}/storage/{asked['oid']}"}
            verify = {"href": f"{self.state.url}/storage/{asked['oid']}/verify"}
            actions = {"actions": {"upload": upload, "verify": verify}}
            found.append({**asked, **({} if asked["oid"] in self.state.objects else actions)})
        return {"transfer": "basic", "objects": found}

    def upload(self, body: bytes, name: str) -> Any:
        self.state.arrived.set()
        if self.state.held.is_set():
            self.state.released.wait(60)
        if sha256(body) != name:
            raise RefusedError(400, "the content is not what its name says")
        self.state.objects[name] = body
        self.state.received += len(body)
        return {}

    def verify(self, body: bytes, name: str) -> Any:
        asked = json.loads(body)
        if len(self.state.objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(422, "object is missing, or of another size")
        return {}

    def commit(self, body: bytes, name: str, branch: str) -> Any:
        repository, files = self.state.repository(name), dict[str, bytes]()
        repository.head(branch)
        header, *operations = (json.loads(line) for line in body.splitlines())
        if header["key"] != "header" or not header["value"]["summary"]:
            raise RefusedError(400, "a commit needs a summary")
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.state.objects:
                files[value["path"]] = self.state.objects[value["oid"]]
            else:
                raise RefusedError(400, f"cannot commit {operation['key']} {value['path']}")
        made = repository.add(branch, files)
        self.state.sent.append(sorted(files))
        return {"commitUrl": f"{self.state.url}/{name}/commit/{made}", "commitOid": made, "success": True}

    def info(self, body: bytes, name: str, revision: str | None = None) -> Any:
        commit, files = self.state.repository(name).head(revision or "main")
        return {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": [{"rfilename": path} for path in files],
        }

    def tree(self, body: bytes, name: str, revision: str) -> Any:
        _, files = self.state.repository(name).head(revision)
        entries = []
        for path, data in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid(path, data)}
            if is_large(path):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> Any:
        commit, files = self.state.repository(name).head(revision)
        if path not in files:
            raise RefusedError(404, "Entry not found", **{"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{oid(path, files[path])}"', "X-Repo-Commit": commit}
        return files[path], {"Content-Type": "application/octet-stream", **headers}


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}/auth-check/write", _Handler.auth_check),
    ("POST", rf"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/storage/([0-9a-f]+)", _Handler.upload),
    ("POST", r"/storage/([0-9a-f]+)/verify", _Handler.verify),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("GET", rf"/api/models/{_NAME}", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
