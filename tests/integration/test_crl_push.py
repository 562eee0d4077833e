"""Revocation lists: what stands in them, who signed them, and when nodes are told."""

from __future__ import annotations

import asyncio
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.domain.credential import RevocationReason
from identity_broker.domain.revocation import SubjectKind
from identity_broker.errors import SigningBackendUnavailable
from identity_broker.lifecycle.crl import lists as lists_module
from identity_broker.lifecycle.crl.lists import VALIDITY, RevocationLists
from identity_broker.lifecycle.issue import JwtOrder, one
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.errors import BackendUnavailable, KeyNotFound
from support.following import following
from support.line import RunningBroker, running, settings_in
from support.lists import Chain, number_of, parsed, reasons, serials, signed_by
from support.verbs import LIFE, NODE, START, Parts

STOLEN = RevocationReason.KEY_COMPROMISE
MINUTE = timedelta(minutes=1)


# --- on the stream --------------------------------------------------------------------------------


async def test_a_revoked_certificate_is_on_the_list_at_once(
    broker: RunningBroker, tmp_path: Path
) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    svid = (await node.issue(entry.id)).svid
    kept = (await node.issue(entry.id)).svid
    async with following(node) as follower:
        first, *_ = parsed(follower.state.crls)
        assert serials(first) == []
        started = time.perf_counter()
        await broker.revoke(id=svid.serial, reason=int(STOLEN))
        await follower.until(lambda state: serials(parsed(state.crls)[0]) == [svid.serial])
        assert time.perf_counter() - started < 5.0
        [message] = follower.messages[-1:]
        assert message.previous == message.revision
        assert not message.changed
        lists = list(follower.state.crls)
        bundle = follower.state.bundle
        assert bundle is not None
    crl, *_ = parsed(lists)
    assert number_of(crl) > number_of(first)
    roots = [x509.load_der_x509_certificate(item) for item in bundle.x509_authorities]
    roots_pem = b"".join(root.public_bytes(Encoding.PEM) for root in roots)
    revoked = Chain.of(tmp_path / "revoked", list(svid.cert_chain), roots_pem)
    good = Chain.of(tmp_path / "good", list(kept.cert_chain), roots_pem)
    above = [x509.load_der_x509_certificate(der) for der in svid.cert_chain[1:]]
    issuer = [*above, *roots][0]
    assert crl.issuer == revoked.leaf.issuer == issuer.subject
    assert signed_by(crl, issuer)
    assert crl.next_update_utc is not None
    assert crl.next_update_utc - crl.last_update_utc == VALIDITY + timedelta(seconds=10)
    assert reasons(crl) == {svid.serial: x509.ReasonFlags.key_compromise}
    # Those who check a whole chain have a list of each authority in it.
    whole = ("-crl_check_all",)
    assert len(lists) == len(above) + 1
    assert "certificate revoked" in revoked.verdict(*lists, options=whole)
    assert good.verdict(*lists, options=whole) == ""


async def test_a_burst_of_revocations_is_few_lists(broker: RunningBroker) -> None:
    node = await broker.join("web-1")
    entry = await broker.entry("/payments/api", "web-1")
    issued = [(await node.issue(entry.id)).svid.serial for _ in range(20)]
    async with following(node) as follower:
        await asyncio.gather(*(broker.revoke(id=serial) for serial in issued))
        await follower.until(lambda state: len(serials(parsed(state.crls)[0])) == 20)
        assert serials(parsed(follower.state.crls)[0]) == sorted(issued)
        assert follower.state.revoked == set(issued)
        told = [message for message in follower.messages[1:] if message.HasField("lists")]
        assert len(told) < 20


async def test_a_number_never_comes_twice_across_restarts(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "idb", ca={"key_manager": "file"})
    numbers = []
    for start in range(3):
        async with running(settings) as broker:
            node = await broker.join(f"web-{start}")
            entry = await broker.entry(f"/api/{start}", f"web-{start}")
            svid = (await node.issue(entry.id)).svid
            async with following(node) as follower:
                numbers.append(number_of(parsed(follower.state.crls)[0]))
                await broker.revoke(id=svid.serial)
                await follower.until(
                    lambda state, serial=svid.serial: serial in serials(parsed(state.crls)[0])
                )
                crl = parsed(follower.state.crls)[0]
                numbers.append(number_of(crl))
                # What was revoked before the restart stands in it still.
                assert len(serials(crl)) == start + 1
    assert numbers == sorted(set(numbers))


# --- with a clock that is set by hand -------------------------------------------------------------


@pytest.fixture
def lists(parts: Parts) -> RevocationLists:
    return RevocationLists(
        signing=parts.signing, directory=parts.directory, store=parts.store, clock=parts.clock
    )


def authorities(parts: Parts) -> dict[AuthorityState, Authority]:
    return {item.state: item for item in parts.signing.authorities.x509_set}


def list_of(authority: Authority, lists: RevocationLists) -> x509.CertificateRevocationList:
    certificate = x509.load_der_x509_certificate(authority.chain[0])
    [found] = [crl for crl in parsed(lists.current) if signed_by(crl, certificate)]
    assert found.issuer == certificate.subject
    return found


async def turn(parts: Parts, to: datetime) -> None:
    parts.clock.time = to
    await parts.rotate.run()


