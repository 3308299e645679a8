"""A stand-in for the hub on this machine: one dataset, with faults on demand. What the real client asks, it answers."""

from __future__ import annotations

import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Serves `files` of the dataset owner/texts.

    Attributes:
        files: content by path. configs: the card's configurations.
        faults: taken one by one, one a request for a file: a status, ("break", bytes), or None for no fault.
        refuse: (status, error code) for every request; None: none.
        served: (path, first byte, last byte) of each range that went out in full.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.configs: list[dict[str, Any]] = []
        self.faults: list[int | tuple[str, int] | None] = []
        self.refuse: tuple[int, str] | None = None
        self.refuse_files: tuple[int, str] | None = None
        self.asked: list[str] = []
        self.served: list[tuple[str, int, int]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Answers for a `StandIn`, which its subclass names."""

    state: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.asked.append(path)
        if self.state.refuse:
            self.answer(self.state.refuse[0], b"no", {"X-Error-Code": self.state.refuse[1]})
        elif path in (
            "/api/datasets/owner/texts",
            f"/api/datasets/owner/texts/revision/{COMMIT}",
        ):
            card = {"cardData": {"configs": self.state.configs}} if self.state.configs else {}
            self.json({"id": "owner/texts", "sha": COMMIT, "private": False, "gated": False, **card})
        elif path == "/api/datasets/owner/texts/auth-check":
            if self.state.refuse_files:
                self.answer(self.state.refuse_files[0], b"no", {"X-Error-Code": self.state.refuse_files[1]})
            else:
                self.answer(200, b"")
        elif path == f"/api/datasets/owner/texts/tree/{COMMIT}":
            self.json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in self.state.files.items()
                ]
            )
        elif match := re.fullmatch(rf"/datasets/owner/texts/resolve/{COMMIT}/(.+)", path):
            self.file(match[1])
        else:
            self.answer(404, b"no", {"X-Error-Code": "RepoNotFound"})

    def file(self, name: str) -> None:
        data = self.state.files.get(name)
        if data is None:
            self.answer(404, b"no", {"X-Error-Code": "EntryNotFound"})
            return
        first, last = (int(x) for x in re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        body = data[first : last + 1]
        fault = self.state.faults.pop(0) if self.state.faults else None
        if isinstance(fault, int):
            self.answer(fault, b"no", {"Retry-After": "0"} if fault == 429 else {})
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault is not None:
            self.wfile.write(body[: fault[1]])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.state.served.append((name, first, last))
        self.wfile.write(body)

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
