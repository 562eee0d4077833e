"""A signing authority ends: the broker, its machines and their workloads go on with another."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from identity_api.broker.v1 import authority_pb2, entry_pb2, types_pb2
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.spiffe_id import TrustDomain
from support.agent import agent_settings, running_agent
from support.line import RunningBroker, reason_of, running, settings_in
from support.machines import MachineCa, client_half
from support.node import machine_broker

ME = [types_pb2.Selector(type="unix", value=f"uid:{os.getuid()}")]


async def active(broker: RunningBroker) -> str:
    """The id of the X.509 authority that signs."""
    answer = await (await broker.authorities()).List(authority_pb2.ListAuthoritiesRequest())
    [found] = [
        authority.id
        for authority in answer.authorities
        if authority.state == authority_pb2.AUTHORITY_STATE_ACTIVE
        and authority.kind == authority_pb2.AUTHORITY_KIND_X509
    ]
    return str(found)


def authority_of(leaf: x509.Certificate) -> str:
    """The authority that a certificate says signed it."""
    found = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    return (found.key_identifier or b"").hex()


async def test_the_broker_serves_with_the_new_authority_at_once(tmp_path: Path) -> None:
    async with running(settings_in(tmp_path / "idb", ca={"key_manager": "memory"})) as broker:
        node = await broker.join("web-1")
        await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
        first = await active(broker)
        await broker.revoke(authority=first, reason=2)
        second = await active(broker)
        assert second != first
        pem = broker.bundle_pem.decode()
        assert pem.count("BEGIN CERTIFICATE") == 1
        host, _, port = broker.addresses.bootstrap_address.rpartition(":")
        served = ssl.get_server_certificate((host, int(port)))
        assert authority_of(x509.load_pem_x509_certificate(served.encode())) == second
        # Who holds an SVID of the old one is nobody any more, on an open connection too.
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await node.entries.ListAuthorized(entry_pb2.ListAuthorizedRequest())
        assert reason_of(refused.value) == "UNAUTHENTICATED"
        again = await broker.join("web-2")
        leaf = x509.load_der_x509_certificate(again.svid.cert_chain[0])
        assert authority_of(leaf) == second


async def test_a_machine_and_its_workloads_go_on_with_the_new_authority(
    open_directory: Path,
) -> None:
    machines = MachineCa()
    key, certificate = machines.machine()
    async with machine_broker(open_directory, machines) as broker:
        directory = open_directory / "agent"
        directory.mkdir()
        client_half(directory, key, certificate)
        node: dict[str, Any] = {
            "join_token_file": None,
            "cert_file": str(directory / "machine.pem"),
            "key_file": str(directory / "machine.key"),
        }
        settings = agent_settings(broker, directory, token="", node=node)
        async with running_agent(broker, directory, settings=settings) as agent:
            node_id = agent.agent.report().node_id
            await broker.entry("/web", "", parent_id=node_id, selectors=ME)
            await agent.until(lambda: agent.agent.report().x509_svids == 1)
            first = await active(broker)
            await broker.revoke(authority=first, reason=2)
            second = await active(broker)

            async def renewed() -> bool:
                try:
                    answer = await agent.fetch_x509()
                except grpc.RpcError:
                    return False
                leaf = x509.load_der_x509_certificate(answer.svids[0].x509_svid)
                if authority_of(leaf) != second:
                    return False
                bundle = TrustBundle(
                    trust_domain=TrustDomain.parse("example.org"),
                    x509_authorities=(answer.svids[0].bundle,),
                    jwt_keys=(),
                )
                verify_x509_svid(
                    [answer.svids[0].x509_svid], bundle=bundle, now=agent.agent._clock.now()
                )
                return True

            async with asyncio.timeout(40):
                while not await renewed():
                    await asyncio.sleep(0.2)
            assert agent.agent.report().node_id == node_id
