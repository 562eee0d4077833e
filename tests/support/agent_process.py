"""`idb agent run` as a process of its own, to be stopped, killed, starved and told wrong times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from identity_broker.dev.lifeline import tied_to_parent
from support.broker import Ran, run_idb
from support.line import TRUST_DOMAIN, RunningBroker

START_SECONDS = 60.0
_pause = threading.Event()


@dataclass
class AgentProcess:
    """A running agent."""

    process: subprocess.Popen[bytes]
    workload_api: str
    admin_socket: str
    log_file: Path

    @property
    def socket(self) -> str:
        """The Workload API's path."""
        return self.workload_api.removeprefix("unix://")

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def status(self) -> Any:
        """`idb agent status`."""
        return self.idb("agent", "status", "-o", "json").json

    def idb(self, *arguments: str) -> Ran:
        """Run `idb` about this agent."""
        return run_idb(*arguments, env={"IDB_AGENT_SOCKET": self.admin_socket})

    def end(self, number: signal.Signals = signal.SIGTERM, timeout: float = 20.0) -> int:
        """Signal it and wait for its end; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout)


def write_config(directory: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """A configuration file; strings, numbers, booleans and lists are written as JSON, like TOML."""
    lines = []
    for table, values in tables.items():
        lines.append(f"[{table}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = directory / "agent.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def config_for(
    broker: RunningBroker, directory: Path, *, token: str, keeps: bool = True, **tables: Any
) -> Path:
    """A configuration for `broker`, with a token in a file.

    Args:
        keeps: whether the node's key is kept on disk.
    """
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    token_file = directory / "token"
    token_file.write_text(token)
    merged: dict[str, dict[str, Any]] = {
        "agent": {
            "trust_domain": TRUST_DOMAIN,
            "runtime_dir": str(directory / "run"),
            "drain_timeout": "1s",
        },
        "broker": {
            "address": broker.addresses.address,
            "bootstrap_address": broker.addresses.bootstrap_address,
        },
        "trust": {"bundle_file": str(broker.settings.server.bundle_file)},
        "node": {"join_token_file": str(token_file)},
    }
    if keeps:
        merged["agent"]["data_dir"] = str(directory / "data")
    for name, table in tables.items():
        merged[name] = {**merged.get(name, {}), **table}
    return write_config(directory, merged)


@contextmanager
def agent_process(
    config: Path,
    *,
    prefix: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Iterator[AgentProcess]:
    """`idb agent run`, ready; killed on the way out if the test has not ended it.

    Args:
        prefix: words before the command ("prlimit", "--fsize=100").
        env: variables beside the usual ones.
    """
    log_file = config.with_suffix(".log")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("IDB_")}
    read_end, write_end = os.pipe()
    # The log through a pipe and not to a file: a limit on the size of files is not about it.
    process = subprocess.Popen(
        [
            *prefix,
            *(sys.executable, "-m", "identity_broker.cli.main", "agent", "run"),
            *("--config", str(config), "-o", "json"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=write_end,
        env={**clean, **(env or {})},
        preexec_fn=tied_to_parent(),  # noqa: PLW1509 - does nothing but prctl
    )
    os.close(write_end)
    copying = threading.Thread(target=_copy, args=(read_end, log_file), daemon=True)
    copying.start()
    try:
        bound = _first_line(process, log_file)
        yield AgentProcess(process, bound["workload_api"], bound["admin_socket"], log_file)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(15)
        if process.stdout is not None:
            process.stdout.close()
        copying.join(15)


def _copy(descriptor: int, path: Path) -> None:
    with os.fdopen(descriptor, "rb", buffering=0) as source, path.open("ab", buffering=0) as sink:
        while chunk := source.read(65536):
            sink.write(chunk)


def _first_line(process: subprocess.Popen[bytes], log_file: Path) -> dict[str, str]:
    assert process.stdout is not None
    late = threading.Timer(START_SECONDS, process.kill)
    late.start()
    try:
        line = process.stdout.readline()
    finally:
        late.cancel()
    if not line:
        process.wait(15)
        _pause.wait(0.2)
        raise AssertionError(f"the agent did not start:\n{log_file.read_text()}")
    bound: dict[str, str] = json.loads(line)
    return bound


def wait_until(holds: Any, seconds: float = 30.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        _pause.wait(0.05)
