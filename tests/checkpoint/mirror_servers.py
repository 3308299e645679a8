"""Servers for the mirror's tests, on this machine: moto's S3 and a stand-in of the hub, both with faults on demand.

The stand-in speaks what huggingface_hub sends for a model repository over plain HTTP (no Xet): creation, information,
tree, preupload, the LFS batch, uploads, commits, resolve with redirects and ranges, and the list of LFS files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest

pytest.importorskip("moto.moto_server.werkzeug_app", reason="needs moto: pip install 'ekiden[dev]'")

from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
TOKEN = "hf_" + "t" * 34


class Faults:
    """Counts the requests to `app` and breaks number `at` (from 1), or every one from there on.

    Modes: 'error' answers 500; 'drop' closes the connection unheard; 'lost' does what is asked and closes it without an
    answer; 'cut' closes it in the middle of the answer; 'half' stores half of what was sent and says that all is well;
    'kill' and 'kill-after' end the process `victim` before or after what it asked for was done; 'hang' never answers.
    """

    def __init__(self, app: App) -> None:
        self.app, self.lock, self.released = app, threading.Lock(), threading.Event()
        self.disarm()

    def disarm(self) -> None:
        """Break nothing, and count anew."""
        self.at, self.mode, self.persistent, self.victim = 0, "", False, 0
        self.requests: list[str] = []

    def arm(self, at: int, mode: str, persistent: bool = False, victim: int = 0) -> None:
        """Break request number `at` from now on."""
        self.disarm()
        self.at, self.mode, self.persistent, self.victim = at, mode, persistent, victim

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            count = len(self.requests)
        if not (count == self.at or (self.persistent and count > self.at > 0)):
            return self.app(environ, start_response)
        return self._break(environ, start_response)

    def _break(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        mode, connection = self.mode, environ["werkzeug.socket"]
        if mode == "half":
            body = Request(environ).get_data()
            environ["wsgi.input"], environ["CONTENT_LENGTH"] = (
                BytesIO(body[: len(body) // 2]),
                str(len(body) // 2),
            )
            return self.app(environ, start_response)
        if mode == "error":
            Request(environ).get_data()
            return Response("broken", status=500)(environ, start_response)
        if mode == "hang":
            self.released.wait()
        if mode == "kill":
            os.kill(self.victim, signal.SIGKILL)
        if mode in ("lost", "cut", "kill-after"):
            body = b"".join(self.app(environ, start_response))
            if mode == "cut":
                return self._cut(body, connection)
            if mode == "kill-after":
                os.kill(self.victim, signal.SIGKILL)
        self._close(connection)
        return []

    @staticmethod
    def _cut(body: bytes, connection: socket.socket) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        Faults._close(connection)

    @staticmethod
    def _close(connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError


class _Quiet(MotoRequestHandler):
    def log(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(app: App) -> Iterator[tuple[str, Faults]]:
    """Serve `app` on a free port of this machine; yield its address and what breaks it."""
    faults = Faults(app)
    server = make_server("127.0.0.1", 0, faults, threaded=True, request_handler=_Quiet)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        faults.released.set()
        server.shutdown()
        thread.join()


def s3_app() -> App:
    """Return moto's S3, which keeps what it is sent."""
    return DomainDispatcherApplication(create_backend_app)


