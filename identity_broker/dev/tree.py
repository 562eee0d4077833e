"""`idb dev`: one process tree on loopback, a real OpenBao, a broker that signs with it, an agent.

- Order: claim the directory → OpenBao → provision → broker → agent → dev.json. Stopping is the
  reverse.
- dev.json is there exactly while everything answers.
- When a part ends by itself, the rest is stopped, and the failure says which and why.
- SIGTERM, SIGINT and SIGHUP end all of it within ten seconds; no child outlives this process.
- The broker gets the least-privilege AppRole, its secret-id wrapped and new at every start;
  OpenBao's root token never reaches it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from identity_broker.dev.child_process import ChildProcess
from identity_broker.dev.directory import CaKind, DevDirectory, DevSettings
from identity_broker.dev.errors import DevChildEnded
from identity_broker.dev.lifeline import tied_to_parent
from identity_broker.dev.openbao import EmbeddedOpenBao
from identity_broker.dev.state import (
    FILE_NAME,
    AgentAddresses,
    BrokerAddresses,
    DevState,
    write_private,
)

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_WATCH_SECONDS = 0.5
_JOIN_SECONDS = 20.0
_JOIN_PAUSE = 0.02
_AGENT_NODE = "dev-agent"
_PORT_TAKEN = "cannot listen on"

Say = Callable[[str], None]


class DevTree:
    """The processes of one `idb dev`.

    Args:
        path: the directory everything is kept in.
        trust_domain: None takes the directory's own, or "dev.example.org".
        ca: None takes the directory's own, or OpenBao.
        say: told each step as it is done.
    """

    def __init__(
        self, path: Path, *, trust_domain: str | None, ca: CaKind | None, say: Say
    ) -> None:
        self._directory = DevDirectory(path)
        self._trust_domain = trust_domain
        self._ca = ca
        self._say = say
        self._openbao: EmbeddedOpenBao | None = None
        self._broker = ChildProcess(
            "server", "broker", self._directory.broker_config, self._directory.broker_log
        )
        self._agent = ChildProcess(
            "agent", "agent", self._directory.agent_config, self._directory.agent_log
        )

    def run(self, on_ready: Callable[[DevState], None]) -> None:
        """Start everything, call `on_ready`, and return when a signal ended all of it.

        Raises:
            DevRunning, DevDirectoryUnusable: the directory cannot be had.
            DevChildEnded: a part did not start, or ended by itself.
            ConfigError, SigningBackendUnavailable: OpenBao did not come up.
        """
        with _signals() as stopped:
            try:
                with self._directory:
                    try:
                        on_ready(self._start(stopped))
                        self._watch(stopped)
                    finally:
                        self._stop()
            except _Stopped:
                self._say("stopped")

    def _start(self, stopped: _StopSignal) -> DevState:
        settings = self._directory.settle(self._trust_domain, self._ca)
        if settings.ca is CaKind.OPENBAO:
            self._start_openbao(stopped)
        started = time.monotonic()
        bundle_file = self._directory.broker_data / "bundle.pem"
        try:
            bound = self._start_broker(settings, bundle_file, stopped)
        except DevChildEnded as failed:
            if not any(_PORT_TAKEN in line for line in failed.fields.get("problems", ())):
                raise
            # Free when it was looked at, and taken since: the ports are the least of what resumes.
            settings = settings.on_free_ports()
            bound = self._start_broker(settings, bundle_file, stopped)
        self._directory.remember(settings, bound)
        self._say(f"broker ready in {time.monotonic() - started:.1f} s")
        started = time.monotonic()
        workload_api, agent = self._start_agent(settings, bound, bundle_file, stopped)
        self._say(f"agent ready in {time.monotonic() - started:.1f} s, {workload_api}")
        state = DevState(
            trust_domain=settings.trust_domain,
            broker=bound,
            openbao_address=self._openbao.address if self._openbao else "",
            bundle_file=str(bundle_file),
            pid=os.getpid(),
            workload_api=workload_api,
            agent=agent,
        )
        stopped.check()
        state.write(self._directory.path)
        return state

    def _start_broker(
        self, settings: DevSettings, bundle_file: Path, stopped: _StopSignal
    ) -> BrokerAddresses:
        # A wrapped secret-id works once: every start gets one of its own.
        openbao = self._provision(settings, stopped) if self._openbao is not None else {}
        socket_path = self._directory.admin_socket()
        settings = settings.with_http_port()
        config = _broker_config(settings, self._directory, socket_path, bundle_file, openbao)
        write_private(self._directory.broker_config, to_toml(config))
        return BrokerAddresses(**self._broker.start(on_wait=stopped.check))

    def _start_agent(
        self,
        settings: DevSettings,
        broker: BrokerAddresses,
        bundle_file: Path,
        stopped: _StopSignal,
    ) -> tuple[str, AgentAddresses]:
        """Start the agent and wait until it is a node; return its Workload API's address."""
        from identity_client.admin import AdminClient, UnixTarget  # noqa: PLC0415 - loads gRPC

        with AdminClient(UnixTarget(Path(broker.admin_socket))) as admin:
            # Spent only when the agent's directory holds no node any more.
            token = admin.nodes.create_join_token(node_name=_AGENT_NODE)
        write_private(self._directory.agent_token, token.token + "\n")
        config = _agent_config(settings, self._directory, broker, bundle_file)
        write_private(self._directory.agent_config, to_toml(config))
        said = self._agent.start(on_wait=stopped.check)
        self._wait_for_node(Path(said["admin_socket"]), stopped)
        return said["workload_api"], AgentAddresses(said["admin_socket"], token.node_id)

    def _wait_for_node(self, agent_socket: Path, stopped: _StopSignal) -> None:
        """Return when the agent is in step with the broker.

        Raises:
            DevChildEnded: it is not within a while, or it ended.
        """
        from identity_client.agent_client import AgentClient  # noqa: PLC0415 - loads gRPC

        until = time.monotonic() + _JOIN_SECONDS
        with AgentClient(agent_socket) as client:
            while True:
                status = client.status()
                if status.connected and status.node_id:
                    return
                ended = self._agent.ended()
                if ended is not None:
                    raise ended
                if time.monotonic() > until:
                    raise DevChildEnded(
                        f"the agent was not in step with the broker within {_JOIN_SECONDS:.0f} s",
                        hint=f"its log: {self._directory.agent_log}",
                        problems=status.problems,
                    )
                stopped.wait(_JOIN_PAUSE)

    def _start_openbao(self, stopped: _StopSignal) -> None:
        started = time.monotonic()
        self._openbao = EmbeddedOpenBao(self._directory.openbao, before_exec=tied_to_parent())
        self._openbao.start()
        self._say(f"OpenBao ready in {time.monotonic() - started:.1f} s, {self._openbao.address}")
        stopped.check()

    def _provision(self, settings: DevSettings, stopped: _StopSignal) -> Mapping[str, Any]:
        from identity_ca.backends.vault.provision import (  # noqa: PLC0415 - not with --ca local
            admin_client,
            provision,
        )
        from identity_ca.spiffe_id import TrustDomain  # noqa: PLC0415 - as above

        if self._openbao is None:
            return {}
        made = provision(
            admin_client(self._openbao.address, self._openbao.root_token),
            trust_domain=TrustDomain.parse(settings.trust_domain),
        )
        write_private(self._directory.role_id_file, made.role_id)
        write_private(self._directory.wrapped_secret_id_file, made.wrapped_secret_id)
        for change in made.changes:
            self._say(f"  {change}")
        stopped.check()
        return {
            "address": self._openbao.address,
            "auth": "approle",
            "role_id_file": str(self._directory.role_id_file),
            "wrapped_secret_id_file": str(self._directory.wrapped_secret_id_file),
        }

    def _watch(self, stopped: _StopSignal) -> None:
        while True:
            stopped.wait(_WATCH_SECONDS)
            ended = self._broker.ended() or self._agent.ended()
            if ended is not None:
                raise ended
            if self._openbao is not None and self._openbao.pid is None:
                raise DevChildEnded("OpenBao ended", hint=f"its log: {self._openbao.log_file}")

    def _stop(self) -> None:
        """Who needs somebody goes first: the agent needs the broker, the broker OpenBao."""
        (self._directory.path / FILE_NAME).unlink(missing_ok=True)
        self._agent.stop()
        self._broker.stop()
        if self._openbao is not None:
            self._openbao.stop()


