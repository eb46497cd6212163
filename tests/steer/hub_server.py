"""A small Hugging Face Hub on this machine: the routes that pushing and pulling profiles use, and nothing else.

Repositories are in memory; every commit keeps all its files. Writing takes the token `TOKEN`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_write"


@dataclass
class Repository:
    """Commits with all their files, oldest first, and what branches and tags point to."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with exactly these files, at the end of a branch."""
        content = repr((len(self.commits), sorted(files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision) or ""]

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server's state; tests look into it and change it behind the client's back."""

    url: str = ""
    repos: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    break_in: str = ""  # a repository to which somebody else pushes just before the next commit
    down: bool = False
    full: bool = False


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, or each answer waits 40 ms for a delayed acknowledgement
    state: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        self.state.requests.append(f"{self.command} {path}")
        try:
            if self.state.down:
                raise _RefusedError(400, message="the Hub is out of order")
            for method, pattern, route in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return self._send(200, *route(self, *match.groups(), body))
            raise _RefusedError(404, message=f"this Hub has no {self.command} {path}")
        except _RefusedError as refused:
            content = {"error": str(refused), **refused.more}
            self._send(refused.status, content, {"X-Error-Code": refused.code})

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str) -> Repository:
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not self._may_write()):
            raise _RefusedError(401, "RepoNotFound", "Repository not found")
        if repo.gated and not self._may_write():
            raise _RefusedError(403, "GatedRepo", "Access to this repository is restricted")
        return repo

    def _commit(self, name: str, revision: str) -> tuple[Repository, str]:
        repo = self._repo(name)
        oid = repo.resolve(revision)
        if oid is None:
            raise _RefusedError(404, "RevisionNotFound", f"no revision {revision}")
        return repo, oid

    def create(self, body: bytes) -> tuple[object]:
        if not self._may_write():
            raise _RefusedError(401, message="Invalid username or password.")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.state.url}/{name}", "name": name}
        if name in self.state.repos:
            raise _RefusedError(409, message="You already created this model repo", **url)
        repo = self.state.repos[name] = Repository(private=asked.get("visibility") == "private")
        repo.commit({".gitattributes": b""})
        return (url,)

    def info(self, name: str, revision: str | None, _body: bytes) -> tuple[object]:
        repo, oid = self._commit(name, revision or "main")
        siblings = [{"rfilename": file} for file in repo.commits[oid]]
        return ({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings, "tags": []},)

    def resolve(self, name: str, revision: str, file: str, _body: bytes) -> tuple[object, dict[str, str]]:
        repo, oid = self._commit(name, revision)
        if file not in repo.commits[oid]:
            raise _RefusedError(404, "EntryNotFound", f"no {file}")
        data = repo.commits[oid][file]
        return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": oid}

    def validate(self, body: bytes) -> tuple[object]:
        assert json.loads(body)["content"].startswith("---\n")
        return ({"errors": [], "warnings": []},)

    def preupload(self, name: str, _revision: str, body: bytes) -> tuple[object]:
        self._repo(name)
        files = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
        return ({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]},)

    def batch(self, name: str, body: bytes) -> tuple[object]:
        self._repo(name)
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.state.blobs:
                item["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}"}}
        return ({"transfer": "basic", "objects": objects},)

    def upload(self, oid: str, body: bytes) -> tuple[object]:
        if self.state.full:
            raise _RefusedError(403, message="storage limit reached")
        assert hashlib.sha256(body).hexdigest() == oid
        self.state.blobs[oid] = body
        return ({},)

    def commit(self, name: str, branch: str, body: bytes) -> tuple[object]:
        if not self._may_write():
            raise _RefusedError(403, message="no write access")
        repo, parent = self._commit(name, branch)
        if self.state.break_in == name:
            parent = repo.commit({**repo.commits[parent], "theirs": b"1"}, branch)
        files = dict(repo.commits[parent])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                raise _RefusedError(412, message="A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.state.blobs[value["oid"]]
        oid = repo.commit(files, branch)
        return ({"success": True, "commitOid": oid, "commitUrl": f"{self.state.url}/{name}/commit/{oid}"},)


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.validate),
    (("GET",), rf"/api/models/{_NAME}(?:/revision/(.+))?", _Handler.info),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/([0-9a-f]+)", _Handler.upload),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
