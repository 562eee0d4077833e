"""From an operator's command to verifiers that refuse: how long.

- Measured from the moment the command has returned, and from the moment it was called; one
  revocation at a time, at random moments. Before it has returned is possible: verifiers are told
  when it commits.
- refused   a real SDK, following the broker, denies the certificate
- first     the first of many simulated verifiers, in another process, has been told
- last      the last of them has
- whole     10,000 credentials of one identity, revoked by its SPIFFE ID: until the command returns
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from bench.agent_site import Admin, Site, spiffe_id
from bench.measured import Spread
from bench.revocation_fleet import Verifiers, verifiers
from identity_api.broker.v1 import revocation_pb2
from identity_client.aio import IdentitySource
from identity_client.attestation import CertificateAttestor
from identity_client.keys import KeyPair
from identity_client.node import IssuedX509, NodeKeeper, NodeSettings, X509Request
from support.line import TRUST_DOMAIN

_BATCH = 500
_PATIENCE_SECONDS = 30.0
_LOOK_SECONDS = 0.0005
_UID = "unix:uid:4242"


@dataclass(frozen=True)
class Spreading:
    """One number of verifiers.

    Attributes:
        verifiers: simulated ones, beside the SDK's.
        connect_seconds: until they had attested and were up to date.
        after_return: what happened → milliseconds after the command had returned.
        after_call: the same, after it was called.
    """

    verifiers: int
    connect_seconds: float
    after_return: dict[str, Spread]
    after_call: dict[str, Spread]


@dataclass(frozen=True)
class Whole:
    """An identity with many credentials, ended by one command."""

    credentials: int
    seconds: float


def measure(place: Site, *, count: int, samples: int) -> Spreading:
    """So many revocations with so many verifiers."""
    with verifiers(place, count) as found:
        return asyncio.run(_spread(place, found, samples))


def measure_whole(place: Site, credentials: int) -> Whole:
    """Issue and revoke so many."""
    return asyncio.run(_whole(place, credentials))


async def _spread(place: Site, found: Verifiers, samples: int) -> Spreading:
    draw = random.Random(1)
    returned: dict[str, list[float]] = {"refused": [], "first": [], "last": []}
    called: dict[str, list[float]] = {"returned": [], "refused": [], "first": [], "last": []}
    async with AsyncExitStack() as resources:
        admin = await resources.enter_async_context(Admin.of(place))
        issuer = await _issuer(place, resources, "spread")
        source = await _verifier(place, admin, resources)
        entry = await admin.create("/bench/revoked", issuer.status.node_id, _UID)
        for _ in range(samples):
            (svid,) = await _issued(issuer, entry.id, 1)
            await asyncio.sleep(draw.uniform(0.02, 0.08))
            watching = asyncio.create_task(_until_denied(source, svid.serial))
            began = time.monotonic()
            await admin.revoke(svid.serial)
            over = time.monotonic()
            first, last = await found.told(svid.serial)
            moments = {"refused": await watching, "first": first, "last": last}
            called["returned"].append(over - began)
            for name, at in moments.items():
                returned[name].append(at - over)
                called[name].append(at - began)
    return Spreading(
        found.connected,
        found.start_seconds,
        {name: Spread.of(taken) for name, taken in returned.items()},
        {name: Spread.of(taken) for name, taken in called.items()},
    )


async def _whole(place: Site, credentials: int) -> Whole:
    async with AsyncExitStack() as resources:
        admin = await resources.enter_async_context(Admin.of(place))
        issuer = await _issuer(place, resources, "whole")
        entry = await admin.create("/bench/whole", issuer.status.node_id, _UID)
        for done in range(0, credentials, _BATCH):
            await _issued(issuer, entry.id, min(_BATCH, credentials - done))
        began = time.perf_counter()
        answer = await admin.revoke_identity(spiffe_id("/bench/whole"))
        seconds = time.perf_counter() - began
        assert answer.revocation.revoked == credentials, answer.revocation
        assert answer.revocation.state != revocation_pb2.REVOCATION_STATE_RUNNING
        return Whole(credentials, seconds)


async def _issuer(place: Site, resources: AsyncExitStack, name: str) -> NodeKeeper:
    """A node that orders what is to be revoked."""
    machine = place.machine(f"{name}-issuer")
    keeper = NodeKeeper(
        NodeSettings(
            address=place.addresses.address,
            bootstrap_address=place.addresses.bootstrap_address,
            trust_domain=TRUST_DOMAIN,
            attestor=_attestor(machine.directory),
            anchors=place.bundle_file.read_bytes,
        ),
        on_change=lambda: None,
    )
    await keeper.start()
    resources.push_async_callback(keeper.close)
    await keeper.attested()
    return keeper


async def _verifier(place: Site, admin: Admin, resources: AsyncExitStack) -> IdentitySource:
    """A service with our SDK, which follows the broker."""
    machine = place.machine("verifier")
    await admin.create("/bench/verifier", machine.node_id, _UID)
    source = IdentitySource.from_certificate(
        address=place.addresses.address,
        bootstrap_address=place.addresses.bootstrap_address,
        trust_domain=TRUST_DOMAIN,
        bundle_file=place.bundle_file,
        cert_file=machine.directory / "machine.pem",
        key_file=machine.directory / "machine.key",
    )
    await resources.enter_async_context(source)
    await source.wait_ready(_PATIENCE_SECONDS)
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not source.denied.synced:
            await asyncio.sleep(0.01)
    return source


def _attestor(directory: Any) -> CertificateAttestor:
    return CertificateAttestor(directory / "machine.pem", directory / "machine.key")


async def _issued(keeper: NodeKeeper, entry_id: str, count: int) -> list[IssuedX509]:
    key = KeyPair()
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while True:
            answers = await keeper.issue_x509(
                [X509Request(entry_id, key.csr()) for _ in range(count)]
            )
            issued = [each for each in answers if isinstance(each, IssuedX509)]
            if len(issued) == count:
                return issued
            await asyncio.sleep(0.05)


async def _until_denied(source: IdentitySource, serial: str) -> float:
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while not source.denied.denies(serial, None):
            await asyncio.sleep(_LOOK_SECONDS)
    return time.monotonic()
