"""The directory of an `idb dev`: who holds it, what it was made for, where things lie in it.

- One `idb dev` at a time (flock). The claim ends with the process, however it ends.
- A directory with other things in it is refused, never taken over.
- The trust domain and the kind of CA are decided by the first start; a later one that asks for
  another is refused, because the identities in it would change.
- Addresses of the last run are kept, so that what was told them finds the broker again.
- Others may pass through it (0711), because the Workload API's socket is for every user of the
  machine; everything else in it is its owner's alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from identity_broker.dev.errors import DevDirectoryUnusable, DevRunning
from identity_broker.dev.state import FILE_NAME, BrokerAddresses, write_private

# sun_path has 108 bytes with its final zero; the listener adds nothing to our path.
_LONGEST_SOCKET_PATH = 100
_SETTINGS = "settings.json"
_LOCK = "dev.lock"
_ANY_PORT = "127.0.0.1:0"


class CaKind(StrEnum):
    """Where the signing keys of an `idb dev` live."""

    OPENBAO = "openbao"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class DevSettings:
    """What the first start decided, and where the broker listened last."""

    trust_domain: str
    ca: CaKind
    address: str = _ANY_PORT
    bootstrap_address: str = _ANY_PORT
    http_address: str = _ANY_PORT

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read them; None where there are none yet.

        Raises:
            DevDirectoryUnusable: the file is there and is not what we write.
        """
        try:
            found = json.loads(path.read_text())
            return cls(
                trust_domain=str(found["trust_domain"]),
                ca=CaKind(found["ca"]),
                address=str(found["address"]),
                bootstrap_address=str(found["bootstrap_address"]),
                http_address=str(found["http_address"]),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DevDirectoryUnusable(
                f'"{path}" is not what idb dev writes',
                hint="start over with an empty directory",
            ) from exc

    def on_free_ports(self) -> Self:
        """The same, listening wherever there is room."""
        return replace(self, address=_ANY_PORT, bootstrap_address=_ANY_PORT, http_address=_ANY_PORT)

    def with_http_port(self) -> Self:
        """The same, with a port for HTTP: certificates name it before anybody listens there."""
        if self.http_address != _ANY_PORT:
            return self
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return replace(self, http_address=f"127.0.0.1:{probe.getsockname()[1]}")


class DevDirectory:
    """A directory that this process holds. A context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: int | None = None
        self._runtime: Path | None = None

    @property
    def broker_config(self) -> Path:
        """The broker's configuration, written at every start."""
        return self.path / "broker.toml"

    @property
    def broker_log(self) -> Path:
        """What the broker logs."""
        return self.path / "broker.log"

    @property
    def broker_data(self) -> Path:
        """The broker's own directory."""
        return self.path / "broker"

    @property
    def agent_config(self) -> Path:
        """The agent's configuration, written at every start."""
        return self.path / "agent.toml"

    @property
    def agent_log(self) -> Path:
        """What the agent logs."""
        return self.path / "agent.log"

    @property
    def agent_data(self) -> Path:
        """The agent's own directory."""
        return self.path / "agent"

    @property
    def agent_token(self) -> Path:
        """The agent's join token: new at every start, good for one use within minutes."""
        return self.path / "agent.token"

    @property
    def openbao(self) -> Path:
        """OpenBao's own directory."""
        return self.path / "openbao"

    @property
    def role_id_file(self) -> Path:
        """The AppRole's role-id; no secret."""
        return self.path / "approle" / "role-id"

    @property
    def wrapped_secret_id_file(self) -> Path:
        """The AppRole's secret-id, wrapped: worth one unwrapping within minutes."""
        return self.path / "approle" / "wrapped-secret-id"

    def claim(self) -> None:
        """Hold the directory, making it when it is not there.

        Raises:
            DevRunning: another process holds it.
            DevDirectoryUnusable: it cannot be made or written, or holds something else.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_foreign()
            self.path.chmod(0o711)
            for part in (self.broker_data, self.agent_data, self.role_id_file.parent):
                part.mkdir(mode=0o700, exist_ok=True)
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise DevDirectoryUnusable(
                f'"{self.path}" cannot be used: {(exc.strerror or "unknown reason").lower()}',
                hint="choose another one with --dir",
            ) from exc
        self._lock = lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip() or "unknown"
            self.release()
            raise DevRunning(
                f'an idb dev (pid {pid}) already runs in "{self.path}"',
                hint=f"use it: idb --dir {self.path} …; stop it: kill {pid}",
            ) from exc
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        # Whatever an ended process left: nothing is ready until we say so.
        (self.path / FILE_NAME).unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of it. Idempotent."""
        if self._runtime is not None:
            shutil.rmtree(self._runtime, ignore_errors=True)
            self._runtime = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def settle(self, trust_domain: str | None, ca: CaKind | None) -> DevSettings:
        """What this run is made of: as decided before, or as asked for now.

        Raises:
            DevDirectoryUnusable: something else was decided before.
        """
        stored = DevSettings.load(self.path / _SETTINGS)
        if stored is None:
            settings = DevSettings(trust_domain or "dev.example.org", ca or CaKind.OPENBAO)
            self._store(settings)
            return settings
        asked = ((trust_domain, stored.trust_domain, "--trust-domain"), (ca, stored.ca, "--ca"))
        for wanted, decided, option in asked:
            if wanted is not None and wanted != decided:
                raise DevDirectoryUnusable(
                    f'"{self.path}" was made with {option} {decided}',
                    hint=f"leave {option} out, or choose another --dir",
                )
        return DevSettings(
            stored.trust_domain,
            stored.ca,
            *map(_if_free, (stored.address, stored.bootstrap_address, stored.http_address)),
        )

    def remember(self, settings: DevSettings, bound: BrokerAddresses) -> None:
        """Keep where the broker listens for the next start."""
        self._store(
            DevSettings(
                settings.trust_domain,
                settings.ca,
                bound.address,
                bound.bootstrap_address,
                bound.http_address,
            )
        )

    def admin_socket(self) -> Path:
        """Where the broker's admin socket goes: here, or where its path is short enough."""
        path = self.broker_data / "admin.sock"
        return path if _fits(path) else self._elsewhere("broker", 0o700) / "admin.sock"

    def agent_sockets(self) -> Path:
        """Where the agent's sockets go: a directory that every user may pass through."""
        path = self.path / "run"
        return path if _fits(path / "workload.sock") else self._elsewhere("agent", 0o755)

    def _elsewhere(self, part: str, mode: int) -> Path:
        if self._runtime is None:
            self._runtime = Path(tempfile.mkdtemp(prefix="idb-dev-"))
            self._runtime.chmod(0o711)
        path = self._runtime / part
        path.mkdir(exist_ok=True)
        path.chmod(mode)
        return path

    def _store(self, settings: DevSettings) -> None:
        document = {
            "trust_domain": settings.trust_domain,
            "ca": settings.ca.value,
            "address": settings.address,
            "bootstrap_address": settings.bootstrap_address,
            "http_address": settings.http_address,
        }
        write_private(self.path / _SETTINGS, json.dumps(document, indent=2) + "\n")

    def _refuse_foreign(self) -> None:
        names = {item.name for item in self.path.iterdir()}
        if names and not names & {_SETTINGS, _LOCK}:
            raise DevDirectoryUnusable(
                f'"{self.path}" holds other things', hint="choose an empty or a new directory"
            )

    def __enter__(self) -> Self:
        self.claim()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH


def _if_free(address: str) -> str:
    """The address where its port is free, else any port."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return _ANY_PORT
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the listeners do: what is left of closed connections does not hold the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, OverflowError):
            return _ANY_PORT
    return address
