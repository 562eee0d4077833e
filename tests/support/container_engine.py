"""A container engine's HTTP API on a Unix socket, true to what Docker and podman answer.

- Answers are shaped like Docker's (API 1.48): the fields that an attestor reads among those that
  it does not; longer ones chunked, as Go's HTTP server sends them.
- It can be told to hang, to fail, or to talk nonsense.
"""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

IMAGE = "sha256:" + "1" * 64
MANIFEST = "sha256:" + "2" * 64
REGISTRY_DIGEST = "sha256:" + "3" * 64


class Engine:
    """What the engine knows, and how it behaves."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, Any]] = {}
        self.images: dict[str, dict[str, Any]] = {
            IMAGE: {"Id": IMAGE, "RepoDigests": [f"registry.example.org/orders@{REGISTRY_DIGEST}"]}
        }
        self.asked: list[str] = []
        self.raw: bytes | None = None  # instead of any answer
        self.status: int | None = None
        self.hangs = threading.Event()
        self.released = threading.Event()

    def run(self, id: str, pid: int, **config: Any) -> None:
        """A container that began with that process."""
        self.containers[id] = {
            "Id": id,
            "Created": "2026-01-01T00:00:00.000000000Z",
            "Path": "/app/orders",
            "Args": ["--serve"],
            "State": {"Status": "running", "Running": True, "Pid": pid, "ExitCode": 0},
            "Image": IMAGE,
            "Name": "/orders-1",
            "HostConfig": {"NetworkMode": "bridge", "CgroupnsMode": "private"},
            "ImageManifestDescriptor": {"digest": MANIFEST, "size": 1024},
            "Config": {
                "Hostname": id[:12],
                "User": "",
                "Env": ["PATH=/usr/local/bin:/usr/bin", "STAGE=production", "EMPTY="],
                "Cmd": ["--serve"],
                "Image": "registry.example.org/orders:1.4",
                "Labels": {"com.example.app": "orders", "url": "https://x.example:80/"},
                **config,
            },
            "NetworkSettings": {"Ports": {str(port): None for port in range(300)}},  # long
        }


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    engine: Engine


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_args: object) -> None:
        pass

    def address_string(self) -> str:
        return "local"

    def do_GET(self) -> None:
        engine = self.server.engine
        engine.asked.append(self.path)
        if engine.hangs.is_set():
            engine.released.wait(30)
            self.close_connection = True
            return
        if engine.raw is not None:
            self.wfile.write(engine.raw)
            self.close_connection = True
            return
        _, kind, id, tail = (*self.path.split("/"), "", "")[:4]
        known = {"containers": engine.containers, "images": engine.images}.get(kind, {})
        if engine.status is not None:
            self._say(engine.status, {"message": "the engine is unwell"})
        elif tail != "json" or id not in known:
            self._say(404, {"message": f"No such {kind.removesuffix('s')}: {id}"})
        else:
            self._say(200, known[id])

    def _say(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("Api-Version", "1.48")
        self.send_header("Content-Type", "application/json")
        self.send_header("Docker-Experimental", "false")
        if len(body) <= 2048:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 2048):
            piece = body[start : start + 2048]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


@contextmanager
def container_engine(path: Path) -> Iterator[Engine]:
    """Serve an engine on `path`."""
    engine = Engine()
    with _Server(str(path), _Handler) as server:
        server.engine = engine
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield engine
        finally:
            engine.released.set()
            server.shutdown()
            thread.join()
