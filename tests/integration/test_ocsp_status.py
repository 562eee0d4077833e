"""OCSP answers on a real store and real keys: what is good, and what is said in an outage."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from identity_broker.domain.credential import CredentialKind, CredentialState, RevocationReason
from identity_broker.domain.paging import CredentialFilter
from identity_broker.domain.revocation import SubjectKind
from identity_broker.lifecycle import ocsp as ocsp_module
from identity_broker.lifecycle import ocsp_responders
from identity_broker.lifecycle.directory import Directory
from identity_broker.lifecycle.issue import JwtOrder, one
from identity_broker.lifecycle.ocsp import Ocsp, OcspAnswer
from identity_broker.lifecycle.ocsp_responders import Responders
from identity_broker.signing import ocsp as signing_ocsp
from identity_ca.authority import Authority, AuthorityKind, AuthorityState
from identity_ca.der import element
from identity_ca.errors import BackendUnavailable
from identity_ca.issuer import X509Credential
from identity_ca.ocsp import OcspRequest, ResponseStatus, parse_request, refusal
from identity_ca.ocsp_check import build_request, check_answer
from identity_ca.serial import new_serial
from support.verbs import LIFE, NODE, OPERATOR, START, Parts

MINUTE = timedelta(minutes=1)
VALIDITY = timedelta(minutes=10)
HOLD = RevocationReason.CERTIFICATE_HOLD


class Asker:
    """Asks a responder about certificates, and believes nothing that does not verify."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.responders = Responders(
            signing=parts.signing,
            store=parts.store,
            clock=parts.clock,
            is_revoked=parts.directory.is_revoked,
        )
        self.ocsp = Ocsp(
            signing=parts.signing,
            directory=parts.directory,
            store=parts.store,
            responders=self.responders,
            clock=parts.clock,
            validity=VALIDITY,
        )

    def authority(self, state: AuthorityState = AuthorityState.ACTIVE) -> Authority:
        [found] = [each for each in self.parts.signing.authorities.x509_set if each.state is state]
        return found

    def issuer(self, state: AuthorityState = AuthorityState.ACTIVE) -> x509.Certificate:
        return x509.load_der_x509_certificate(self.authority(state).chain[0])

    async def of(
        self, credential: X509Credential, state: AuthorityState = AuthorityState.ACTIVE
    ) -> str:
        """The verified status of a certificate."""
        leaf = x509.load_der_x509_certificate(credential.chain[0])
        issuer = self.issuer(state)
        answer = await self.ocsp.answer(build_request(leaf, issuer))
        checked = check_answer(answer.der, leaf=leaf, issuer=issuer, now=self.parts.clock.now())
        assert checked.status.name.lower() == answer.outcome
        return answer.outcome

    async def ask(
        self,
        serials: Sequence[int],
        state: AuthorityState = AuthorityState.ACTIVE,
        nonce: bytes | None = None,
    ) -> OcspAnswer:
        return await self.ocsp.answer(request(self.issuer(state), serials, nonce))


def request(issuer: x509.Certificate, serials: Sequence[int], nonce: bytes | None = None) -> bytes:
    """A request for several certificates of an issuer."""
    return mixed([(issuer, serial) for serial in serials], nonce)


def mixed(ids: Sequence[tuple[x509.Certificate, int]], nonce: bytes | None = None) -> bytes:
    parts = b"".join(element(0x30, one_id(*each)) for each in ids)
    extensions = b""
    if nonce is not None:
        theirs = x509.OCSPNonce(nonce).public_bytes()
        oid = bytes.fromhex("06092b0601050507300102")
        extension = element(0x30, oid + element(4, theirs))
        extensions = element(0xA2, element(0x30, extension))
    return element(0x30, element(0x30, element(0x30, parts) + extensions))


def one_id(issuer: x509.Certificate, serial: int) -> bytes:
    key = x509.SubjectKeyIdentifier.from_public_key(issuer.public_key()).digest
    name = hashes.Hash(hashes.SHA1())
    name.update(issuer.subject.public_bytes())
    built = (
        ocsp.OCSPRequestBuilder()
        .add_certificate_by_hash(name.finalize(), key, serial, hashes.SHA1())
        .build()
        .public_bytes(Encoding.DER)
    )
    read = parse_request(built)
    assert isinstance(read, OcspRequest)
    return read.cert_ids[0].der


def statuses(answer: OcspAnswer) -> list[str]:
    return [
        each.certificate_status.name.lower()
        for each in ocsp.load_der_ocsp_response(answer.der).responses
    ]


