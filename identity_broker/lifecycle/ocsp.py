"""OCSP answers that know what was issued.

- "good" needs a row in the ledger: issued by the authority asked about, its outcome known, not
  expired, not revoked. What was never issued is "unknown", and so is an intent without an outcome:
  whoever holds such a certificate got it from a broker that died in between, and asks for another.
- "revoked" comes from memory, and from the ledger for what has expired since. Of an authority that
  is revoked everything is, whether we issued it or its thief: cACompromise, since its beginning.
- One answer is signed for one authority (RFC 6960 section 4.2.2.2). Authorities that are not ours,
  and several of ours in one request: unauthorized.
- An answer to a single request without a nonce is kept for half of its validity, and dropped in the
  moment its certificate is revoked or released, or an authority changes. "unknown" is not kept.
- When the change feed is lost, what is revoked is still said so; all else is tryLater.
- Nothing is raised: what cannot be answered has a status for that.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple

from cryptography import x509

from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    Credential,
    CredentialKind,
    CredentialState,
    RevocationReason,
)
from identity_broker.errors import BrokerError, Kind
from identity_broker.lifecycle.directory import Directory, Update
from identity_broker.lifecycle.ocsp_responders import Responders
from identity_broker.signing import Signing
from identity_broker.store import Repositories, Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority, AuthoritySet, AuthorityState
from identity_ca.ocsp import (
    CertId,
    CertStatus,
    IssuerHash,
    ResponseStatus,
    SingleAnswer,
    issuer_hashes,
    parse_request,
    refusal,
)

_log = get_logger("ocsp")

MOST_HELD = 10_000
"""Certificates whose answers are kept: about 15 MB."""
# A CertID has two hashes and, for each, its parameters there or left out.
_MOST_SPELLINGS = 4
_LOOKUP = 500
# Verifiers' clocks differ: as for certificates.
_BACKDATE = timedelta(seconds=10)


@dataclass(frozen=True, slots=True)
class OcspAnswer:
    """An answer, ready to be sent.

    Attributes:
        der: OCSPResponse.
        outcome: "good", "revoked", "unknown", "mixed" or the refusal's name in lower case.
        this_update, next_update: of all that is in it; None for a refusal.
        fresh_until: until when it may be sent again, and by caches; None: never.
    """

    der: bytes
    outcome: str
    this_update: datetime | None = None
    next_update: datetime | None = None
    fresh_until: datetime | None = None


class _Status(NamedTuple):
    status: CertStatus
    revoked_at: datetime | None = None
    reason: int | None = None


_GOOD = _Status(CertStatus.GOOD)
_UNKNOWN = _Status(CertStatus.UNKNOWN)


_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class _Held:
    """What is known of one certificate, until something about it changes.

    `good_until` is the certificate's end if the ledger had it as issued at `looked_at`; None when
    it is revoked. `answers` are by CertID.
    """

    authority_id: str
    good_until: datetime | None = None
    looked_at: datetime = _NEVER
    answers: dict[bytes, OcspAnswer] = field(default_factory=dict)


class Ocsp:
    """Answers OCSP requests.

    Args:
        validity: from an answer to its next update.
    """

    def __init__(
        self,
        *,
        signing: Signing,
        directory: Directory,
        store: Store,
        responders: Responders,
        clock: Clock,
        validity: timedelta,
    ) -> None:
        self._signing = signing
        self._directory = directory
        self._lookups = _Lookups(store)
        self._responders = responders
        self._clock = clock
        self._validity = validity
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._changes = 0
        self._known: AuthoritySet | None = None
        self._owners: dict[IssuerHash, Authority] = {}
        directory.listen(self._on_update)

    async def answer(self, request: bytes) -> OcspAnswer:
        """Return the answer to an OCSPRequest, DER. Never raises for what is in it."""
        try:
            parsed = parse_request(request)
            if isinstance(parsed, ResponseStatus):
                return _refused(parsed)
            authority = self._owner(parsed.cert_ids)
            if authority is None:
                return _refused(ResponseStatus.UNAUTHORIZED)
            alone = len(parsed.cert_ids) == 1 and parsed.nonce is None
            if alone and (held := await self._kept(parsed.cert_ids[0], authority)) is not None:
                return held
            return await self._fresh(parsed.cert_ids, parsed.nonce, authority, keep=alone)
        except BrokerError as error:
            if error.kind in (Kind.UNAVAILABLE, Kind.EXHAUSTED):
                return _refused(ResponseStatus.TRY_LATER)
            _log.error("OCSP request not answered", reason=error.reason, detail=error.detail)
        except Exception:  # noqa: BLE001  # RFC 6960 has a word for a bug, and callers wait for it
            _log.exception("OCSP request not answered")
        return _refused(ResponseStatus.INTERNAL_ERROR)

    # --- whose it is --------------------------------------------------------------------------

    def _owner(self, cert_ids: Iterable[CertId]) -> Authority | None:
        """The authority of ours that all of them name; None when they do not."""
        current = self._signing.authorities.x509_set
        if current is not self._known:
            self._owners = {
                named: authority
                for authority in current
                for named in issuer_hashes(x509.load_der_x509_certificate(authority.chain[0]))
            }
            self._known = current
        found: Authority | None = None
        for cert_id in cert_ids:
            owner = None if cert_id.issuer is None else self._owners.get(cert_id.issuer)
            if owner is None or (found is not None and owner is not found):
                return None
            found = owner
        if found is None or found.not_after <= self._clock.now():
            return None
        return found

    def _is_denied(self, authority: Authority) -> bool:
        return (
            authority.state is AuthorityState.REVOKED
            or authority.id in self._directory.denied_authorities()
        )

    # --- what is kept -------------------------------------------------------------------------

    async def _kept(self, cert_id: CertId, authority: Authority) -> OcspAnswer | None:
        serial = _ledger_id(cert_id)
        held = self._held.get(serial)
        if held is None or self._is_denied(authority):
            return None
        answer = held.answers.get(cert_id.der)
        if answer is None or answer.this_update is None or answer.fresh_until is None:
            return None
        now = self._clock.now()
        if not answer.this_update <= now < answer.fresh_until:
            return None
        if held.good_until is not None:
            if now >= held.good_until:
                return None
            await self._directory.check()
            if self._held.get(serial) is not held:
                return None  # dropped in this moment
        self._held.move_to_end(serial)
        return answer

    def _keep(self, cert_id: CertId, authority: Authority, answer: OcspAnswer) -> None:
        held = self._hold(_ledger_id(cert_id), authority, None)
        if cert_id.der in held.answers or len(held.answers) < _MOST_SPELLINGS:
            held.answers[cert_id.der] = answer

    def _hold(self, serial: str, authority: Authority, good_until: datetime | None) -> _Held:
        held = self._held.get(serial)
        if held is None or held.authority_id != authority.id:
            held = self._held[serial] = _Held(authority.id)
            if len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
        if good_until is not None:
            held.good_until, held.looked_at = good_until, self._clock.now()
        return held

    def _on_update(self, update: Update) -> None:
        if update.authorities_changed:
            self._held.clear()
        for revocation in update.revocations:
            self._held.pop(revocation.id, None)
        for credential_id in update.released:
            self._held.pop(credential_id, None)
        if update.authorities_changed or update.revocations or update.released:
            self._changes += 1

    # --- answering ----------------------------------------------------------------------------

    async def _fresh(
        self, cert_ids: Sequence[CertId], nonce: bytes | None, authority: Authority, *, keep: bool
    ) -> OcspAnswer:
        responder = await self._responders.of(authority)
        changes = self._changes
        found = await self._statuses({_ledger_id(each) for each in cert_ids}, authority)
        # From here on nothing is waited for: what is signed is what is known.
        now = self._clock.now()
        this_update = now - _BACKDATE
        next_update = min(now + self._validity, responder.not_after)
        der = responder.signer.sign(
            [
                SingleAnswer(
                    each.der,
                    said.status,
                    this_update,
                    next_update,
                    revoked_at=said.revoked_at,
                    reason=said.reason,
                )
                for each in cert_ids
                for said in (found[_ledger_id(each)],)
            ],
            produced_at=now,
            nonce=nonce,
        )
        outcomes = {said.status.name.lower() for said in found.values()}
        outcome = outcomes.pop() if len(outcomes) == 1 else "mixed"
        answer = OcspAnswer(der, outcome, this_update, next_update)
        # There is no end to the serial numbers somebody may ask about: unknown ones, and those of
        # an authority of which everything is revoked, are not kept. Nor is what something that
        # changed while it was looked up may have changed.
        if not keep or outcome == "unknown" or self._is_denied(authority):
            return answer
        answer = replace(answer, fresh_until=now + (next_update - now) / 2)
        if changes == self._changes:
            self._keep(cert_ids[0], authority, answer)
        return answer

    # --- what is known ------------------------------------------------------------------------

    async def _statuses(self, serials: Set[str], authority: Authority) -> dict[str, _Status]:
        """What there is to say of these serial numbers.

        Raises:
            StoreUnavailable: the ledger does not answer, or the change feed is lost.
        """
        if self._is_denied(authority):
            since = authority.not_before
            lost = _Status(CertStatus.REVOKED, since, RevocationReason.CA_COMPROMISE.value)
            return dict.fromkeys(serials, lost)
        unsure = [each for each in serials if self._revoked(each, authority) is None]
        found: dict[str, _Status] = {}
        if unsure:
            await self._directory.check()
            found = {each: _GOOD for each in unsure if self._is_held_good(each, authority)}
            missing = [each for each in unsure if each not in found]
            if missing:
                found |= await self._look_up(missing, authority)
        # Looked at again: some may have been revoked while the ledger was read.
        return {
            each: self._revoked(each, authority) or found.get(each, _UNKNOWN) for each in serials
        }

    def _revoked(self, serial: str, authority: Authority) -> _Status | None:
        revocation = self._directory.revocation(serial)
        if revocation is None:
            return None
        if revocation.kind is not CredentialKind.X509 or revocation.authority_id != authority.id:
            return _UNKNOWN
        return _Status(CertStatus.REVOKED, revocation.revoked_at, revocation.reason.value)

    def _is_held_good(self, serial: str, authority: Authority) -> bool:
        held = self._held.get(serial)
        if held is None or held.good_until is None or held.authority_id != authority.id:
            return False
        until = min(held.good_until, held.looked_at + self._validity)
        return held.looked_at <= self._clock.now() < until

    async def _look_up(self, serials: Sequence[str], authority: Authority) -> dict[str, _Status]:
        changes = self._changes
        found = await self._lookups.find(serials)
        waiting = [each.id for each in found.values() if each.state is CredentialState.INTENT]
        if waiting:
            # Outcomes are written a moment later than certificates are handed out.
            await self._lookups.settle()
            found |= await self._lookups.find(waiting)
        now = self._clock.now()
        statuses = {}
        for credential in found.values():
            status = _status_of(credential, authority, now)
            statuses[credential.id] = status
            if status is _GOOD and changes == self._changes:
                self._hold(credential.id, authority, credential.intent.not_after)
        return statuses


def _status_of(credential: Credential, authority: Authority, now: datetime) -> _Status:
    intent = credential.intent
    if intent.kind is not CredentialKind.X509 or intent.authority_id != authority.id:
        return _UNKNOWN
    if credential.state is CredentialState.REVOKED and credential.revoked_at is not None:
        reason = None if credential.reason is None else credential.reason.value
        return _Status(CertStatus.REVOKED, credential.revoked_at, reason)
    # A digest is the outcome: without one nobody knows whether there is a certificate. Whether it
    # may be valid is for its validity to say: a clock that ran ahead expires what is valid again.
    return _GOOD if credential.digest and now < intent.not_after else _UNKNOWN


def _ledger_id(cert_id: CertId) -> str:
    """How the ledger would call it; a number that is not ours finds nothing there."""
    return f"{cert_id.serial:040x}"


def _refused(status: ResponseStatus) -> OcspAnswer:
    return OcspAnswer(refusal(status), status.name.lower())


class _Lookups:
    """Reads the ledger by id: what is asked for while one read is under way goes into the next."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: dict[str, asyncio.Future[Credential | None]] = {}
        self._reading: asyncio.Task[None] | None = None

    async def settle(self) -> None:
        """Return when the outcomes of what was handed out by now are in the ledger.

        Raises:
            StoreUnavailable: they are not.
        """
        await self._store.ledger.flush()

    async def find(self, ids: Sequence[str]) -> dict[str, Credential]:
        """Return those that the ledger has, by id, as they are committed now or later.

        Raises:
            StoreUnavailable: the ledger does not answer.
        """
        asked = {each: self._ask(each) for each in ids}
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        # Not gathered: one who gives up must not take the answer from the others.
        await asyncio.wait(asked.values())
        found = ((each, future.result()) for each, future in asked.items())
        return {each: credential for each, credential in found if credential is not None}

    def _ask(self, credential_id: str) -> asyncio.Future[Credential | None]:
        future = self._asked.get(credential_id)
        if future is None:
            future = asyncio.get_running_loop().create_future()
            # A failure is looked at even when all who asked are gone.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._asked[credential_id] = future
        return future

    async def _read(self) -> None:
        try:
            while self._asked:
                chunk = dict(islice(self._asked.items(), _LOOKUP))
                for each in chunk:
                    del self._asked[each]
                await self._read_chunk(chunk)
        finally:
            self._reading = None

    async def _read_chunk(self, chunk: dict[str, asyncio.Future[Credential | None]]) -> None:
        def read(repos: Repositories) -> dict[str, Credential]:
            return {each.id: each for each in repos.credentials.find_many(chunk.keys())}

        try:
            found = await self._store.read(read)
        except Exception as error:  # noqa: BLE001  # whoever asked is told
            for future in chunk.values():
                if not future.done():
                    future.set_exception(error)
            return
        for credential_id, future in chunk.items():
            if not future.done():
                future.set_result(found.get(credential_id))
