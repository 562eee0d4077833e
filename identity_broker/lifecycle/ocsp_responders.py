"""The keys that sign OCSP answers: one for each X.509 authority, in memory, certified for a day.

- A responder's certificate is a credential like any other: its intent is durable before it can be
  signed, under the broker's own SPIFFE ID, which it does not name.
- It is replaced at half of its life. While that fails the former one goes on until its end: a key
  manager that is away for hours stops no answer.
- One that was revoked is replaced at once, unless its authority is revoked: then nothing that
  authority certified can be better, and an answer that says so is worth more than none.
- A failure is remembered for a second: whoever asks meanwhile does not ask the key manager again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.credential import (
    CredentialIntent,
    CredentialKind,
    CredentialOutcome,
)
from identity_broker.errors import BrokerError
from identity_broker.signing import Signing
from identity_broker.signing import ocsp as signing_ocsp
from identity_broker.store import Store
from identity_broker.telemetry.logs import get_logger
from identity_ca.authority import Authority, AuthorityState
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key
from identity_ca.ocsp import OcspSigner

_log = get_logger("ocsp")

_FAILURE_SECONDS = 1.0
# A prepared authority has signed nothing, of a revoked one few ask: theirs are made when needed.
_KEPT_READY = frozenset({AuthorityState.ACTIVE, AuthorityState.OLD, AuthorityState.TAINTED})


@dataclass(frozen=True, slots=True)
class Responder:
    """A key at work, and its certificate's serial and validity."""

    signer: OcspSigner
    serial: str
    not_before: datetime
    not_after: datetime

    def is_valid(self, now: datetime) -> bool:
        """Whether verifiers accept what it signs at `now`."""
        return self.not_before <= now < self.not_after

    def is_due(self, now: datetime) -> bool:
        """Whether half of its life is over."""
        return now >= self.not_before + (self.not_after - self.not_before) / 2


@dataclass(slots=True)
class _Seat:
    """One authority's responder, and the last failure to make one."""

    lock: asyncio.Lock
    responder: Responder | None = None
    failure: BrokerError | None = None
    failed_at: float = 0.0


class Responders:
    """Makes responders, and replaces them in time.

    Args:
        is_revoked: whether the credential with that serial is revoked.
        keep_ready: make one for every authority that has signed, before anybody asks.
    """

    def __init__(
        self,
        *,
        signing: Signing,
        store: Store,
        clock: Clock,
        is_revoked: Callable[[str], bool],
        keep_ready: bool = False,
    ) -> None:
        self._signing = signing
        self._store = store
        self._clock = clock
        self._is_revoked = is_revoked
        self._keep_ready = keep_ready
        self._seats: dict[str, _Seat] = {}

    async def of(self, authority: Authority) -> Responder:
        """Return the authority's responder; the first time it is made.

        Raises:
            AuthorityUnavailable, SigningBackendUnavailable, StoreUnavailable: there is none now.
        """
        seat = self._seats.setdefault(authority.id, _Seat(asyncio.Lock()))
        if seat.responder is not None and self._is_usable(seat.responder, authority):
            return seat.responder
        async with seat.lock:
            if seat.responder is not None and self._is_usable(seat.responder, authority):
                return seat.responder  # somebody else made it while we waited
            if seat.failure is not None and time.monotonic() < seat.failed_at + _FAILURE_SECONDS:
                raise seat.failure
            return await self._replace(seat, authority)

    async def renew(self) -> None:
        """Replace what is due; with `keep_ready`, make what is missing.

        Raises:
            SigningBackendUnavailable, StoreUnavailable: some could not be made; those that are
                there go on.
        """
        now = self._clock.now()
        authorities = {item.id: item for item in self._signing.authorities.x509_set}
        for gone in self._seats.keys() - authorities.keys():
            del self._seats[gone]
        failed: BrokerError | None = None
        for authority in authorities.values():
            ready = self._keep_ready and authority.state in _KEPT_READY
            if authority.not_after <= now or not (ready or authority.id in self._seats):
                continue
            seat = self._seats.setdefault(authority.id, _Seat(asyncio.Lock()))
            async with seat.lock:
                if not self._is_due(seat.responder, authority):
                    continue
                try:
                    await self._replace(seat, authority)
                except BrokerError as error:
                    failed = error
        if failed is not None:
            raise failed

    def _is_usable(self, responder: Responder, authority: Authority) -> bool:
        if not responder.is_valid(self._clock.now()):
            return False
        return authority.state is AuthorityState.REVOKED or not self._is_revoked(responder.serial)

    def _is_due(self, responder: Responder | None, authority: Authority) -> bool:
        if responder is None or not self._is_usable(responder, authority):
            return True
        # What was cut to the authority's own end cannot be had longer.
        return responder.is_due(self._clock.now()) and responder.not_after < authority.not_after

    async def _replace(self, seat: _Seat, authority: Authority) -> Responder:
        try:
            made = await self._make(authority, seat.responder)
        except BrokerError as error:
            seat.failure, seat.failed_at = error, time.monotonic()
            _log.warning(
                "OCSP responder not certified",
                authority_id=authority.id,
                reason=error.reason,
                detail=error.detail,
            )
            raise
        seat.responder, seat.failure = made, None
        return made

    async def _make(self, authority: Authority, former: Responder | None) -> Responder:
        now = self._clock.now()
        private_key = generate_private_key(KeyAlgorithm.EC_P256)
        key = LocalSigningKey(f"memory:ocsp-{authority.id[:16]}@1", private_key)
        prepared = await signing_ocsp.prepare(self._signing, authority, key.public_key, now)
        intent = CredentialIntent(
            id=prepared.serial,
            kind=CredentialKind.X509,
            spiffe_id=names.broker_id(self._signing.trust_domain),
            entry_id="",
            entry_revision=0,
            node_id=None,
            authority_id=authority.id,
            key_fingerprint=prepared.key_fingerprint,
            tbs_digest=prepared.tbs_digest,
            not_before=prepared.not_before,
            not_after=prepared.not_after,
            recorded_at=now,
        )
        await self._store.ledger.intend([intent])
        certificate = await signing_ocsp.certify(self._signing, authority, prepared)
        digest = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
        supersedes = "" if former is None else former.serial
        self._store.ledger.conclude(
            [CredentialOutcome(prepared.serial, digest, self._clock.now(), supersedes)]
        )
        _log.info(
            "OCSP responder certified",
            authority_id=authority.id,
            serial=prepared.serial,
            not_after=prepared.not_after.isoformat(),
        )
        return Responder(
            OcspSigner(certificate=certificate, key=key),
            prepared.serial,
            prepared.not_before,
            prepared.not_after,
        )
