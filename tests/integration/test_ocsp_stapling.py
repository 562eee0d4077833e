"""What a server staples: `ocsp.der` beside the SVID, and a real nginx that shows it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from identity_api.broker.v1 import types_pb2
from identity_ca.ocsp import CertStatus
from identity_ca.ocsp_check import CheckedAnswer, check_answer
from support.line import RunningBroker, running, settings_in
from support.svid_watch import fetch_once, watching

_PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
_NGINX = """
daemon off;
user root;
worker_processes 1;
pid {work}/pid;
error_log {work}/error.log info;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {files}/svid.pem;
        ssl_certificate_key {files}/key.pem;
        ssl_stapling on;
        ssl_stapling_file {files}/ocsp.der;
        location / {{ return 204; }}
    }}
}}
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return int(held.getsockname()[1])


@asynccontextmanager
async def site(
    tmp_path: Path, *, validity: str = "10m", public_port: int | None = None
) -> AsyncIterator[tuple[RunningBroker, tuple[str, ...]]]:
    """A broker whose SVIDs name its responder, and the arguments of a fetch from it."""
    port = free_port()
    settings = settings_in(
        tmp_path / "idb",
        ca={"key_manager": "memory"},
        server={"http_address": f"127.0.0.1:{port}"},
        revocation={
            "public_url": f"http://127.0.0.1:{public_port or port}",
            "ocsp_validity": validity,
        },
    )
    async with running(settings) as broker:
        selector = types_pb2.Selector(type="join_token", value="name:n1")
        await broker.entry("/web", "n1", selectors=[selector])
        (tmp_path / "token").write_text(await broker.token("n1"))
        yield (
            broker,
            (
                *("--address", broker.addresses.address),
                *("--bootstrap-address", broker.addresses.bootstrap_address),
                *("--trust-domain", "example.org"),
                *("--bundle", str(broker.settings.server.bundle_file)),
                *("--token-file", str(tmp_path / "token"), "--spiffe-id", "/web"),
                *("--write", str(tmp_path / "svids")),
            ),
        )


def stapled(files: Path) -> CheckedAnswer:
    """The answer in the files, verified against the SVID and the bundle there."""
    leaf = x509.load_pem_x509_certificate((files / "svid.pem").read_bytes())
    return check_answer(
        (files / "ocsp.der").read_bytes(),
        leaf=leaf,
        issuer=x509.load_pem_x509_certificate((files / "bundle.pem").read_bytes()),
        now=datetime.now(UTC),
    )


async def test_the_answer_is_written_with_its_svid(tmp_path: Path) -> None:
    async with site(tmp_path) as (_, arguments):
        code, out, talk = await fetch_once(*arguments, "-o", "json")
    assert code == 0, talk
    files = tmp_path / "svids"
    assert json.loads(out)["files"]["ocsp"] == str(files / "ocsp.der")
    assert (files / "ocsp.der").resolve().parent == (files / "svid.pem").resolve().parent
    assert stapled(files).status is CertStatus.GOOD
    assert "OCSP" not in talk
    code, shown, _ = await _idb("svid", "show", str(files / "svid.pem"))
    assert code == 0
    assert "/ocsp" in shown
    assert ".crl" in shown


async def test_without_a_responder_the_files_come_all_the_same(tmp_path: Path) -> None:
    async with site(tmp_path, public_port=free_port()) as (_, arguments):
        code, out, talk = await fetch_once(*arguments, "-o", "json")
    assert code == 0, talk
    assert "no current OCSP answer from http://127.0.0.1" in talk
    assert "ocsp" not in json.loads(out)["files"]
    assert (tmp_path / "svids" / "svid.pem").exists()
    assert not (tmp_path / "svids" / "ocsp.der").exists()


async def test_the_answer_is_renewed_at_half_of_its_validity(tmp_path: Path) -> None:
    async with (
        site(tmp_path, validity="10s") as (_, arguments),
        watching(*arguments) as watch,
    ):
        first = await watch.document(1)
        before = stapled(tmp_path / "svids")
        second = await watch.document(2)
        after = stapled(tmp_path / "svids")
        assert second["serial"] == first["serial"]
        assert after.this_update > before.this_update
        # It was shown for no longer than its validity, and replaced before that.
        assert after.this_update < before.next_update
        assert await watch.stop() == 0


@asynccontextmanager
async def nginx(work: Path, files: Path, port: int) -> AsyncIterator[None]:
    binary = shutil.which("nginx", path=_PATH)
    assert binary
    (work / "conf").write_text(_NGINX.format(work=work, files=files, port=port))
    process = await asyncio.create_subprocess_exec(
        *(binary, "-p", work, "-c", work / "conf", "-e", work / "error.log"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(15):
            while not (work / "pid").exists() or not (work / "pid").read_text().strip():
                assert process.returncode is None, (work / "error.log").read_text()
                await asyncio.sleep(0.05)
        yield
    finally:
        process.terminate()
        await process.wait()


async def _idb(*arguments: str) -> tuple[int, str, str]:
    import sys

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "identity_broker.cli.main", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def s_client(port: int, roots: Path) -> str:
    """What `openssl s_client -status` says of a server."""
    program = shutil.which("openssl")
    assert program
    process = await asyncio.create_subprocess_exec(
        *(program, "s_client", "-connect", f"127.0.0.1:{port}", "-status", "-CAfile", roots),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(15):
        out, _ = await process.communicate()
    return out.decode(errors="replace")


@pytest.mark.skipif(
    shutil.which("nginx", path=_PATH) is None,
    reason="nginx is not installed: apt-get install nginx-light (.ci/run does)",
)
async def test_nginx_staples_it_and_openssl_reads_it(tmp_path: Path) -> None:
    work, files, port = tmp_path / "nginx", tmp_path / "svids", free_port()
    work.mkdir()
    binary = shutil.which("nginx", path=_PATH)
    hook = work / "reload.sh"
    hook.write_text(
        f"#!/bin/sh\n[ ! -e {work}/pid ] || "
        f"exec {binary} -p {work} -c {work}/conf -e {work}/error.log -s reload\n"
    )
    hook.chmod(0o755)
    async with (
        site(tmp_path, validity="10s") as (broker, arguments),
        watching(*arguments, "--exec", str(hook)) as watch,
    ):
        first = await watch.document(1)
        async with nginx(work, files, port):
            said = await s_client(port, files / "bundle.pem")
            assert "OCSP Response Status: successful" in said
            assert "Cert Status: good" in said
            assert f"Serial Number: {first['serial'].upper()}" in said
            # No other certificate for this identity: all that is left to say is that it ended.
            await broker.revoke(spiffe_id=first["spiffe_id"], reason=1)
            await watch.until(lambda: "revoked" in watch.talk)
            async with asyncio.timeout(15):
                while "Cert Status: revoked" not in said:
                    await asyncio.sleep(0.2)
                    said = await s_client(port, files / "bundle.pem")
            assert "keyCompromise" in said
            assert f"Serial Number: {first['serial'].upper()}" in said
