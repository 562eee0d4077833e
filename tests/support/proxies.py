"""nginx and HAProxy as their users run them: mTLS in front, mTLS behind, files for identities.

- Certificates, keys and bundles are read from the directory that `idb svid fetch --write` fills;
  a reload is what their own documentation says it is.
- Both take the service behind them for exactly one SPIFFE ID: by the DNS name that stands for it.
- Where one is not installed, `installed` skips the test and says how to install it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from identity_client.naming import parse_spiffe_id, server_name

_TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"

_NGINX = """
daemon off;
user root;
worker_processes 2;
pid {work}/pid;
error_log {work}/error.log info;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_protocols TLSv1.3;
        ssl_certificate {files}/svid.pem;
        ssl_certificate_key {files}/key.pem;
        ssl_client_certificate {files}/bundle.pem;
        ssl_verify_client on;
        ssl_crl {files}/crl.pem;
        ssl_verify_depth 3;
        ssl_session_tickets off;
        location / {{
            proxy_pass https://127.0.0.1:{behind};
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_certificate {files}/svid.pem;
            proxy_ssl_certificate_key {files}/key.pem;
            proxy_ssl_trusted_certificate {files}/bundle.pem;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 3;
            proxy_ssl_server_name on;
            proxy_ssl_name {behind_name};
            proxy_ssl_session_reuse off;
        }}
    }}
}}
"""

_HAPROXY = """
global
    stats socket {work}/admin.sock mode 600 level admin expose-fd listeners
    hard-stop-after 10s
defaults
    mode http
    timeout connect 5s
    timeout client 10s
    timeout server 10s
frontend front
    bind 127.0.0.1:{port} {mtls} no-tls-tickets
    default_backend behind
backend behind
    server one 127.0.0.1:{behind} {mtls} sni str({behind_name}) {pinned} no-ssl-reuse
"""
# Key and chain in one file: SPIFFE Filesystem Delivery, section 2.1.
_HAPROXY_MTLS = (
    "ssl crt {files}/credential-bundle.private-key.pem ca-file {files}/bundle.pem "
    "crl-file {files}/crl.pem verify required ssl-min-ver TLSv1.3"
)


@dataclass(frozen=True)
class Proxy:
    """Which proxy, and how it is told to read its files again.

    Attributes:
        hook: for `--exec`; does nothing while the proxy is not up.
    """

    kind: str
    binary: str
    work: Path
    port: int
    hook: str

    @classmethod
    def installed(cls, kind: str, work: Path) -> Proxy:
        """The proxy, to be run in `work`; skips the test where it is not installed."""
        binary = shutil.which(kind, path=_PATH)
        if binary is None:
            package = {"nginx": "nginx-light"}.get(kind, kind)
            pytest.skip(f"{kind} is not installed: apt-get install {package} (.ci/run does)")
        work.mkdir()
        tell = {
            "nginx": f"{binary} -p {work} -c {work}/conf -e {work}/error.log -s reload",
            "haproxy": f"kill -USR2 $(cat {work}/pid)",
        }[kind]
        hook = work / "reload.sh"
        hook.write_text(f"#!/bin/sh\n[ ! -e {work}/pid ] || exec sh -c '{tell}'\n")
        hook.chmod(0o755)
        return cls(kind, binary, work, _free_port(), str(hook))

    @asynccontextmanager
    async def running(self, files: Path, *, behind: int, behind_id: str) -> AsyncIterator[None]:
        """Run it with the identity in `files`, before the service at port `behind`."""
        text = {"nginx": _NGINX, "haproxy": _HAPROXY}[self.kind]
        behind_name = server_name(parse_spiffe_id(behind_id))
        (self.work / "conf").write_text(
            text.format(
                work=self.work,
                port=self.port,
                files=files,
                behind=behind,
                behind_name=behind_name,
                mtls=_HAPROXY_MTLS.format(files=files),
                pinned=f"verifyhost {behind_name}",
            )
        )
        arguments = {
            "nginx": ("-p", self.work, "-c", self.work / "conf", "-e", self.work / "error.log"),
            "haproxy": ("-W", "-db", "-f", self.work / "conf"),
        }[self.kind]
        with (self.work / "out").open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(*_TIED, self.binary, *map(str, arguments)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT,
            )
        try:
            await self._answering(process)
            if self.kind == "haproxy":
                (self.work / "pid").write_text(str(process.pid))
            yield
        finally:
            (self.work / "pid").unlink(missing_ok=True)
            with suppress(ProcessLookupError):
                process.terminate()
            async with asyncio.timeout(15):
                await process.wait()

    def said(self) -> str:
        """Its own log."""
        return "".join(
            path.read_text(errors="replace")
            for path in (self.work / "out", self.work / "error.log")
            if path.exists()
        )

    async def _answering(self, process: asyncio.subprocess.Process) -> None:
        async with asyncio.timeout(15):
            while True:
                assert process.returncode is None, self.said()
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.05)
                    continue
                writer.close()
                return


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
        return port
