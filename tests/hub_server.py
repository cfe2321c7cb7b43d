"""The hub on loopback, for tests: a listing of files, and their bytes with every fault that a line
or a server can have."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

import qwen3_tg.hub
from qwen3_tg.checkpoint import remote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".gguf", "tokenizer.json")
_LONGEST_STALL_S = 20


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. `kind` is one of: cut (after `count` bytes), stall (after
    `count` bytes), short and long (the body is so many bytes shorter or longer than the file, with
    a length that agrees), endless (more bytes than the file has, without a length), wrong (a byte
    of the body is flipped), whole (ranges are ignored), shift (another range than asked for), gzip,
    status (`status` with `headers`)."""

    kind: str
    count: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Hub:
    """The models that it has, and what was asked of it. `faults` are by file name, "" for the
    listing: used up from the front, one a request; `always` are not used up."""

    url: str = ""
    models: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    log: list[tuple[str, str | None]] = field(default_factory=list)  # file name, Range
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, *folders: Path, **files: bytes) -> None:
        """A model: the files of folders, and more by name."""
        found = {f.name: f.read_bytes() for folder in folders for f in folder.iterdir()}
        self.models[name] = found | files

    def ranges(self, file: str) -> list[str | None]:
        """The Range headers of all requests of a file, in order."""
        return [asked for name, asked in self.log if name == file]

    def listing(self, name: str) -> dict[str, Any]:
        siblings = []
        for file, data in self.models[name].items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            entry = {"rfilename": file, "size": len(data), "blobId": blob}
            if file.endswith(LARGE):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 134}
            siblings.append(entry)
        return {"id": name, "sha": COMMIT, "siblings": siblings}


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes in the middle is part of the tests."""
        if not isinstance(sys.exception(), OSError):
            raise


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make it the hub of this process, which reads its environment when huggingface_hub is
    imported; without long pauses."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(qwen3_tg.hub, "PAUSES_S", (0.01,) * 5)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    remote._listing.cache_clear()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[2:3] == ["resolve"]:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._refuse(404)

    def _fault(self, file: str) -> Fault:
        waiting = self.hub.faults.get(file)
        return waiting.pop(0) if waiting else self.hub.always.get(file, Fault("none"))

    def _list(self, name: str, revision: str) -> None:
        self.hub.log.append(("", None))
        fault = self._fault("")
        if fault.kind == "status":
            self._refuse(fault.status, **fault.headers)
        elif fault.kind == "stall":
            self.hub.closing.wait(_LONGEST_STALL_S)
        elif name not in self.hub.models:
            self._refuse(401, **{"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self._refuse(404, **{"X-Error-Code": "RevisionNotFound"})
        else:
            body = json.dumps(self.hub.listing(name)).encode()
            body = b"<html>" if fault.kind == "wrong" else body
            self._send(200, body, {"Content-Type": "application/json"})

    def _file(self, name: str, file: str) -> None:
        asked = self.headers.get("Range")
        self.hub.log.append((file, asked))
        fault, data = self._fault(file), self.hub.models[name].get(file)
        if fault.kind == "status":
            self._refuse(fault.status, **fault.headers)
            return
        if data is None:
            self._refuse(404, **{"X-Error-Code": "EntryNotFound"})
            return
        size, start, end, status = len(data), 0, len(data), 200
        headers: dict[str, str] = {}
        if asked and fault.kind != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, size) if last else size
            if start >= size:
                self._refuse(416, **{"Content-Range": f"bytes */{size}"})
                return
            start += fault.kind == "shift"
            total = size + (fault.count if fault.kind == "long" else 0)
            total -= fault.count if fault.kind == "short" else 0
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{total}"
            status = 206
        body = bytearray(data[start:end])
        if fault.kind == "short":
            del body[len(body) - fault.count :]
        elif fault.kind == "long":
            body += b"x" * fault.count
        elif fault.kind == "wrong":
            body[len(body) // 2] ^= 1
        elif fault.kind == "gzip":
            headers["Content-Encoding"] = "gzip"
        self._send(status, bytes(body), headers, fault)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault = Fault("none")
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if fault.kind == "endless":
            self.send_header("Connection", "close")
            body += b"x" * fault.count
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            if fault.kind in ("cut", "stall"):
                self.wfile.write(body[: fault.count])
                self.wfile.flush()
                if fault.kind == "stall":
                    self.hub.closing.wait(_LONGEST_STALL_S)
                self.close_connection = True
            else:
                self.wfile.write(body)
                self.close_connection = fault.kind == "endless"
        except OSError:  # the client has gone
            self.close_connection = True

    def _refuse(self, status: int, **headers: str) -> None:
        self._send(status, b'{"error": "refused"}', headers)
