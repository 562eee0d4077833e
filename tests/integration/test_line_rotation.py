"""rotate: authorities are prepared, published, activated and forgotten in time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from identity_broker.domain.credential import CredentialState
from identity_broker.domain.entry import RegistrationEntry
from identity_broker.domain.revocation import SubjectKind
from identity_broker.domain.selector import Selector
from identity_broker.errors import AuthorityUnavailable, PolicyViolation
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.issue import X509Order, one
from identity_broker.lifecycle.rotate import RotateServer
from identity_ca.authority import AuthorityKind, AuthorityState
from identity_ca.backends.memory import MemoryKeyManager
from identity_ca.chain import verify_x509_svid
from identity_ca.spiffe_id import SpiffeId
from support.line import TRUST_DOMAIN, csr_for, new_key
from support.verbs import DOMAIN, HINT, LIFE, NODE, OPERATOR, START, Parts


async def test_an_authority_is_replaced_without_a_gap(parts: Parts) -> None:
    entry = await parts.admit()
    chains = []
    sequences = [parts.signing.bundle.sequence]
    seen: list[list[str]] = []
    for _ in range(13 * 4):  # thirteen hours, by quarters
        grant = parts.authorize.entry(NODE, entry.id)
        issued = one(await parts.issue.x509([X509Order(grant, csr_for(new_key()))]))
        chains.append(issued)
        # Whatever is valid now verifies with what is published now.
        for credential in chains:
            if credential.not_before <= parts.clock.now() < credential.not_after:
                verify_x509_svid(
                    credential.chain, bundle=parts.signing.bundle, now=parts.clock.now()
                )
        states = parts.states(AuthorityKind.X509)
        if not seen or seen[-1] != states:
            seen.append(states)
        if parts.signing.bundle.sequence != sequences[-1]:
            sequences.append(parts.signing.bundle.sequence)
        parts.clock.time += timedelta(minutes=15)
        await parts.rotate.run()
    # The third generation is prepared in the moment the first has expired.
    assert seen == [
        ["active"],
        ["active", "prepared"],
        ["old", "active"],
        ["active", "prepared"],
    ]
    assert sequences == sorted(set(sequences))
    assert len(sequences) >= 4


async def test_a_new_key_is_published_before_it_signs(parts: Parts) -> None:
    first = parts.signing.authorities.x509_set.active
    assert first is not None
    # The job was away for most of the authority's life: the successor still waits its turn.
    parts.clock.time = START + LIFE * 5 / 6 + timedelta(minutes=1)
    await parts.rotate.run()
    assert parts.signing.authorities.x509_set.active == first
    prepared = parts.signing.authorities.x509_set.prepared
    assert prepared is not None
    assert set(prepared.roots) < set(parts.signing.bundle.x509_authorities)
    parts.clock.time += HINT
    await parts.rotate.run()
    active = parts.signing.authorities.x509_set.active
    assert active is not None
    assert active.id == prepared.id


async def test_nothing_outlives_its_authority(parts: Parts) -> None:
    entry = await parts.admit()
    grant = parts.authorize.entry(NODE, entry.id)
    active = parts.signing.authorities.x509_set.active
    assert active is not None
    parts.clock.time = active.not_after - timedelta(minutes=10)
    issued = one(await parts.issue.x509([X509Order(grant, csr_for(new_key()))]))
    assert issued.not_after <= active.not_after
    parts.clock.time = active.not_after - timedelta(seconds=30)
    with pytest.raises(PolicyViolation):
        one(await parts.issue.x509([X509Order(grant, csr_for(new_key()))]))


async def test_what_a_replaced_authority_prepared_it_still_signs(parts: Parts) -> None:
    entry = await parts.admit()
    grant = parts.authorize.entry(NODE, entry.id)
    first = parts.signing.authorities.x509_set.active
    parts.clock.time = START + LIFE * 5 / 6
    await parts.rotate.run()
    prepared = parts.signing.prepare_x509(grant, csr_for(new_key()), parts.clock.now())
    parts.clock.time += HINT
    await parts.rotate.run()
    assert parts.signing.authorities.x509_set.active != first
    late = parts.signing.prepare_x509(grant, csr_for(new_key()), parts.clock.now())
    signed = await parts.signing.sign_x509([prepared, late])
    for credential in signed:
        verify_x509_svid(credential.chain, bundle=parts.signing.bundle, now=parts.clock.now())
    assert [item.serial for item in signed] == [prepared.serial, late.serial]


async def test_what_a_forgotten_authority_prepared_is_not_signed(parts: Parts) -> None:
    entry = await parts.admit()
    grant = parts.authorize.entry(NODE, entry.id)
    prepared = parts.signing.prepare_x509(grant, csr_for(new_key()), parts.clock.now())
    for _ in range(3):
        parts.clock.time += LIFE
        await parts.rotate.run()
    with pytest.raises(AuthorityUnavailable):
        await parts.signing.sign_x509([prepared])


async def test_a_lost_key_is_replaced_at_the_next_start(parts: Parts) -> None:
    before = parts.signing.authorities.x509_set.active
    assert before is not None
    again = Parts(parts.store, parts.clock, MemoryKeyManager())
    await again.rotate.start()
    after = again.signing.authorities.x509_set
    assert after.active is not None
    assert after.active.id != before.id
    assert after.get(before.id).state is AuthorityState.OLD
    assert set(before.roots) <= set(again.signing.bundle.x509_authorities)
    await again.signing.close()


async def test_the_brokers_own_svid_is_replaced_at_half_of_its_life(parts: Parts) -> None:
    server = RotateServer(authorize=parts.authorize, issue=parts.issue, clock=parts.clock)
    assert await server.run()
    first = server.current
    assert first is not None
    assert not await server.run()
    parts.clock.time += timedelta(minutes=31)
    assert await server.run()
    assert server.current is not None
    assert server.current.credential.serial != first.credential.serial
    await parts.store.ledger.flush()
    former = await parts.store.read(lambda repos: repos.credentials.get(first.credential.serial))
    assert former.state is CredentialState.SUPERSEDED


async def test_revoking_an_identity_catches_what_was_being_issued(parts: Parts) -> None:
    import asyncio

    entry = await parts.admit()
    reached, go_on = asyncio.Event(), asyncio.Event()
    intend = parts.record.intend

    async def slow_intend(*args, **kwargs):
        reached.set()
        await go_on.wait()
        await intend(*args, **kwargs)

    parts.record.intend = slow_intend  # type: ignore[method-assign]
    grant = parts.authorize.entry(NODE, entry.id)
    issuing = asyncio.create_task(parts.issue.x509([X509Order(grant, csr_for(new_key()))]))
    await reached.wait()
    revoking = asyncio.create_task(
        parts.end(SubjectKind.SPIFFE_ID, entry.spiffe_id, comment="stolen")
    )
    while not (parts.directory.entry(entry.id) or entry).held_by:
        await asyncio.sleep(0.01)
    assert not revoking.done()
    go_on.set()
    issued = one(await issuing)
    revoked = await revoking
    assert [item.id for item in revoked.revocations] == [issued.serial]
    assert parts.directory.is_revoked(issued.serial)
    await parts.store.ledger.flush()
    stored = await parts.store.read(lambda repos: repos.credentials.get(issued.serial))
    assert stored.state is CredentialState.REVOKED


async def test_a_caller_that_hangs_up_leaves_a_recorded_credential(parts: Parts) -> None:
    import asyncio

    entry = await parts.admit()
    grant = parts.authorize.entry(NODE, entry.id)
    issuing = asyncio.create_task(parts.issue.x509([X509Order(grant, csr_for(new_key()))]))
    while not parts.issue._x509._flights:
        await asyncio.sleep(0)
    issuing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await issuing
    await parts.issue.settled()
    await parts.store.ledger.flush()
    valid = await parts.store.read(
        lambda repos: repos.credentials.valid_for(entry.spiffe_id, parts.clock.now())
    )
    assert [item.state for item in valid] == [CredentialState.ISSUED]


async def test_a_directory_that_fell_behind_starts_over(parts: Parts) -> None:
    kept = await parts.admit()
    other = Directory(parts.store, DOMAIN, parts.clock)
    await other.load()
    seen: list[Update] = []
    other.listen(seen.append)
    issued = one(
        await parts.issue.x509(
            [X509Order(parts.authorize.entry(NODE, kept.id), csr_for(new_key()))]
        )
    )
    await parts.end_one(issued.serial)
    new = RegistrationEntry(
        id="new",
        spiffe_id=SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/new"),
        parent_id=NODE,
        selectors=frozenset({Selector("unix", "uid:1")}),
    )
    await parts.entries.create([new], OPERATOR)
    await parts.entries.delete([kept.id], OPERATOR)
    await parts.store.write(lambda repos: repos.retention.purge_outbox(0))
    await other.sync()
    assert other.entry("new") is not None
    assert other.entry(kept.id) is None
    assert other.is_revoked(issued.serial)
    assert other.seq == parts.directory.seq
    [update] = seen
    assert [entry.id for entry in update.changed_entries] == ["new"]
    assert update.deleted_entry_ids == [kept.id]
    assert [revocation.id for revocation in update.revocations] == [issued.serial]
    await other.sync()
    assert len(seen) == 1