class _Stopped(BaseException):
    """A signal asked for the end; not an Exception, so that nothing takes it for a failure."""


class _StopSignal:
    """Whether a signal asked for the end, and a wait that it cuts short."""

    def __init__(self, wake: socket.socket) -> None:
        self._wake = wake
        self.asked = False

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; the wake-up socket has been written to by the interpreter."""
        self.asked = True

    def check(self) -> None:
        """Raise when the end was asked for."""
        if self.asked:
            raise _Stopped

    def wait(self, seconds: float) -> None:
        """Wait for a signal or the time; raise when the end was asked for."""
        if select.select([self._wake], [], [], seconds)[0]:
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(64)
        self.check()


@contextlib.contextmanager
def _signals() -> Iterator[_StopSignal]:
    """Turn the signals that end us, and a child's end, into something to wait for."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    stopped = _StopSignal(reader)
    before_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, stopped.receive) for number in _STOP_SIGNALS}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_wakeup)
        reader.close()
        writer.close()


def _broker_config(
    settings: DevSettings,
    directory: DevDirectory,
    socket_path: Path,
    bundle_file: Path,
    openbao: Mapping[str, Any],
) -> Mapping[str, Mapping[str, Any]]:
    with_openbao = bool(openbao)
    config: dict[str, Mapping[str, Any]] = {
        "server": {
            "trust_domain": settings.trust_domain,
            "data_dir": str(directory.broker_data),
            "address": settings.address,
            "bootstrap_address": settings.bootstrap_address,
            "http_address": settings.http_address,
            "admin_socket": str(socket_path),
            "bundle_file": str(bundle_file),
            "drain_timeout": "3s",
        },
        "revocation": {"public_url": f"http://{settings.http_address}"},
        # A machine that slept overnight is still a node in the morning.
        "svid": {"node_ttl": "24h"},
        "ca": {
            "key_manager": "transit" if with_openbao else "file",
            "upstream": "vault_pki" if with_openbao else "selfsigned",
        },
    }
    if with_openbao:
        config["openbao"] = openbao
    return config


def _agent_config(
    settings: DevSettings, directory: DevDirectory, broker: BrokerAddresses, bundle_file: Path
) -> Mapping[str, Mapping[str, Any]]:
    return {
        "agent": {
            "trust_domain": settings.trust_domain,
            "data_dir": str(directory.agent_data),
            "runtime_dir": str(directory.agent_sockets()),
            "drain_timeout": "1s",
        },
        "broker": {
            "address": broker.address,
            "bootstrap_address": broker.bootstrap_address,
        },
        "trust": {"bundle_file": str(bundle_file)},
        "node": {"join_token_file": str(directory.agent_token)},
    }


def to_toml(config: Mapping[str, Mapping[str, Any]]) -> str:
    """One table a section; values are texts. A JSON string is a TOML basic string."""
    lines = ["# Written by idb dev at every start; changes are lost."]
    for section, values in config.items():
        lines += ["", f"[{section}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"
