"""Which broker is meant, and the client that talks to it.

- What is written on the command line wins over the environment: --address, --socket, --dir,
  then IDB_ADMIN_SOCKET, IDB_DIR, then a broker that `idb dev` runs in ./.dev.
- Short names are made whole here ("web-1", "x509_pop/<name>", "/payments/api"); whether they are
  SPIFFE IDs is the broker's to say.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from identity_broker.cli.errors import NoAgentNamed, NoBrokerNamed, UsageRefused
from identity_broker.cli.options import Invocation
from identity_broker.dev.state import FILE_NAME, AgentAddresses, DevState

if TYPE_CHECKING:
    from identity_client.admin import AdminClient, Target

DEFAULT_DIR = Path(".dev")


def target_of(invocation: Invocation) -> Target:
    """Where the broker that is meant is administered.

    Raises:
        NoBrokerNamed: nothing names one.
        UsageRefused: --address without its files.
        DevNotRunning: no `idb dev` runs in the directory named.
    """
    from identity_client.admin import MtlsTarget, UnixTarget

    if invocation.address:
        if not (invocation.cert and invocation.key and invocation.bundle):
            raise UsageRefused(
                "--address needs --cert, --key and --bundle as well",
                hint="an admin's SVID comes from an entry made with --admin; on the broker's own "
                "machine --socket needs no certificate",
            )
        return MtlsTarget(invocation.address, invocation.cert, invocation.key, invocation.bundle)
    if invocation.socket:
        return UnixTarget(invocation.socket)
    if invocation.dir is None and (socket := os.environ.get("IDB_ADMIN_SOCKET")):
        return UnixTarget(Path(socket))
    return UnixTarget(Path(dev_state(invocation).broker.admin_socket))


def dev_state(invocation: Invocation) -> DevState:
    """What `idb dev` runs in the directory that is meant.

    Raises:
        NoBrokerNamed: no directory is named, and none runs in ./.dev.
        DevNotRunning: none runs in the directory named.
    """
    named = invocation.dir or (Path(text) if (text := os.environ.get("IDB_DIR")) else None)
    if named is None and not (DEFAULT_DIR / FILE_NAME).exists():
        raise NoBrokerNamed
    return DevState.load(named or DEFAULT_DIR)


def dev_agent(invocation: Invocation) -> AgentAddresses | None:
    """The node agent of the `idb dev` that is meant; None where that is another broker, or none.

    Raises:
        DevNotRunning: no `idb dev` runs in the directory named.
    """
    if invocation.address or invocation.socket:
        return None
    if invocation.dir is None and os.environ.get("IDB_ADMIN_SOCKET"):
        return None
    return dev_state(invocation).agent


def agent_socket(invocation: Invocation) -> Path:
    """The admin socket of the node agent that is meant.

    --socket, --dir, then IDB_AGENT_SOCKET, IDB_DIR, an agent that `idb dev` runs in ./.dev, and
    the place where an agent of this machine listens.

    Raises:
        NoAgentNamed: nothing names one.
        DevNotRunning: no `idb dev` runs in the directory named.
    """
    from identity_broker.config.agent_settings import DEFAULT_RUNTIME_DIR

    if invocation.socket:
        return invocation.socket
    if invocation.dir is None and (socket := os.environ.get("IDB_AGENT_SOCKET")):
        return Path(socket)
    if invocation.dir or os.environ.get("IDB_DIR") or (DEFAULT_DIR / FILE_NAME).exists():
        agent = dev_state(invocation).agent
        if agent is None:
            raise NoAgentNamed("that idb dev runs no node agent")
        return Path(agent.admin_socket)
    usual = DEFAULT_RUNTIME_DIR / "agent.sock"
    if not usual.exists():
        raise NoAgentNamed
    return usual


class Session:
    """An admin client for the length of a command, and the short names its arguments may use."""

    def __init__(self, client: AdminClient) -> None:
        self.admin = client

    @classmethod
    def open(cls, invocation: Invocation) -> Self:
        """Connect to the broker that is meant."""
        from identity_client.admin import AdminClient

        return cls(AdminClient(target_of(invocation)))

    @cached_property
    def trust_domain(self) -> str:
        """The broker's trust domain."""
        return self.admin.bundle().trust_domain

    def spiffe_id(self, text: str) -> str:
        """A SPIFFE ID, or a path in the broker's trust domain made one."""
        if text.startswith("/"):
            return f"spiffe://{self.trust_domain}{text}"
        return text

    def node_id(self, text: str) -> str:
        """A node's SPIFFE ID from "NAME" (join token), "ATTESTOR/NAME", a path or itself."""
        if ":" in text or text.startswith("/"):
            return self.spiffe_id(text)
        name = text if "/" in text else f"join_token/{text}"
        return f"spiffe://{self.trust_domain}/idb/node/{name}"

    def parent_id(self, text: str) -> str:
        """As `node_id`; "broker" is the broker itself, the parent of node groups."""
        if text == "broker":
            return f"spiffe://{self.trust_domain}/idb/broker"
        return self.node_id(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.admin.close()
