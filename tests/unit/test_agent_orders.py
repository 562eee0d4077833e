"""What the broker issued is checked against what was ordered, whatever the broker says."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key

from identity_broker.agent.orders import KeyOrder, algorithm_for, check_issued, make_order
from identity_ca.keys import KeyAlgorithm, spki_der
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_client.errors import ProtocolViolation
from identity_client.node.values import IssuedX509, SyncedEntry
from support.workload_identities import FakeIdentities

ENTRY = SyncedEntry("e", 3, "spiffe://example.org/web", ("unix:uid:0",), hint="main")


class Authority:
    """An issuer below a root, as the bundle has it."""

    def __init__(self) -> None:
        self.identities = FakeIdentities()
        self.bundle = self.identities.bundle
        self.now: datetime = self.identities.clock.now()

    def issue(self, csr: bytes, spiffe_id: str = ENTRY.spiffe_id) -> IssuedX509:
        issuer = self.identities._authorities[0].x509
        made = issuer.sign(
            issuer.prepare(
                csr=csr,
                spiffe_id=SpiffeId.parse(spiffe_id),
                profile=WORKLOAD,
                ttl=timedelta(hours=1),
                now=self.now,
            )
        )
        return IssuedX509(made.chain, spiffe_id, made.serial, made.not_before, made.not_after, "")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
async def order() -> KeyOrder:
    return await make_order(KeyAlgorithm.EC_P256)


def reason(caught: pytest.ExceptionInfo[ProtocolViolation]) -> str:
    return caught.value.reason


async def test_what_was_ordered_is_taken(authority: Authority, order: KeyOrder) -> None:
    answer = authority.issue(order.csr)
    issued = check_issued(
        answer, order=order, entry=ENTRY, bundle=authority.bundle, now=authority.now
    )
    assert issued.identity.key == order.key
    assert issued.identity.serial == answer.serial
    assert issued.identity.hint == "main"
    assert issued.entry_revision == 3
    assert issued.anchor in authority.bundle.x509_authorities


async def test_an_svid_for_another_key_is_refused(authority: Authority, order: KeyOrder) -> None:
    theirs = await make_order(KeyAlgorithm.EC_P256)
    with pytest.raises(ProtocolViolation):
        check_issued(
            authority.issue(theirs.csr),
            order=order,
            entry=ENTRY,
            bundle=authority.bundle,
            now=authority.now,
        )


async def test_an_svid_of_another_identity_is_refused(
    authority: Authority, order: KeyOrder
) -> None:
    """Also when the message around it says the right one."""
    answer = replace(
        authority.issue(order.csr, "spiffe://example.org/admin"), spiffe_id=ENTRY.spiffe_id
    )
    with pytest.raises(ProtocolViolation) as caught:
        check_issued(answer, order=order, entry=ENTRY, bundle=authority.bundle, now=authority.now)
    assert reason(caught) == "IDENTITY_CHANGED"


async def test_a_chain_that_leads_elsewhere_or_is_not_valid_now_is_refused(
    authority: Authority, order: KeyOrder
) -> None:
    answer = authority.issue(order.csr)
    for bundle, now in (
        (FakeIdentities().bundle, authority.now),
        (FakeIdentities("example.com").bundle, authority.now),
        (authority.bundle, authority.now + timedelta(hours=2)),
        (authority.bundle, authority.now - timedelta(hours=2)),
    ):
        with pytest.raises(ProtocolViolation) as caught:
            check_issued(answer, order=order, entry=ENTRY, bundle=bundle, now=now)
        assert reason(caught) == "CHAIN_UNTRUSTED"


@pytest.mark.parametrize("chain", [(), (b"no certificate",), (b"",) * 5])
async def test_what_is_no_chain_is_refused(
    authority: Authority, order: KeyOrder, chain: tuple[bytes, ...]
) -> None:
    answer = replace(authority.issue(order.csr), chain=chain)
    with pytest.raises(ProtocolViolation):
        check_issued(answer, order=order, entry=ENTRY, bundle=authority.bundle, now=authority.now)


async def test_the_authority_that_is_meant_is_found_among_several(authority: Authority) -> None:
    several = FakeIdentities()
    first = several.bundle.x509_authorities[0]
    several.rotate_authority()
    grant = several.grant("/web")
    order = KeyOrder(
        key=grant.identity.key,
        public_key=spki_der(load_der_private_key(grant.identity.key, password=None).public_key()),
        csr=b"",
    )
    identity = grant.identity
    answer = IssuedX509(
        identity.chain,
        ENTRY.spiffe_id,
        identity.serial,
        several.clock.now(),
        identity.not_after,
        "",
    )
    issued = check_issued(
        answer, order=order, entry=ENTRY, bundle=several.bundle, now=several.clock.now()
    )
    assert issued.anchor in several.bundle.x509_authorities
    assert issued.anchor != first


@pytest.mark.parametrize(
    ("named", "algorithm"),
    [
        ("", KeyAlgorithm.EC_P256),
        ("ec-p384", KeyAlgorithm.EC_P384),
        ("rsa-2048", KeyAlgorithm.RSA_2048),
    ],
)
async def test_keys_are_made_as_the_entry_asks(named: str, algorithm: KeyAlgorithm) -> None:
    assert algorithm_for(replace(ENTRY, key_algorithm=named)) is algorithm
    order = await make_order(algorithm)
    key = load_der_private_key(order.key, password=None)
    assert spki_der(key.public_key()) == order.public_key


@pytest.mark.parametrize("named", ["ed25519", "rsa-4096", "anything"])
def test_a_kind_of_key_that_is_not_made_is_said(named: str) -> None:
    with pytest.raises(ProtocolViolation) as caught:
        algorithm_for(replace(ENTRY, key_algorithm=named))
    assert reason(caught) == "KEY_ALGORITHM_UNKNOWN"


async def test_neither_keys_nor_requests_are_ever_shown(
    authority: Authority, order: KeyOrder
) -> None:
    assert repr(order) == "KeyOrder()"
    issued = check_issued(
        authority.issue(order.csr),
        order=order,
        entry=ENTRY,
        bundle=authority.bundle,
        now=authority.now,
    )
    assert repr(order.key)[2:-1] not in repr(issued)
    assert TrustDomain("example.org") == authority.bundle.trust_domain
