"""A stand-in of Kaggle that the official client talks to: it speaks the API, keeps state, runs scripts as sessions, and
misbehaves on command.

The client is pointed at it by its own environment variables (`environment`): KAGGLE_API_ENVIRONMENT=LOCALHOST makes it
ask http://localhost/api, and HTTP_PROXY brings that here, whatever the port.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sessions import Faults, Session

USER = "tester"
TOKEN = "KGAT_not-a-secret"


@dataclass
class HttpFault:
    """code: of the answer; 0: the connection breaks without one. after: the request is carried out all the same."""

    code: int
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Version:
    """One version of a script. kept: its output is there; never: its session stays queued."""

    source: str
    kernel_sources: list[str]
    request: dict[str, Any]
    status: str = "QUEUED"
    message: str = ""
    folder: Path = Path()
    kept: bool = False
    never: bool = False
    session: Session | None = None


@dataclass
class SessionFault:
    """What happens to the next session: `faults` inside it; stale: it mounts an older version of its kernel source,
    stale_corpus: of its datasets; lie: the status that is shown in place of the true one; never: it stays queued."""

    faults: Faults = field(default_factory=Faults)
    stale: bool = False
    stale_corpus: bool = False
    lie: str = ""
    never: bool = False


class StandIn:
    """The server, its state, and the faults that wait to happen."""

    def __init__(self, folder: Path, python: str, steps_a_leg: int) -> None:
        self.folder, self.python, self.steps_a_leg = folder, python, steps_a_leg
        self.lock = threading.RLock()
        self.kernels: dict[str, list[Version]] = defaultdict(list)
        self.deleted: list[Version] = []
        self.datasets: dict[str, list[Path]] = {}
        self.blobs: dict[str, bytearray] = {}
        self.blob_names: dict[str, tuple[str, int]] = {}
        self.http_faults: dict[str, list[HttpFault]] = defaultdict(list)
        self.push_errors: list[str] = []
        self.push_invalid: list[list[str]] = []
        self.session_faults: list[SessionFault] = []
        self.upload_cuts: dict[str, list[int]] = {}
        self.lose_files: list[str] = []
        self.expired_uploads: list[str] = []
        self.settle = (
            0  # requests after an upload, and kernel_settle: after a push, that the version before answers
        )
        self.kernel_settle = 0
        self.output_limit = 20_000_000_000
        self.hold_seconds = 0.0  # that a session waits for its machine
        self.unsettled: dict[str, int] = {}
        self.quota = {"used": 0.0, "allowed": 108_000.0, "refresh": time.time() + 86_400}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.log: list[str] = []
        self.numbers = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stand_in": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Return what points the client here, with a home folder without other credentials."""
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "HTTP_PROXY": f"http://127.0.0.1:{self.port}",
            "http_proxy": f"http://127.0.0.1:{self.port}",
            "NO_PROXY": "",
            "no_proxy": "",
            "KAGGLE_API_TOKEN": TOKEN,
            "HOME": str(home),
            "XDG_CONFIG_HOME": str(home / "config"),
        }

    # -- what tests look at -------------------------------------------------------------------------------------

    def versions(self) -> list[Version]:
        """Return every version of every script."""
        return self.deleted + [version for versions in self.kernels.values() for version in versions]

    def calls(self, method: str) -> int:
        """Return how often a method was called."""
        return sum(name == method for name, _ in self.requests)

    # -- security -----------------------------------------------------------------------------------------------

    def introspect_token(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"active": body.get("token") == TOKEN, "username": USER}

    # -- datasets -----------------------------------------------------------------------------------------------

    def _dataset(self, body: dict[str, Any]) -> str:
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets:
            raise Refused(404, "Dataset not found")
        return ref

    def get_dataset_status(self, body: dict[str, Any]) -> dict[str, Any]:
        self._dataset(body)
        return {"status": "READY"}

    def _visible(self, ref: str) -> Path:
        """Return the version that is shown: for some requests after a push it is still the one before."""
        versions = self.datasets[ref]
        if self.unsettled.get(ref, 0) > 0 and len(versions) > 1:
            self.unsettled[ref] -= 1
            return versions[-2]
        return versions[-1]

    def list_dataset_files(self, body: dict[str, Any]) -> dict[str, Any]:
        names = sorted(self._visible(self._dataset(body)).iterdir())
        first = int(body.get("pageToken") or 0)
        size = min(2, body.get("pageSize", 20))  # small pages: the client's caller has to follow them
        page = [
            {"name": p.name, "totalBytes": p.stat().st_size, "ref": p.name}
            for p in names[first : first + size]
        ]
        more = {"nextPageToken": str(first + size)} if first + size < len(names) else {}
        return {"datasetFiles": page, **more}

    def download_dataset(self, body: dict[str, Any]) -> dict[str, Any]:
        ref = self._dataset(body)
        raise Redirect(f"/files/{self._visible(ref).relative_to(self.folder)}/{body['fileName']}")

    def start_blob_upload(self, body: dict[str, Any]) -> dict[str, Any]:
        self.numbers += 1
        token = f"blob{self.numbers}"
        self.blobs[token] = bytearray()
        self.blob_names[token] = body["name"], body["contentLength"]
        return {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    def create_dataset(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["isPrivate"] is True
        return self._new_version(f"{body['ownerSlug']}/{body['slug']}", body["files"])

    def create_dataset_version(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._new_version(self._dataset(body), body["body"]["files"])

    def _new_version(self, ref: str, files: list[dict[str, Any]]) -> dict[str, Any]:
        versions = self.datasets.setdefault(ref, [])
        self.numbers += 1
        folder = self.folder / "datasets" / str(self.numbers)
        folder.mkdir(parents=True)
        for file in files:
            name, size = self.blob_names[file["token"]]
            data = self.blobs[file["token"]]
            assert len(data) == size, f"{name} has {len(data)} of {size} bytes"
            if name in self.lose_files:
                self.lose_files.remove(name)
                continue
            (folder / name).write_bytes(data)
        versions.append(folder)
        self.unsettled[ref] = self.settle
        return {"status": "Ok", "ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}"}

    # -- kernels ------------------------------------------------------------------------------------------------

    def _kernel(self, body: dict[str, Any]) -> list[Version]:
        ref = f"{body['userName']}/{body['kernelSlug']}"
        if not self.kernels.get(ref):
            raise Refused(403, "Permission 'kernels.get' was denied")
        return self.kernels[ref]

    def _shown(self, body: dict[str, Any]) -> Version:
        """Return the version that is shown: for some requests after a push it is still the one before."""
        versions, ref = self._kernel(body), f"{body['userName']}/{body['kernelSlug']}"
        if self.unsettled.get(ref, 0) > 0 and len(versions) > 1:
            self.unsettled[ref] -= 1
            return versions[-2]
        return versions[-1]

    def save_kernel(self, body: dict[str, Any]) -> dict[str, Any]:
        assert len(body["text"].encode()) < 1_000_000
        assert re.sub(r"[^a-z0-9]+", "-", body["newTitle"].lower()) == body["slug"].split("/")[1]
        if self.push_errors:
            return {"error": self.push_errors.pop(0)}
        invalid_datasets = [ref for ref in body.get("datasetDataSources", []) if ref not in self.datasets]
        if self.push_invalid:
            invalid_datasets = self.push_invalid.pop(0)
        sources = body.get("kernelDataSources", [])
        invalid = [ref for ref in sources if not any(v.kept for v in self.kernels.get(ref, []))]
        # What is mounted is what stands now, even where the session begins later.
        fault = self.session_faults.pop(0) if self.session_faults else SessionFault()
        version = Version(
            body["text"], [ref for ref in sources if ref not in invalid], body, never=fault.never
        )
        inputs = {
            f"datasets/{ref}": self.datasets[ref][0 if fault.stale_corpus else -1]
            for ref in body.get("datasetDataSources", [])
            if ref not in invalid_datasets
        }
        for ref in version.kernel_sources:
            kept = [v for v in self.kernels[ref] if v.kept]
            inputs[f"notebooks/{ref}"] = kept[0 if fault.stale else -1].folder
        versions = self.kernels[body["slug"]]
        versions.append(version)
        self.unsettled[body["slug"]] = self.kernel_settle
        self.numbers += 1
        folder = self.folder / "sessions" / str(self.numbers)
        if not fault.never:
            threading.Thread(target=self._run, args=(version, folder, inputs, fault), daemon=True).start()
        return {
            "ref": f"/code/{body['slug']}",
            "url": f"https://www.kaggle.com/code/{body['slug']}",
            "versionNumber": len(versions),
            "invalidDatasetSources": invalid_datasets,
            "invalidKernelSources": invalid,
        }

    def _run(self, version: Version, folder: Path, inputs: dict[str, Path], fault: SessionFault) -> None:
        version.status = "RUNNING"
        fault.faults.stop_after_steps = self.steps_a_leg
        flat = self.numbers % 3 == 0
        session = version.session = Session(
            folder, version.source, inputs, self.python, flat, self.output_limit, fault.faults
        )
        began = time.monotonic()
        time.sleep(self.hold_seconds)
        status, version.message = session.run()
        self.quota["used"] += time.monotonic() - began
        version.folder = session.working
        version.kept = status == "COMPLETE"
        version.status = fault.lie or status
        self.log.append(session.log)

    def get_kernel_session_status(self, body: dict[str, Any]) -> dict[str, Any]:
        version = self._shown(body)
        return {"status": version.status, "failureMessage": version.message}

    def list_kernel_session_output(self, body: dict[str, Any]) -> dict[str, Any]:
        version = self._shown(body)
        files = sorted(p for p in version.folder.rglob("*") if p.is_file()) if version.kept else []
        first, size = int(body.get("pageToken") or 0), 20
        page = [
            {
                "fileName": str(p.relative_to(version.folder)),
                "url": f"http://localhost/files/{p.relative_to(self.folder)}?sig=x",
            }
            for p in files[first : first + size]
        ]
        more = {"nextPageToken": str(first + size)} if first + size < len(files) else {}
        return {"files": page, "log": "[]", **more}

    def get_kernel(self, body: dict[str, Any]) -> dict[str, Any]:
        version = self._kernel(body)[-1]
        return {
            "metadata": {"ref": f"{body['userName']}/{body['kernelSlug']}"},
            "blob": {
                "source": version.source,
                "language": "python",
                "kernelType": "script",
                "slug": body["kernelSlug"],
            },
        }

    def delete_kernel(self, body: dict[str, Any]) -> dict[str, Any]:
        self._kernel(body)
        self.deleted += self.kernels.pop(f"{body['userName']}/{body['kernelSlug']}")
        return {}

    def get_accelerator_quota_statistics(self, body: dict[str, Any]) -> dict[str, Any]:
        if time.time() >= self.quota["refresh"]:
            self.quota |= {"used": 0.0, "refresh": time.time() + 7 * 86_400}
        refresh = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.quota["refresh"]))
        gpu = {
            "timeUsed": f"{self.quota['used']:.0f}s",
            "timeReserved": "0s",
            "totalTimeAllowed": f"{self.quota['allowed']:.0f}s",
        }
        return {"quotaRefreshTime": refresh + ".000Z", "gpuQuota": gpu, "tpuQuota": {**gpu, "timeUsed": "0s"}}


class Refused(Exception):
    """Answered with a status and a message."""


class Redirect(Exception):
    """Answered with another address."""


class Handler(BaseHTTPRequestHandler):
    """One request; targets come in absolute form, for the client believes to use a proxy."""

    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _path(self) -> str:
        return re.sub(r"^https?://[^/]+", "", self.path).split("?")[0]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        method = self._path().rsplit("/", 1)[1]
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        function = getattr(self.stand_in, re.sub(r"(?<!^)(?=[A-Z])", "_", method).lower(), None)
        with self.stand_in.lock:
            self.stand_in.requests.append((method, body))
            faults = self.stand_in.http_faults[method]
            fault = faults.pop(0) if faults else None
            if fault and not fault.after:
                self._fail(fault)
                return
            try:
                if function is None or not (authorised or method == "IntrospectToken"):
                    raise Refused(401 if function else 404, f"no {method} for you")
                answer = function(body)
            except Refused as refused:
                code, message = refused.args
                self._json(code, {"code": code, "message": message})
                return
            except Redirect as redirect:
                self._answer(302, b"", {"Location": f"http://localhost{redirect.args[0]}"})
                return
        if fault:
            self._fail(fault)
            return
        self._json(200, answer)

    def _fail(self, fault: HttpFault) -> None:
        if fault.code == 0:
            self.close_connection = True
            self.connection.close()
            return
        self._answer(fault.code, b"", fault.headers)

    def _json(self, code: int, value: dict[str, Any]) -> None:
        self._answer(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        faults = self.stand_in.http_faults["GET"]
        if faults:
            self._fail(faults.pop(0))
            return
        assert self._path().startswith("/files/")
        path = self.stand_in.folder / self._path().removeprefix("/files/")
        self._answer(200, path.read_bytes(), {"Last-Modified": "Fri, 20 Nov 2026 10:00:00 GMT"})

    def do_PUT(self) -> None:
        """Take a blob, as Google's resumable uploads do."""
        token = self._path().rsplit("/", 1)[1]
        length = int(self.headers.get("Content-Length", 0))
        name, size = self.stand_in.blob_names.get(token, ("", 0))
        blob = self.stand_in.blobs.get(token)
        if blob is None or name in self.stand_in.expired_uploads:
            if name in self.stand_in.expired_uploads:
                self.stand_in.expired_uploads.remove(name)
                del self.stand_in.blobs[token]
            self.rfile.read(length)
            self._answer(404, b"", {})
            return
        where = self.headers.get("Content-Range", "")
        if where.startswith("bytes */"):
            done = {"Range": f"bytes=0-{len(blob) - 1}"} if blob else {}
            self._answer(200 if len(blob) == size else 308, b"", {} if len(blob) == size else done)
            return
        if where:
            assert int(re.findall(r"\d+", where)[0]) == len(blob), f"{where}, but {len(blob)} bytes are here"
        else:
            blob.clear()
        cuts = self.stand_in.upload_cuts.get(name, [])
        cut = cuts.pop(0) if cuts else None
        data = self.rfile.read(length if cut is None else min(length, cut))
        blob.extend(data)
        if cut is not None:
            self.close_connection = True
            if cut < length:
                self.connection.close()
                return
            self._answer(503, b"", {})
            return
        assert len(blob) <= size
        self._answer(200, b"{}", {})


def copy_datasets(stand_in: StandIn, packed: dict[str, Path]) -> None:
    """Put packed datasets on the server as if they had been uploaded."""
    for ref, source in packed.items():
        target = stand_in.folder / "datasets" / ref.replace("/", "-")
        shutil.copytree(source, target)
        stand_in.datasets[ref] = [target]
