"""The line with OpenBao behind it, and what happens when OpenBao fails."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.line import RunningBroker, openbao_settings, running
from support.openbao import Fault, FaultProxy, VaultSite


async def _ready(broker: RunningBroker) -> tuple[int, dict[str, Any]]:
    def ask() -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(
                f"http://{broker.addresses.http_address}/readyz", timeout=10
            ) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as refused:
            return refused.code, json.load(refused)

    return await asyncio.to_thread(ask)


async def _until_ready(broker: RunningBroker, status: int) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found, body = await _ready(broker)
            if found == status:
                return body
            await asyncio.sleep(0.2)


async def test_keys_in_transit_below_a_root_in_pki(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy
) -> None:
    settings = openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    async with running(settings) as broker:
        authorities = await broker.authorities()
        from identity_api.broker.v1 import authority_pb2

        listed = (await authorities.List(authority_pb2.ListAuthoritiesRequest())).authorities
        assert {item.key_id.partition(":")[0] for item in listed} == {"transit"}
        assert {item.upstream for item in listed} == {"vault_pki", "none"}
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        answers = await asyncio.gather(*(node.issue(entry.id) for _ in range(40)))
        assert {answer.status.code for answer in answers} == {0}
        recorded = await broker.ledger(spiffe_id="spiffe://example.org/payments/api")
        assert {item.id for item in recorded} == {answer.svid.serial for answer in answers}
        # The chain has our intermediate; the root stays in the bundle.
        assert len(answers[0].svid.cert_chain) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault(match="/sign/", status=503, errors=("Vault is sealed",)),
        Fault(match="/sign/", status=500, errors=("internal error",)),
        Fault(match="/sign/", status=429, errors=("rate limit quota exceeded",)),
        Fault(match="/sign/", delay=6.0),
        Fault(match="/sign/", reset=True),
        None,  # gone altogether
    ],
    ids=["sealed", "500", "429", "slow", "reset", "gone"],
)
async def test_transit_away_fails_fast_and_recovers_by_itself(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy, fault: Fault | None
) -> None:
    settings = openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        assert (await node.issue(entry.id)).status.code == 0
        if fault is None:
            fault_proxy.stop()
        else:
            fault_proxy.inject(fault)
        started = time.monotonic()
        refused = (await node.issue(entry.id)).status
        assert time.monotonic() - started < 5.0
        assert refused.reason == "SIGNING_BACKEND_UNAVAILABLE"
        assert refused.retry_after_seconds >= 1
        assert "hvac" not in refused.message
        if fault is None:
            fault_proxy.start()
        else:
            fault_proxy.clear()
        async with asyncio.timeout(20):
            while (await node.issue(entry.id)).status.code != 0:
                await asyncio.sleep(0.2)


async def test_readiness_names_the_dependency_that_is_away(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy
) -> None:
    settings = openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    async with running(settings) as broker:
        await _until_ready(broker, 200)
        signed_before = [path for path in fault_proxy.paths() if "/sign/" in path]
        fault_proxy.inject(Fault(status=503, errors=("Vault is sealed",)))
        body = await _until_ready(broker, 503)
        down = {name for name, state in body["dependencies"].items() if not state["ready"]}
        assert down == {"signing_backend"}
        fault_proxy.clear()
        await _until_ready(broker, 200)
        assert signed_before == [path for path in fault_proxy.paths() if "/sign/" in path]


async def test_an_intermediate_in_memory_goes_on_without_openbao(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy
) -> None:
    settings = openbao_settings(
        tmp_path / "idb", vault_site, fault_proxy.address, ca={"key_manager": "memory"}
    )
    async with running(settings) as broker:
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
        fault_proxy.stop()
        for _ in range(5):
            assert (await node.issue(entry.id)).status.code == 0
        assert (await _ready(broker))[0] == 200
        fault_proxy.start()


async def test_a_restart_finds_its_keys_in_transit(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy
) -> None:
    async with running(
        openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    ) as broker:
        before = broker.bundle_pem
        node = await broker.join("web-1")
        entry = await broker.entry("/payments/api", "web-1")
    async with running(
        openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    ) as broker:
        assert broker.bundle_pem == before
        channel = await broker.mtls(node.key, node.svid)
        node.channel = channel
        assert (await node.issue(entry.id)).status.code == 0


async def test_without_openbao_a_broker_says_so_and_does_not_start(
    tmp_path: Path, vault_site: VaultSite, fault_proxy: FaultProxy
) -> None:
    from identity_broker.errors import SigningBackendUnavailable

    settings = openbao_settings(tmp_path / "idb", vault_site, fault_proxy.address)
    fault_proxy.stop()
    with pytest.raises(SigningBackendUnavailable):
        async with running(settings):
            pass