async def test_every_authority_that_can_sign_has_its_own_list(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    old = await parts.svid()
    await turn(parts, START + LIFE / 2 + MINUTE)
    assert parts.states(AuthorityKind.X509) == ["active", "prepared"]
    await lists.rebuild()
    assert len(lists.current) == 2
    await turn(parts, START + LIFE * 5 / 6 + MINUTE)
    new = await parts.svid()
    told: list[int] = []
    lists.listen(lambda crls: told.append(len(crls)))
    # The first certificate has expired by now; its authority still lists what has not.
    late = await parts.svid()
    await parts.end_one(new.serial)
    assert await lists.rebuild()
    assert told == [2]
    known = authorities(parts)
    assert serials(list_of(known[AuthorityState.ACTIVE], lists)) == [new.serial]
    assert serials(list_of(known[AuthorityState.OLD], lists)) == []
    assert late.serial != old.serial
    # An authority that has expired needs no list.
    await turn(parts, START + LIFE + MINUTE)
    assert await lists.rebuild()
    assert AuthorityState.OLD not in authorities(parts)
    assert len(lists.current) == len(parts.signing.authorities.x509_set.trusted)


async def test_the_old_authority_lists_what_it_signed(parts: Parts, lists: RevocationLists) -> None:
    await parts.admit()
    await turn(parts, START + LIFE / 2 + MINUTE)
    parts.clock.time = START + LIFE * 5 / 6 - MINUTE
    signed = await parts.svid()
    await turn(parts, START + LIFE * 5 / 6 + MINUTE)
    await parts.end_one(signed.serial)
    await lists.rebuild()
    known = authorities(parts)
    assert serials(list_of(known[AuthorityState.OLD], lists)) == [signed.serial]
    assert serials(list_of(known[AuthorityState.ACTIVE], lists)) == []


async def test_a_list_is_renewed_at_half_of_its_validity_and_when_the_clock_goes_back(
    parts: Parts, lists: RevocationLists
) -> None:
    assert await lists.rebuild()
    [first] = parsed(lists.current)
    parts.clock.time += VALIDITY / 2 - MINUTE
    assert not await lists.rebuild()
    parts.clock.time += 2 * MINUTE
    assert await lists.rebuild()
    [second] = parsed(lists.current)
    assert second.next_update_utc is not None
    assert first.next_update_utc is not None
    assert second.next_update_utc > first.next_update_utc
    parts.clock.time -= VALIDITY
    assert await lists.rebuild()
    [third] = parsed(lists.current)
    assert third.last_update_utc < second.last_update_utc
    numbers = [number_of(crl) for crl in (first, second, third)]
    assert numbers == sorted(set(numbers))


async def test_a_revoked_certificate_leaves_after_it_was_listed_expired(
    parts: Parts, lists: RevocationLists
) -> None:
    await parts.admit()
    issued = await parts.svid()
    await parts.end_one(issued.serial)
    await lists.rebuild()
    parts.clock.time = issued.not_after + 10 * MINUTE
    await parts.directory.forget_expired()
    assert not parts.directory.is_revoked(issued.serial)
    assert await lists.rebuild()
    assert serials(parsed(lists.current)[0]) == [issued.serial]
    parts.clock.time += VALIDITY / 2 + MINUTE
    assert await lists.rebuild()
    assert serials(parsed(lists.current)[0]) == []


async def test_a_key_manager_that_is_away_leaves_the_list_in_force(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    await parts.admit()
    issued = await parts.svid()
    await lists.rebuild()
    before = lists.current

    attempts: list[str] = []

    def away(key_id: str) -> Any:
        attempts.append(key_id)
        raise BackendUnavailable("the key manager does not answer")

    monkeypatch.setattr(lists_module, "_RETRY_SECONDS", 0.05)
    running_lists = asyncio.create_task(lists.run())
    with monkeypatch.context() as patch:
        patch.setattr(parts.keys, "load", away)
        await parts.end_one(issued.serial)
        async with asyncio.timeout(10):
            while len(attempts) < 2:
                await asyncio.sleep(0.01)
        with pytest.raises(SigningBackendUnavailable):
            await lists.rebuild()
        assert lists.current == before
    async with asyncio.timeout(10):
        while lists.current == before:
            await asyncio.sleep(0.01)
    running_lists.cancel()
    assert serials(parsed(lists.current)[0]) == [issued.serial]


async def test_an_authority_whose_key_is_lost_has_no_list(
    parts: Parts, lists: RevocationLists, monkeypatch: pytest.MonkeyPatch
) -> None:
    await turn(parts, START + LIFE / 2 + MINUTE)
    known = authorities(parts)
    load = parts.keys.load

    def lost(key_id: str) -> Any:
        if key_id == known[AuthorityState.ACTIVE].key_id:
            raise KeyNotFound("no such key")
        return load(key_id)

    monkeypatch.setattr(parts.keys, "load", lost)
    assert await lists.rebuild()
    assert len(lists.current) == 1
    assert serials(list_of(known[AuthorityState.PREPARED], lists)) == []
    assert not await lists.rebuild()


async def test_a_token_stands_on_no_list(parts: Parts, lists: RevocationLists) -> None:
    await parts.admit()
    await lists.rebuild()
    before = lists.current
    grant = parts.authorize.entry(NODE, "api")
    token = one(await parts.issue.jwt([JwtOrder(grant, ("a",))]))
    await parts.end(SubjectKind.JTI, token.jti)
    assert not await lists.rebuild()
    assert lists.current == before