def serial_of(credential: X509Credential) -> int:
    return int(credential.serial, 16)


@pytest.fixture
async def asker(parts: Parts) -> Asker:
    await parts.admit()
    return Asker(parts)


# --- what is good ---------------------------------------------------------------------------------


async def test_good_revoked_and_never_issued(asker: Asker, parts: Parts) -> None:
    kept, ended = await parts.svid(), await parts.svid()
    # Nobody waits for an outcome to be written: a certificate is good once it was handed out.
    assert await asker.of(kept) == "good"
    assert await asker.of(ended) == "good"
    await parts.end_one(ended.serial)
    assert await asker.of(ended) == "revoked"
    assert await asker.of(kept) == "good"
    answer = await asker.ask([new_serial(START), serial_of(kept), serial_of(ended), 0])
    assert statuses(answer) == ["unknown", "good", "revoked", "unknown"]
    assert answer.outcome == "mixed"
    assert answer.fresh_until is None
    found = list(ocsp.load_der_ocsp_response(answer.der).responses)[2]
    assert found.revocation_reason is x509.ReasonFlags.key_compromise
    assert found.revocation_time_utc == START
    assert found.this_update_utc == START - timedelta(seconds=10)
    assert found.next_update_utc == START + VALIDITY


async def test_what_is_no_certificate_of_this_authority_is_unknown(
    asker: Asker, parts: Parts
) -> None:
    svid = await parts.svid()
    parts.clock.time = START + LIFE / 2 + MINUTE
    await parts.rotate.run()
    fresh = await parts.svid()
    grant = parts.authorize.entry(NODE, "api")
    token = one(await parts.issue.jwt([JwtOrder(grant, ("a",))]))
    serials = [int(token.jti, 16), serial_of(svid), serial_of(fresh)]
    assert statuses(await asker.ask(serials)) == ["unknown", "unknown", "good"]  # svid has expired
    assert statuses(await asker.ask(serials, AuthorityState.PREPARED)) == ["unknown"] * 3
    # A revoked token is no revoked certificate.
    await parts.end(SubjectKind.JTI, token.jti)
    await parts.end_one(fresh.serial)
    assert statuses(await asker.ask(serials)) == ["unknown", "unknown", "revoked"]
    assert statuses(await asker.ask(serials, AuthorityState.PREPARED)) == ["unknown"] * 3


async def test_an_intent_without_an_outcome_is_unknown_whatever_becomes_of_it(
    asker: Asker, parts: Parts
) -> None:
    responder = await asker.responders.of(asker.authority())
    ledger = await parts.store.read(lambda repos: repos.credentials.get(responder.serial))
    intent = replace(ledger.intent, id="42" * 20)
    await parts.store.ledger.intend([intent])
    serial = int(intent.id, 16)
    assert statuses(await asker.ask([serial])) == ["unknown"]
    parts.clock.time += 2 * MINUTE
    assert await parts.record.sweep() == 1
    assert statuses(await asker.ask([serial])) == ["unknown"]
    # It can be revoked all the same, for somebody may have the certificate.
    await parts.end_one(intent.id)
    assert statuses(await asker.ask([serial])) == ["revoked"]


