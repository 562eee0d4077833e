"""What a node keeps over a restart, and what becomes of it when it cannot."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from identity_api.broker.v1 import bundle_pb2
from identity_client.attestation import JoinTokenAttestor
from identity_client.errors import BrokerUnavailable
from identity_client.node import NodePhase
from support.client import due_now, until
from support.line import RunningBroker, node_id, running, settings_in
from support.node import attested, fixed, kept_node, node_settings

TABLES: dict[str, Any] = {"ca": {"key_manager": "memory"}}


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """SQLite and keys in memory: what the broker stands on makes no difference to its nodes."""
    async with running(settings_in(tmp_path / "idb", **TABLES)) as running_one:
        yield running_one


async def test_a_full_disk_stops_nothing_and_is_told(
    broker: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    state = tmp_path / "state"
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")), state_dir=state)
    async with kept_node(settings) as keeper:
        await attested(keeper)
        await until(lambda: keeper.status.state_problem != "")
        assert "No space left on device" in keeper.status.state_problem
        assert keeper.status.last_error is None
        assert not (state / "node.json").exists()
        monkeypatch.undo()
        due_now(keeper)
        await until(lambda: keeper.status.state_problem == "")
        serial = keeper.serial
    async with kept_node(replace(settings, attestor=JoinTokenAttestor("idbt_spent"))) as again:
        assert again.serial == serial
        await until(lambda: again.serial not in ("", serial))


async def test_a_disk_that_is_full_from_the_start_stops_nothing(
    broker: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    state = tmp_path / "state"
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")), state_dir=state)
    async with kept_node(settings) as keeper:
        await attested(keeper)
        assert "No space left" in keeper.status.state_problem
        monkeypatch.undo()
        keeper._wake.set()
        await until(lambda: keeper.status.state_problem == "")
        assert (state / "node.json").stat().st_mode & 0o777 == 0o600


NODE_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from identity_client.attestation import JoinTokenAttestor
from identity_client.node import NodeKeeper, NodeSettings

async def main():
    address, bootstrap, bundle, token, state = sys.argv[1:]
    keeper = NodeKeeper(NodeSettings(
        address=address, bootstrap_address=bootstrap, trust_domain="example.org",
        attestor=JoinTokenAttestor(token), anchors=Path(bundle).read_bytes, state_dir=Path(state)))
    await keeper.start()
    await keeper.attested()
    while not (Path(state) / "node.json").exists():
        await asyncio.sleep(0.01)
    print(keeper.serial, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_killed_it_starts_again_without_a_new_token(
    broker: RunningBroker, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    token = await broker.token("n1")
    arguments = [
        broker.addresses.address,
        broker.addresses.bootstrap_address,
        str(broker.settings.server.bundle_file),
        token,
        str(state),
    ]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", NODE_PROGRAM, *arguments, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        serial = (await process.stdout.readline()).decode().strip()
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert token not in (state / "node.json").read_text()
    settings = node_settings(broker, JoinTokenAttestor(token), state_dir=state)
    async with kept_node(settings) as keeper:
        assert keeper.serial == serial
        assert keeper.status.phase is NodePhase.ATTESTED
        await until(lambda: keeper.serial != serial)
        assert keeper.status.last_error is None


async def test_what_was_kept_is_used_though_the_broker_and_the_anchors_are_away(
    tmp_path: Path,
) -> None:
    tables: dict[str, Any] = {"ca": {"key_manager": "file"}}
    state = tmp_path / "state"
    async with running(settings_in(tmp_path / "idb", **tables)) as broker:
        token = JoinTokenAttestor(await broker.token("n1"))
        settings = node_settings(broker, token, state_dir=state)
        async with kept_node(settings) as keeper:
            serial = await attested(keeper)
            await until((state / "node.json").exists)

    def away() -> bytes:
        raise BrokerUnavailable("the bundle's address does not answer")

    async with kept_node(replace(settings, anchors=away)) as keeper:
        assert keeper.status.phase is NodePhase.ATTESTED
        assert keeper.serial == serial
        await until(lambda: keeper.status.last_error is not None)
        assert keeper.status.phase is NodePhase.ATTESTED
        async with running(settings_in(tmp_path / "idb", server=fixed(broker), **tables)):
            await until(lambda: keeper.serial != serial, 20)


async def test_a_kept_svid_that_nobody_accepts_any_more_is_no_damage(
    broker: RunningBroker, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    settings = node_settings(broker, JoinTokenAttestor(await broker.token("n1")), state_dir=state)
    async with kept_node(settings) as keeper:
        await attested(keeper)
        await until((state / "node.json").exists)
        # The authority that signed the node's SVID has left the bundle meanwhile.
        bundle = (await keeper.ask(lambda link: link.get_bundle())).__deepcopy__()
        async with running(settings_in(tmp_path / "other", **TABLES)) as other:
            foreign = await (await other.bundles()).Get(bundle_pb2.GetBundleRequest())
        bundle.x509_authorities[:] = foreign.bundle.x509_authorities
        keeper._trust.message = bundle.SerializeToString()
        keeper._unsaved = True
        keeper._wake.set()
        await until(lambda: not keeper._unsaved)
        await asyncio.sleep(0.2)
    token = JoinTokenAttestor(await broker.token("n2"))
    async with kept_node(replace(settings, attestor=token)) as again:
        await attested(again)
        assert again.status.node_id == node_id("n2")
