"""`ekiden dashboard`: the report live in a browser, several runs compared, and a playground beside it.

Reads run directories (`reading.RunReader`) and answers on localhost; the page asks every two seconds and is given a run
only where its history has grown. It loads nothing from elsewhere, and a Content-Security-Policy says so.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ekiden.errors import UserError
from ekiden.optional import check_installed
from ekiden.progress import say
from ekiden.report.page import asset, packed_plotly
from ekiden.report.playground import Playground
from ekiden.report.reading import RunReader

SECURITY_HEADERS = {
    # plotly.js writes style elements and attributes; scripts come from this server's files only.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
ASSETS = {"page.css": "text/css", "charts.js": "text/javascript", "tables.js": "text/javascript"}
ASSETS |= {"dashboard.js": "text/javascript"}
LARGEST_REQUEST = 100_000


class LiveRun:
    """One run, read on when asked; safe to ask from several threads."""

    def __init__(self, path: Path) -> None:
        self.reader = RunReader(path)
        self._lock = threading.Lock()
        self._seen: tuple[float, ...] = ()
        self._version, self._text = 0, b""

    def newer_than(self, version: int) -> tuple[int, bytes] | None:
        """Return the run's figures as JSON and their version, or None where `version` is the newest."""
        with self._lock:
            grown = self.reader.update()
            seen = self._facts()
            if grown or seen != self._seen or not self._version:
                self._seen, self._version = seen, self._version + 1
                text = json.dumps(self.reader.data(), ensure_ascii=False, allow_nan=False)
                self._text = text.encode("utf-8", "replace")
            return (self._version, self._text) if version != self._version else None

    def _facts(self) -> tuple[float, ...]:
        """Return what changes where something but the history does: the result, checkpoints, a run gone silent."""
        paths = [self.reader.path / name for name in ("result.json", "checkpoints", "best", "final_model")]
        return (*(path.stat().st_mtime if path.exists() else 0.0 for path in paths), self.reader.is_silent())


def find_runs(paths: list[str]) -> list[Path]:
    """Return the run directories that `paths` mean: themselves, or the ones in them; say which hold none.

    Raises:
        UserError: none of the paths holds one.
    """
    found: list[Path] = []
    empty: list[str] = []
    for text in paths:
        path = Path(text)
        alone = (path / "history.jsonl").is_file()
        inside = [path] if alone else sorted(p.parent for p in path.glob("*/history.jsonl"))
        if not inside:
            empty.append(text)
        found += [run for run in inside if run.resolve() not in [other.resolve() for other in found]]
    why = "no history.jsonl in it or one folder below"
    if not found:
        raise UserError(f"{', '.join(empty)} holds no run ({why}); give an --output-dir")
    for text in empty:
        say(f"{text} holds no run ({why}) and is left out")
    return found


def build_app(paths: list[str], hosts: list[str], device: str = "cpu") -> Any:
    """Return the ASGI application that shows the runs in `paths`.

    Args:
        hosts: names the server answers to, so that no foreign page can reach it under a name of its own.
        device: of the playground.

    Raises:
        UserError: there is no such run, or the extra is missing.
    """
    for package in ("starlette", "uvicorn"):
        check_installed(package, "ekiden dashboard", extra="dashboard")
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import Route

    pages = Pages([LiveRun(path) for path in find_runs(paths)], Playground(device))
    routes = [
        Route("/", pages.index),
        Route("/assets/{name}", pages.assets),
        Route("/api/runs", pages.runs),
        Route("/api/runs/{number:int}", pages.run),
        Route("/api/generate", pages.generate, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


class Pages:
    """What the server answers."""

    def __init__(self, runs: list[LiveRun], playground: Playground) -> None:
        self.live, self.playground = runs, playground

    async def index(self, request: Any) -> Any:
        """Answer with the page that shows all runs."""
        from starlette.responses import HTMLResponse

        page = asset("dashboard.html").replace("@@BODY@@", asset("body.html"))
        return HTMLResponse(page, headers=SECURITY_HEADERS)

    async def assets(self, request: Any) -> Any:
        """Answer with one of the page's own scripts or styles, or 404."""
        from starlette.responses import Response

        name = request.path_params["name"]
        if name == "plotly-basic.min.js":  # every browser takes gzip
            packed = {**SECURITY_HEADERS, "Content-Encoding": "gzip"}
            return Response(packed_plotly(), media_type="text/javascript", headers=packed)
        if name not in ASSETS:
            return Response(status_code=404, headers=SECURITY_HEADERS)
        return Response(asset(name), media_type=ASSETS[name], headers=SECURITY_HEADERS)

    async def runs(self, request: Any) -> Any:
        """Answer with the runs' names, in the order of their numbers."""
        from starlette.responses import JSONResponse

        names = [live.reader.path.resolve().name for live in self.live]
        # Two runs of the same name in different folders are told apart by them.
        shown = [
            name if names.count(name) == 1 else str(live.reader.path) for name, live in zip(names, self.live)
        ]
        return JSONResponse(shown, headers=SECURITY_HEADERS)

    async def run(self, request: Any) -> Any:
        """Answer with a run's figures where they are newer than version `have` (204: they are not)."""
        from starlette.responses import Response

        number = request.path_params["number"]
        version = request.query_params.get("have", "0")
        if number >= len(self.live) or not version.isdecimal():
            return Response(status_code=404, headers=SECURITY_HEADERS)
        newer = await asyncio.to_thread(self.live[number].newer_than, int(version))
        if newer is None:
            return Response(status_code=204, headers=SECURITY_HEADERS)
        headers = {**SECURITY_HEADERS, "X-Version": str(newer[0])}
        return Response(newer[1], media_type="application/json", headers=headers)

    async def generate(self, request: Any) -> Any:
        """Answer a prompt as text that grows; a mistake is one sentence with status 400."""
        from starlette.responses import PlainTextResponse, StreamingResponse

        # A page from elsewhere can post without asking only as a form: this type it would have to ask for.
        if request.headers.get("content-type") != "application/json":
            return PlainTextResponse("send JSON", status_code=415, headers=SECURITY_HEADERS)
        try:
            body = await request.body()
            asked: dict[str, Any] = json.loads(body) if len(body) <= LARGEST_REQUEST else {}
            run = self.live[asked["run"]].reader if asked["run"] >= 0 else None
            pieces = await asyncio.to_thread(self.playground.answer, run, asked)
            first = await asyncio.to_thread(next, pieces, "")
        except UserError as error:
            return PlainTextResponse(str(error), status_code=400, headers=SECURITY_HEADERS)
        except (ValueError, KeyError, TypeError, IndexError):
            return PlainTextResponse(
                "that is no prompt for one of these runs", status_code=400, headers=SECURITY_HEADERS
            )

        async def text() -> AsyncIterator[str]:
            yield first
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece

        return StreamingResponse(text(), media_type="text/plain; charset=utf-8", headers=SECURITY_HEADERS)


def serve(paths: list[str], host: str = "127.0.0.1", port: int = 8765, device: str = "cpu") -> None:
    """Show the runs in `paths` until Ctrl-C: `ekiden dashboard`.

    Raises:
        UserError: no such run, a missing extra, or a port in use.
    """
    local = host in ("127.0.0.1", "localhost", "::1")
    app = build_app(paths, ["127.0.0.1", "localhost", "[::1]"] if local else ["*"], device)
    import uvicorn

    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port} cannot be used ({error.strerror}); give another --port"
        ) from None
    if not local:
        say(f"everybody who reaches {host} can read these runs and use the playground: there is no password")
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C to end)")
    uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listening])