async def test_superseded_is_good_and_expired_is_not(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    assert await asker.of(svid) == "good"
    parts.clock.time = svid.not_after - timedelta(seconds=1)
    assert await asker.of(svid) == "good"
    parts.clock.time = svid.not_after
    assert statuses(await asker.ask([serial_of(svid)])) == ["unknown"]
    await parts.record.expire()
    assert statuses(await asker.ask([serial_of(svid)])) == ["unknown"]
    # A clock that ran ahead and was put right.
    parts.clock.time = svid.not_after - MINUTE
    assert statuses(await asker.ask([serial_of(svid)])) == ["good"]


async def test_what_was_revoked_stays_so_after_it_expired(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    await parts.end_one(svid.serial)
    parts.clock.time = svid.not_after + timedelta(minutes=30)
    await parts.directory.forget_expired()
    assert parts.directory.revocation(svid.serial) is None
    assert await asker.of(svid) == "revoked"


async def test_everything_of_a_revoked_authority_is_revoked(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    assert await asker.of(svid) == "good"
    lost = asker.authority()
    await parts.end(SubjectKind.AUTHORITY, lost.id, RevocationReason.CA_COMPROMISE)
    await parts.directory.sync()
    assert lost.id in parts.directory.denied_authorities()
    revoked = AuthorityState.REVOKED
    answer = await asker.ask([serial_of(svid), new_serial(START)], revoked)
    assert statuses(answer) == ["revoked", "revoked"]
    for each in ocsp.load_der_ocsp_response(answer.der).responses:
        assert each.revocation_reason is x509.ReasonFlags.ca_compromise
        assert each.revocation_time_utc == lost.not_before
    assert await asker.of(svid, revoked) == "revoked"
    # Whoever asks about numbers without end fills nothing.
    for _ in range(20):
        await asker.ask([new_serial(START)], revoked)
    assert len(asker.ocsp._held) == 0
    assert await asker.of(await parts.svid()) == "good"


async def test_whose_authorities_are_answered_for(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    own = asker.issuer()
    other = Parts(parts.store, parts.clock, type(parts.keys)())
    strangers = await other.signing.new_authority(
        AuthorityKind.X509, asker.authority().algorithm, LIFE, START
    )
    stranger = x509.load_der_x509_certificate(strangers.chain[0])
    await other.signing.close()
    parts.clock.time += LIFE / 2 + MINUTE
    await parts.rotate.run()
    next_one = asker.issuer(AuthorityState.PREPARED)
    unauthorized = refusal(ResponseStatus.UNAUTHORIZED)
    for ids in (
        [(stranger, 7)],
        [(own, serial_of(svid)), (stranger, 7)],
        [(own, serial_of(svid)), (next_one, 7)],
    ):
        answer = await asker.ocsp.answer(mixed(ids))
        assert answer.der == unauthorized
        assert answer.outcome == "unauthorized"
    parts.clock.time = START + LIFE + MINUTE  # its authority has expired
    assert (await asker.ocsp.answer(request(own, [serial_of(svid)]))).der == unauthorized


async def test_bad_requests(asker: Asker) -> None:
    malformed = refusal(ResponseStatus.MALFORMED_REQUEST)
    for bad in (b"", b"\x30\x00", b"x" * 70_000, request(asker.issuer(), [7], b"n" * 129)):
        answer = await asker.ocsp.answer(bad)
        assert (answer.der, answer.outcome) == (malformed, "malformed_request")


# --- what is kept ---------------------------------------------------------------------------------


async def test_an_answer_is_kept_for_half_of_its_validity(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    first = await asker.ask([serial_of(svid)])
    assert first.fresh_until == START + VALIDITY / 2
    parts.clock.time += VALIDITY / 2 - timedelta(seconds=1)
    assert await asker.ask([serial_of(svid)]) is first
    parts.clock.time += timedelta(seconds=1)
    second = await asker.ask([serial_of(svid)])
    assert second.der != first.der
    # A clock that was set back does not serve what is from its future.
    parts.clock.time = START + MINUTE
    third = await asker.ask([serial_of(svid)])
    assert third.this_update == parts.clock.time - timedelta(seconds=10)


async def test_a_nonce_comes_back_and_its_answer_is_not_kept(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    kept = await asker.ask([serial_of(svid)])
    for nonce in (b"n", b"n" * 32, b"m" * 128):
        answer = await asker.ask([serial_of(svid)], nonce=nonce)
        assert answer.fresh_until is None
        read = ocsp.load_der_ocsp_response(answer.der)
        [found] = [each.value for each in read.extensions]
        assert found == x509.OCSPNonce(nonce)
    assert await asker.ask([serial_of(svid)]) is kept


async def test_a_hold_and_its_end_are_answered_at_once(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    assert await asker.of(svid) == "good"
    await parts.end(SubjectKind.SERIAL, svid.serial, HOLD, hold_name="look")
    assert await asker.of(svid) == "revoked"
    assert await asker.of(svid) == "revoked"
    [listed] = ocsp.load_der_ocsp_response((await asker.ask([serial_of(svid)])).der).responses
    assert listed.revocation_reason is x509.ReasonFlags.certificate_hold
    await parts.revoke.lift("look", OPERATOR)
    await parts.directory.sync()
    assert await asker.of(svid) == "good"


async def test_a_revocation_while_the_ledger_is_read_wins(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    svid = await parts.svid()
    await parts.store.ledger.flush()
    find = ocsp_module._Lookups.find

    async def found_then_revoked(self: Any, ids: Sequence[str]) -> Any:
        found = await find(self, ids)
        assert found[svid.serial].state is CredentialState.ISSUED
        await parts.end_one(svid.serial)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ocsp_module._Lookups, "find", found_then_revoked)
        assert statuses(await asker.ask([serial_of(svid)])) == ["revoked"]
    assert await asker.of(svid) == "revoked"


async def test_what_another_broker_revoked_is_heard_of(asker: Asker, parts: Parts) -> None:
    kept, new = await parts.svid(), await parts.svid()
    await parts.store.ledger.flush()
    here = parts.directory
    parts.directory = Directory(parts.store, parts.signing.trust_domain, parts.clock)
    await parts.directory.load()
    other = Asker(parts)
    parts.directory = here
    assert await other.of(kept) == "good"
    for svid in (kept, new):
        await parts.end_one(svid.serial)
    # What it does not keep it reads in the ledger, ahead of the change feed.
    assert await other.of(new) == "revoked"
    assert await other.of(kept) == "good"
    await other.ocsp._directory.sync()
    assert await other.of(kept) == "revoked"


async def test_memory_is_bounded(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocsp_module, "MOST_HELD", 3)
    issued = [await parts.svid() for _ in range(6)]
    for svid in issued:
        assert await asker.of(svid) == "good"
    assert len(asker.ocsp._held) == 3
    for _ in range(10):
        await asker.ask([new_serial(START)])
    assert list(asker.ocsp._held) == [each.serial for each in issued[3:]]


async def test_many_who_ask_together_are_few_reads(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = [await parts.svid() for _ in range(30)]
    await parts.store.ledger.flush()
    await asker.ask([new_serial(START)])
    reads = 0
    read = parts.store.read

    async def counted(fn: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(fn)

    monkeypatch.setattr(parts.store, "read", counted)
    answers = await asyncio.gather(*(asker.ask([serial_of(each)]) for each in issued))
    assert {each.outcome for each in answers} == {"good"}
    assert reads <= 3


# --- when something is away -----------------------------------------------------------------------

TRY_LATER = refusal(ResponseStatus.TRY_LATER)


async def test_without_the_change_feed_only_what_is_revoked_is_said(
    asker: Asker, parts: Parts
) -> None:
    kept, ended = await parts.svid(), await parts.svid()
    await parts.end_one(ended.serial)
    assert await asker.of(kept) == "good"
    parts.directory._followed_at -= 60
    for serials in ([serial_of(kept)], [serial_of(kept), serial_of(ended)], [new_serial(START)]):
        for nonce in (None, b"n" * 16):
            assert (await asker.ask(serials, nonce=nonce)).der == TRY_LATER
    assert await asker.of(ended) == "revoked"
    parts.directory._followed_at += 60
    assert await asker.of(kept) == "good"


async def test_without_the_store(asker: Asker, parts: Parts) -> None:
    kept, other = await parts.svid(), await parts.svid()
    assert await asker.of(kept) == "good"
    await parts.store.close()
    assert await asker.of(kept) == "good"  # as long as the feed was heard a moment ago
    assert (await asker.ask([serial_of(other)])).der == TRY_LATER
    await parts.store.open()
    assert await asker.of(other) == "good"


async def test_a_bug_is_an_internal_error(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(serial: str) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(parts.directory, "revocation", broken)
    answer = await asker.ask([7])
    assert answer.der == refusal(ResponseStatus.INTERNAL_ERROR)


# --- the responder --------------------------------------------------------------------------------


async def ledger_of(parts: Parts) -> list[tuple[str, str]]:
    """What the ledger has of the broker's own, oldest first."""
    await parts.store.ledger.flush()
    wanted = CredentialFilter(spiffe_id=parts.authorize.broker().spiffe_id)
    page = await parts.store.read(lambda repos: repos.credentials.page(wanted, "", 100))
    assert {each.intent.kind for each in page.items} <= {CredentialKind.X509}
    return [(each.id, each.state.value) for each in reversed(page.items)]


async def test_a_responder_is_recorded_and_renewed_at_half_of_its_life(
    asker: Asker, parts: Parts
) -> None:
    await asker.responders.renew()
    assert await ledger_of(parts) == []  # nobody has asked yet
    first = await asker.responders.of(asker.authority())
    assert await ledger_of(parts) == [(first.serial, "issued")]
    ends = first.not_after
    assert ends == asker.authority().not_after  # an authority here lives for half a day
    assert await asker.responders.of(asker.authority()) is first
    # Its own status is known, as anybody's.
    assert statuses(await asker.ask([int(first.serial, 16)])) == ["good"]

    seat = asker.responders._seats[asker.authority().id]
    seat.responder = replace(first, not_after=START + timedelta(hours=8))
    parts.clock.time = START + timedelta(hours=4) - MINUTE
    await asker.responders.renew()
    assert seat.responder is not None
    assert seat.responder.serial == first.serial
    parts.clock.time += MINUTE
    await asker.responders.renew()
    second = await asker.responders.of(asker.authority())
    assert await ledger_of(parts) == [(first.serial, "superseded"), (second.serial, "issued")]
    # What is cut to the authority's end cannot be had longer: it is not asked for again.
    parts.clock.time = START + timedelta(hours=11)
    await asker.responders.renew()
    assert await asker.responders.of(asker.authority()) is second


async def test_responders_are_ready_where_they_are_wanted(parts: Parts) -> None:
    await parts.admit()
    asker = Asker(parts)
    asker.responders._keep_ready = True
    parts.clock.time = START + LIFE / 2 + MINUTE
    await parts.rotate.run()
    assert parts.states(AuthorityKind.X509) == ["active", "prepared"]
    await asker.responders.renew()
    assert list(asker.responders._seats) == [asker.authority().id]
    # An authority that is forgotten takes its responder with it.
    parts.clock.time = START + LIFE + MINUTE
    for _ in range(3):
        await parts.rotate.run()
    await asker.responders.renew()
    known = {each.id for each in parts.signing.authorities.x509_set}
    assert asker.responders._seats.keys() <= known


async def test_a_revoked_responder_is_replaced(asker: Asker, parts: Parts) -> None:
    svid = await parts.svid()
    first = await asker.responders.of(asker.authority())
    await parts.end_one(first.serial)
    assert await asker.of(svid) == "good"
    second = await asker.responders.of(asker.authority())
    assert second.serial != first.serial


async def test_a_key_manager_that_is_away_stops_nothing_until_the_responder_ends(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    svid = await parts.svid()
    assert await asker.of(svid) == "good"
    responder = await asker.responders.of(asker.authority())
    asked = 0

    def away(key_id: str) -> Any:
        nonlocal asked
        asked += 1
        raise BackendUnavailable("the key manager does not answer")

    seat = asker.responders._seats[asker.authority().id]
    seat.responder = replace(responder, not_after=START + timedelta(minutes=50))
    with monkeypatch.context() as patch:
        patch.setattr(parts.keys, "load", away)
        parts.clock.time = START + timedelta(minutes=49)
        with pytest.raises(Exception, match="signing"):
            await asker.responders.renew()
        answer = await asker.ask([serial_of(svid)])
        assert statuses(answer) == ["good"]
        # Nobody can be told more than the responder's certificate lasts for.
        assert answer.next_update == START + timedelta(minutes=50)
        parts.clock.time += MINUTE
        asked = 0
        monkeypatch.setattr(ocsp_responders, "_FAILURE_SECONDS", 60.0)
        for _ in range(20):
            assert (await asker.ask([serial_of(svid)])).der == TRY_LATER
        assert asked <= 1  # a crowd does not become the key manager's
    monkeypatch.setattr(ocsp_responders, "_FAILURE_SECONDS", 0.0)
    assert statuses(await asker.ask([serial_of(svid)])) == ["good"]


async def test_nothing_is_certified_before_it_is_recorded(
    asker: Asker, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    svid = await parts.svid()
    recorded: list[bool] = []
    certify = signing_ocsp.certify

    async def watched(signing: Any, authority: Any, prepared: Any) -> Any:
        row = await parts.store.read(lambda repos: repos.credentials.get(prepared.serial))
        recorded.append(row.state is CredentialState.INTENT)
        assert row.intent.tbs_digest == prepared.tbs_digest
        assert row.intent.key_fingerprint == prepared.key_fingerprint
        return await certify(signing, authority, prepared)

    monkeypatch.setattr(signing_ocsp, "certify", watched)
    # A crowd at the first request makes one.
    answers = await asyncio.gather(*(asker.ask([serial_of(svid)]) for _ in range(10)))
    assert {each.outcome for each in answers} == {"good"}
    assert recorded == [True]


async def test_a_responder_has_no_identity(asker: Asker) -> None:
    answer = await asker.ask([7])
    [certificate] = ocsp.load_der_ocsp_response(answer.der).certificates
    for kind in (x509.SubjectAlternativeName, x509.AuthorityInformationAccess):
        with pytest.raises(x509.ExtensionNotFound):
            certificate.extensions.get_extension_for_class(kind)
    assert answer.outcome == "unknown"
