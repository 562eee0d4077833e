"""A node as a test keeps it: its settings for a broker, what it holds, how to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from identity_client.attestation import NodeAttestor
from identity_client.errors import IdentityError
from identity_client.node import (
    NodeKeeper,
    NodePhase,
    NodeSettings,
    SyncedEntry,
    SyncEvent,
    SyncLost,
    SyncPosition,
    SyncUpdate,
    entry_digest,
)
from support.client import until
from support.line import RunningBroker, running, settings_in
from support.machines import MachineCa, client_half


@asynccontextmanager
async def kept_node(settings: NodeSettings, **options: Any) -> AsyncIterator[NodeKeeper]:
    """A node that is kept for as long as the block lasts."""
    keeper = NodeKeeper(settings, **options)
    await keeper.start()
    try:
        yield keeper
    finally:
        await keeper.close()


def node_settings(broker: RunningBroker, attestor: NodeAttestor, **changes: Any) -> NodeSettings:
    values: dict[str, Any] = {
        "address": broker.addresses.address,
        "bootstrap_address": broker.addresses.bootstrap_address,
        "trust_domain": "example.org",
        "attestor": attestor,
        "anchors": broker.settings.server.bundle_file.read_bytes,
        "rpc_timeout": 5.0,
    }
    return NodeSettings(**(values | changes))


def fixed(broker: RunningBroker) -> dict[str, Any]:
    """Where `broker` is, for another one in its place."""
    return {
        "address": broker.addresses.address,
        "bootstrap_address": broker.addresses.bootstrap_address,
    }


@asynccontextmanager
async def machine_broker(
    tmp_path: Path, machines: MachineCa, name: str = "idb", **tables: Any
) -> AsyncIterator[RunningBroker]:
    """A broker that admits the machines of `machines`."""
    ca_file = tmp_path / "machines.pem"
    ca_file.write_bytes(machines.certificate.public_bytes(Encoding.PEM))
    settings = settings_in(
        tmp_path / name,
        **{
            "ca": {"key_manager": "file"},
            "attestors": {"x509_pop": {"ca_bundle_file": str(ca_file)}},
            **tables,
        },
    )
    async with running(settings) as broker:
        yield broker


def machine(tmp_path: Path, machines: MachineCa) -> NodeAttestor:
    return client_half(tmp_path / "machine", *machines.machine())


async def attested(keeper: NodeKeeper) -> str:
    """Waits for the node's SVID; returns its serial number."""
    await until(lambda: keeper.status.phase is NodePhase.ATTESTED, 20)
    return keeper.serial


class Held:
    """What a node holds: applies updates as the protocol says, and checks each digest."""

    def __init__(self) -> None:
        self.entries: dict[str, SyncedEntry] = {}
        self.revision = 0
        self.events: list[SyncEvent] = []
        self.revoked: set[str] = set()

    @property
    def position(self) -> SyncPosition:
        digest = 0
        for one in self.entries.values():
            digest ^= entry_digest(one.id, one.revision)
        return SyncPosition(self.revision, digest)

    def apply(self, update: SyncUpdate) -> None:
        assert update.full or update.previous == self.revision
        if update.full:
            self.entries = {}
        for gone in update.removed_ids:
            self.entries.pop(gone, None)
        self.entries |= {one.id: one for one in update.entries}
        self.revoked |= {one.id for one in update.revocations}
        self.revision = update.revision
        assert self.position.digest == update.entries_digest

    async def run(self, keeper: NodeKeeper, on_loss: Callable[[], None] = lambda: None) -> None:
        async with aclosing(keeper.follow(lambda: self.position)) as events:
            async for event in events:
                self.events.append(event)
                if isinstance(event, SyncLost):
                    on_loss()
                    continue
                self.apply(event)
                await event.ack()

    @property
    def updates(self) -> list[SyncUpdate]:
        return [event for event in self.events if isinstance(event, SyncUpdate)]

    @property
    def losses(self) -> list[IdentityError]:
        return [event.error for event in self.events if isinstance(event, SyncLost)]

    @property
    def reasons(self) -> list[str]:
        return [error.reason for error in self.losses]


@asynccontextmanager
async def followed(keeper: NodeKeeper) -> AsyncIterator[Held]:
    held = Held()
    task = asyncio.create_task(held.run(keeper))
    try:
        yield held
    finally:
        await keeper.close()
        await asyncio.wait_for(task, 10)  # ends by itself; its failure is the test's


def reason_of_node(keeper: NodeKeeper) -> str:
    error = keeper.status.last_error
    return error.reason if error is not None else ""


def present(value: Any) -> Any:
    assert value is not None
    return value