class Repository:
    """A model repository: commits, each {path: git blob or LFS object}, oldest first."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[tuple[str, dict[str, tuple[str, bytes | str]]]] = []
        self.commit({".gitattributes": ("git", b"*.safetensors filter=lfs\n")})

    @property
    def head(self) -> str:
        """Hash of the newest commit."""
        return self.commits[-1][0]

    def commit(self, tree: dict[str, tuple[str, bytes | str]]) -> None:
        """Add a commit."""
        self.commits.append((hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest(), tree))

    def tree(self, revision: str) -> dict[str, tuple[str, bytes | str]]:
        """Return the tree of 'main' or of a commit."""
        return self.commits[-1][1] if revision == "main" else dict(self.commits)[revision]


class Hub:
    """The stand-in; its state lies in `repositories` and `objects` (LFS, by SHA-256)."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        repo = r"(?P<repo>[\w.-]+/[\w.-]+?)"
        self.routes: list[tuple[str, str, Callable[..., Response]]] = [
            ("POST", r"/api/repos/create", self.create),
            ("GET", rf"/api/models/{repo}", self.info),
            ("GET", rf"/api/models/{repo}/tree/(?P<revision>\w+)", self.tree),
            ("POST", rf"/api/models/{repo}/preupload/(?P<revision>\w+)", self.preupload),
            ("POST", rf"/api/models/{repo}/commit/(?P<revision>\w+)", self.commit),
            ("POST", rf"/{repo}\.git/info/lfs/objects/batch", self.batch),
            ("POST", rf"/{repo}/lfs-verify", self.lfs_verify),
            ("GET", rf"/api/models/{repo}/lfs-files", self.lfs_files),
            ("POST", rf"/api/models/{repo}/lfs-files/batch", self.delete_lfs_files),
            ("GET", rf"/{repo}/resolve/(?P<revision>\w+)/(?P<path>.+)", self.resolve),
        ]

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        with self.lock:
            response = self.answer(request)
        return response(environ, start_response)

    def answer(self, request: Request) -> Response:
        """Return the answer to `request`."""
        # Signed addresses of the storage: no token goes there.
        if match := re.fullmatch(r"/storage/(\w+)", request.path):
            assert "Authorization" not in request.headers
            return self.storage(request, match[1])
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return problem(401, "", "Invalid credentials in Authorization header")
        for method, pattern, handler in self.routes:
            if request.method == method and (match := re.fullmatch(pattern, request.path)):
                named = match.groupdict()
                if "repo" in named and named["repo"] not in self.repositories:
                    return problem(404, "RepoNotFound", "Repository not found")
                return handler(request, **named)
        return problem(404, "", f"no such address {request.method} {request.path}")

    def create(self, request: Request) -> Response:
        """Create a repository."""
        body = request.get_json()
        name = f"{body['organization']}/{body['name']}"
        if name in self.repositories:
            return problem(409, "", "You already created this model repo")
        assert body.get("type", "model") == "model"
        self.repositories[name] = Repository(body.get("visibility") == "private")
        return answer({"url": f"{request.host_url}{name}", "name": name})

    def info(self, request: Request, repo: str) -> Response:
        """Tell about a repository."""
        found = self.repositories[repo]
        return answer(
            {"_id": "0", "id": repo, "sha": found.head, "private": found.private, "tags": [], "siblings": []}
        )

    def tree(self, request: Request, repo: str, revision: str) -> Response:
        """List the files and folders of a commit."""
        tree = self.repositories[repo].tree(revision)
        folders = {path.rpartition("/")[0] for path in tree if "/" in path}
        items: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)
        ]
        for path, (kind, content) in sorted(tree.items()):
            if kind == "git":
                assert isinstance(content, bytes)
                items.append({"type": "file", "path": path, "oid": git_sha1(content), "size": len(content)})
            else:
                size = len(self.objects[str(content)])
                lfs = {"oid": content, "size": size, "pointerSize": 134}
                items.append({"type": "file", "path": path, "oid": "1" * 40, "size": size, "lfs": lfs})
        return answer(items)

    def preupload(self, request: Request, repo: str, revision: str) -> Response:
        """Say which files go where."""
        tree = self.repositories[repo].tree(revision)
        files = []
        for file in request.get_json()["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            item = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            kind, content = tree.get(file["path"], ("", b""))
            if kind:
                item["oid"] = git_sha1(content) if isinstance(content, bytes) else content
            files.append(item)
        return answer({"files": files})

    def batch(self, request: Request, repo: str) -> Response:
        """Say where LFS objects are to be sent."""
        objects = []
        for item in request.get_json()["objects"]:
            action = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                action["actions"] = {
                    "upload": {"href": f"{request.host_url}storage/{item['oid']}"},
                    "verify": {"href": f"{request.host_url}{repo}/lfs-verify"},
                }
            objects.append(action)
        return answer({"transfer": "basic", "objects": objects})

    def storage(self, request: Request, oid: str) -> Response:
        """Store or send an LFS object, or a range of one."""
        if request.method == "PUT":
            body = request.get_data()
            if hashlib.sha256(body).hexdigest() != oid:
                return problem(400, "", "checksum mismatch")
            self.objects[oid] = body
            return Response(status=200)
        if oid not in self.objects:
            return problem(404, "EntryNotFound", "gone")
        response = Response(self.objects[oid], content_type="application/octet-stream")
        return response.make_conditional(request, accept_ranges=True, complete_length=len(self.objects[oid]))

    def lfs_verify(self, request: Request, repo: str) -> Response:
        """Say whether an object arrived."""
        return Response(status=200 if request.get_json()["oid"] in self.objects else 404)

    def commit(self, request: Request, repo: str, revision: str) -> Response:
        """Commit, whole or not at all."""
        assert revision == "main"
        found = self.repositories[repo]
        tree = dict(found.tree(revision))
        for line in request.get_data().splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                if value.get("parentCommit") not in (None, found.head):
                    return problem(412, "", "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                tree[value["path"]] = ("git", base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    return problem(400, "", f"LFS object {value['oid']} was not uploaded")
                tree[value["path"]] = ("lfs", value["oid"])
            else:
                gone = [
                    path
                    for path in tree
                    if path == value["path"]
                    or (key == "deletedFolder" and path.startswith(value["path"].rstrip("/") + "/"))
                ]
                if not gone:
                    return problem(404, "EntryNotFound", "A file with this name doesn't exist")
                for path in gone:
                    del tree[path]
        found.commit(tree)
        return answer({"commitUrl": f"{request.host_url}{repo}/commit/{found.head}", "commitOid": found.head})

    def resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        """Send a file (whole: no ranges here), or say where its LFS object is."""
        found = self.repositories[repo]
        if path not in found.tree(revision):
            return problem(404, "EntryNotFound", "Entry not found")
        kind, content = found.tree(revision)[path]
        if kind == "lfs":
            response = Response(status=302, headers={"Location": f"{request.host_url}storage/{content}"})
            # As from another host, where the client leaves out the token.
            response.headers["Location"] = response.headers["Location"].replace("127.0.0.1", "localhost")
            return response
        return Response(content, content_type="text/plain", headers={"X-Repo-Commit": found.head})

    def lfs_files(self, request: Request, repo: str) -> Response:
        """List the LFS files of all commits."""
        seen: dict[str, str] = {}
        for _sha, tree in self.repositories[repo].commits:
            seen.update(
                {
                    str(content): path
                    for path, (kind, content) in tree.items()
                    if kind == "lfs" and content in self.objects
                }
            )
        return answer(
            [
                {
                    "fileOid": oid,
                    "filename": path,
                    "oid": oid,
                    "pushedAt": "2026-01-01T00:00:00.000Z",
                    "ref": "main",
                    "size": len(self.objects[oid]),
                }
                for oid, path in seen.items()
            ]
        )

    def delete_lfs_files(self, request: Request, repo: str) -> Response:
        """Delete LFS objects for ever."""
        deletions = request.get_json()["deletions"]
        assert deletions["rewriteHistory"] is False
        for sha in deletions["sha"]:
            self.objects.pop(sha, None)
        return answer({})


def git_sha1(content: bytes) -> str:
    """Return git's name of a blob."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def answer(value: Any) -> Response:
    """Return `value` as JSON."""
    return Response(json.dumps(value), content_type="application/json")


def problem(status: int, code: str, message: str) -> Response:
    """Return an error as the hub words it."""
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
    return Response(
        json.dumps({"error": message}), status=status, headers=headers, content_type="application/json"
    )
