"""The one door from the event loop to the blocking CA library.

- Local keys sign on the loop: one signature costs less than handing it to a thread. CSRs of several
  orders are checked in one thread, beside the loop.
- Remote keys sign in bounded threads, a call's orders in one round trip; `lifecycle.issue` is what
  gathers the orders of many callers into one call.
- What is prepared is signed by the authority that prepared it, even when that was replaced a
  moment ago; the authorities are one immutable snapshot, swapped in one assignment.
- Every CAError leaves here as a BrokerError; nothing below is translated elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Generic, Protocol, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from identity_broker.domain.grant import Grant, GrantKind
from identity_broker.errors import AuthorityUnavailable, BrokerError
from identity_broker.signing.errors import translate
from identity_ca.authority import (
    Authority,
    AuthorityKind,
    AuthoritySet,
    AuthorityState,
    authority_bundle,
)
from identity_ca.bundle import TrustBundle
from identity_ca.csr import CertificateRequest, parse_csr
from identity_ca.distribution import DistributionPoints
from identity_ca.errors import CAError, KeyNotFound
from identity_ca.issuer import PreparedX509, X509Credential, X509Issuer
from identity_ca.jwt import JwtCredential, JwtIssuer, PreparedJwt
from identity_ca.keys import (
    KeyAlgorithm,
    KeyManager,
    SigningKey,
    key_fingerprint,
    spki_der,
)
from identity_ca.profile import BROKER, NODE, WORKLOAD, X509Profile
from identity_ca.spiffe_id import TrustDomain
from identity_ca.upstream import UpstreamAuthority

T = TypeVar("T")
# 128 bits of the key's fingerprint: unique, and stable across restarts.
_KEY_ID_DIGITS = 32

_PROFILES: dict[GrantKind, X509Profile] = {
    GrantKind.WORKLOAD: WORKLOAD,
    GrantKind.NODE: NODE,
    GrantKind.BROKER: BROKER,
}

# Fewer CSRs than this are checked sooner than a busy loop gives a thread its turn.
_WORTH_A_THREAD = 48
# Other work gets its turn after this many certificates.
_STRETCH = 16


def _checked(
    requests: Sequence[tuple[Set[KeyAlgorithm], bytes]],
) -> list[CertificateRequest | BrokerError]:
    found: list[CertificateRequest | BrokerError] = []
    for allowed, csr in requests:
        try:
            found.append(parse_csr(csr, allowed=allowed))
        except CAError as error:
            found.append(translate(error))
    return found


class _Prepared(Protocol):
    @property
    def authority_id(self) -> str: ...


P = TypeVar("P", bound=_Prepared)
C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class _Bound(Generic[P, C]):
    """How one authority signs, and whether that is a round trip."""

    sign_many: Callable[[Sequence[P]], list[C]]
    remote: bool


@dataclass(frozen=True, slots=True)
class Authorities:
    """The authorities in force: one generation, swapped whole.

    `x509_issuers` and `jwt_issuers` also hold the generation before this one, for what it had
    prepared when it was replaced.
    """

    x509: X509Issuer | None
    jwt: JwtIssuer | None
    x509_issuers: Mapping[str, _Bound[PreparedX509, X509Credential]]
    jwt_issuers: Mapping[str, _Bound[PreparedJwt, JwtCredential]]
    x509_set: AuthoritySet
    jwt_set: AuthoritySet
    trusted_ids: frozenset[str]
    bundle: TrustBundle


class Signing:
    """Prepares and signs credentials with the active authorities.

    Args:
        trust_domain: the trust domain served.
        keys: where private keys live.
        upstream: who certifies X.509 authorities.
        refresh_hint: how often bundle readers should come back.
        points: where X.509-SVIDs say that revocation is asked about; None for nowhere.
        observe: told the kind and the seconds of each round of signatures.
        threads: how many remote operations may be under way at once.
    """

    def __init__(
        self,
        *,
        trust_domain: TrustDomain,
        keys: KeyManager,
        upstream: UpstreamAuthority,
        refresh_hint: timedelta,
        points: DistributionPoints | None = None,
        observe: Callable[[str, float], object] = lambda _kind, _seconds: None,
        threads: int = 8,
    ) -> None:
        self.trust_domain = trust_domain
        self._keys = keys
        self._upstream = upstream
        self._refresh_hint = refresh_hint
        self._points = points
        self._observe = observe
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="signing")
        self._csr_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="csr")
        self._authorities: Authorities | None = None

    @property
    def authorities(self) -> Authorities:
        """The authorities in force.

        Raises:
            AuthorityUnavailable: none has been installed yet.
        """
        if self._authorities is None:
            raise AuthorityUnavailable(retry_after=1.0)
        return self._authorities

    @property
    def bundle(self) -> TrustBundle:
        """The trust domain's bundle."""
        return self.authorities.bundle

    @property
    def x509_is_remote(self) -> bool:
        """Whether an X.509 signature is a round trip."""
        issuer = self.authorities.x509
        return issuer is not None and issuer.key.remote

    @property
    def jwt_is_remote(self) -> bool:
        """Whether a JWT signature is a round trip."""
        authorities = self.authorities
        issuer = authorities.jwt
        return issuer is not None and authorities.jwt_issuers[issuer.authority_id].remote

    def is_trusted(self, authority_id: str) -> bool:
        """Whether that X.509 authority is ours and what it signed is still to be accepted."""
        return authority_id in self.authorities.trusted_ids

    # --- preparing: no key touched ----------------------------------------------------------------

    async def prepare_x509_many(
        self, orders: Sequence[tuple[Grant, bytes]], now: datetime
    ) -> list[PreparedX509 | BrokerError]:
        """Check CSRs and encode the certificates that the grants allow; each its own result.

        The CSRs of several orders are checked in a thread: that is most of the work, and it does
        not hold the interpreter.
        """
        requests = [(_PROFILES[grant.kind].key_algorithms, csr) for grant, csr in orders]
        if len(requests) < _WORTH_A_THREAD:
            checked = _checked(requests)
        else:
            loop = asyncio.get_running_loop()
            checked = await loop.run_in_executor(self._csr_thread, _checked, requests)
        prepared: list[PreparedX509 | BrokerError] = []
        for at, ((grant, _), request) in enumerate(zip(orders, checked, strict=True)):
            if at and at % _STRETCH == 0:
                await asyncio.sleep(0)
            if isinstance(request, BrokerError):
                prepared.append(request)
                continue
            try:
                prepared.append(self.prepare_x509(grant, request, now))
            except BrokerError as error:
                prepared.append(error)
        return prepared

    async def prepare_jwt_many(
        self, orders: Sequence[tuple[Grant, Sequence[str]]], now: datetime
    ) -> list[PreparedJwt | BrokerError]:
        """Encode the tokens that the grants allow; each its own result."""
        prepared: list[PreparedJwt | BrokerError] = []
        for at, (grant, audiences) in enumerate(orders):
            if at and at % _STRETCH == 0:
                await asyncio.sleep(0)
            try:
                prepared.append(self.prepare_jwt(grant, audiences, now))
            except BrokerError as error:
                prepared.append(error)
        return prepared

    def prepare_x509(
        self, grant: Grant, csr: bytes | CertificateRequest, now: datetime
    ) -> PreparedX509:
        """Check a CSR and encode the certificate that the grant allows.

        Raises:
            CsrRejected, KeyTooWeak, PolicyViolation, LintFailed: the CSR or the grant.
            AuthorityUnavailable: no X.509 authority is active.
        """
        issuer = self.authorities.x509
        if issuer is None:
            raise AuthorityUnavailable(retry_after=5.0)
        try:
            return issuer.prepare(
                csr=csr,
                spiffe_id=grant.spiffe_id,
                profile=_PROFILES[grant.kind],
                ttl=grant.x509_ttl,
                now=now,
                dns_names=grant.dns_names,
            )
        except CAError as error:
            raise translate(error) from error

    def prepare_jwt(self, grant: Grant, audiences: Sequence[str], now: datetime) -> PreparedJwt:
        """Encode the token that the grant allows.

        Raises:
            AudienceInvalid, PolicyViolation: the audiences or the grant.
            AuthorityUnavailable: no JWT authority is active.
        """
        issuer = self.authorities.jwt
        if issuer is None:
            raise AuthorityUnavailable(retry_after=5.0)
        try:
            return issuer.prepare(
                spiffe_id=grant.spiffe_id, audiences=audiences, ttl=grant.jwt_ttl, now=now
            )
        except CAError as error:
            raise translate(error) from error

    # --- signing: after the intent is durable ---------------------------------------------------

    async def sign_x509(self, prepared: Sequence[PreparedX509]) -> list[X509Credential]:
        """Sign what was prepared; each may be signed once.

        Raises:
            SigningBackendUnavailable: the key manager did not answer; nothing was handed out.
            AuthorityUnavailable: the authority is not in force any more; prepare again.
        """
        return await self._sign("x509", self.authorities.x509_issuers, prepared)

    async def sign_jwt(self, prepared: Sequence[PreparedJwt]) -> list[JwtCredential]:
        """Sign what was prepared; each may be signed once.

        Raises:
            SigningBackendUnavailable: the key manager did not answer; nothing was handed out.
            AuthorityUnavailable: the authority is not in force any more; prepare again.
        """
        return await self._sign("jwt", self.authorities.jwt_issuers, prepared)

    async def _sign(
        self,
        kind: str,
        issuers: Mapping[str, _Bound[P, C]],
        prepared: Sequence[P],
    ) -> list[C]:
        authority_id = prepared[0].authority_id
        if any(item.authority_id != authority_id for item in prepared):
            # The authority was replaced while this batch was prepared: each part its own.
            parts = [await self._sign(kind, issuers, [item]) for item in prepared]
            return [credential for part in parts for credential in part]
        bound = issuers.get(authority_id)
        if bound is None:
            raise AuthorityUnavailable(
                "the signing authority was replaced in this moment", retry_after=0.1
            )
        started = time.perf_counter()
        if bound.remote:
            signed = await self._in_thread(lambda: bound.sign_many(prepared))
        else:
            try:
                signed = bound.sign_many(prepared)
            except CAError as error:
                raise translate(error) from error
        self._observe(kind, time.perf_counter() - started)
        return signed

    # --- authorities ----------------------------------------------------------------------------

    async def new_authority(
        self, kind: AuthorityKind, algorithm: KeyAlgorithm, ttl: timedelta, now: datetime
    ) -> Authority:
        """Make a key and, for X.509, have the upstream certify it. The result is PREPARED.

        Raises:
            SigningBackendUnavailable: the key manager or the upstream did not do it.
        """
        return await self._in_thread(lambda: self._new_authority(kind, algorithm, ttl, now))

    def _new_authority(
        self, kind: AuthorityKind, algorithm: KeyAlgorithm, ttl: timedelta, now: datetime
    ) -> Authority:
        key = self._keys.create(kind.value, algorithm)
        spki = spki_der(key.public_key)
        if kind is AuthorityKind.JWT:
            return Authority(
                id=key_fingerprint(key.public_key)[:_KEY_ID_DIGITS],
                kind=kind,
                state=AuthorityState.PREPARED,
                key_id=key.key_id,
                algorithm=algorithm,
                public_key_der=spki,
                chain=(),
                roots=(),
                upstream="none",
                created_at=now,
                not_before=now,
                not_after=now + ttl,
            )
        signed = self._upstream.certify(key, trust_domain=self.trust_domain, ttl=ttl, now=now)
        own = signed.chain[0]
        subject_key = own.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return Authority(
            id=subject_key.digest.hex(),
            kind=kind,
            state=AuthorityState.PREPARED,
            key_id=key.key_id,
            algorithm=algorithm,
            public_key_der=spki,
            chain=tuple(certificate.public_bytes(Encoding.DER) for certificate in signed.chain),
            roots=tuple(certificate.public_bytes(Encoding.DER) for certificate in signed.roots),
            upstream=self._upstream.name,
            created_at=now,
            not_before=own.not_valid_before_utc,
            not_after=own.not_valid_after_utc,
        )

    async def missing_keys(self, authorities: Sequence[Authority]) -> list[Authority]:
        """Return those of the authorities whose key the key manager does not have (any more).

        Raises:
            SigningBackendUnavailable: the key manager did not answer.
        """

        def find() -> list[Authority]:
            missing = []
            for authority in authorities:
                try:
                    key = self._keys.load(authority.key_id)
                except KeyNotFound:
                    missing.append(authority)
                    continue
                if spki_der(key.public_key) != authority.public_key_der:
                    missing.append(authority)
            return missing

        return await self._in_thread(find)

    async def install(self, x509_set: AuthoritySet, jwt_set: AuthoritySet, sequence: int) -> None:
        """Put a generation of authorities into force.

        Raises:
            SigningBackendUnavailable: an active authority's key could not be loaded.
        """
        self._authorities = await self._in_thread(lambda: self._build(x509_set, jwt_set, sequence))

    def _build(self, x509_set: AuthoritySet, jwt_set: AuthoritySet, sequence: int) -> Authorities:
        x509_issuer = jwt_issuer = None
        x509_issuers: dict[str, _Bound[PreparedX509, X509Credential]] = {}
        jwt_issuers: dict[str, _Bound[PreparedJwt, JwtCredential]] = {}
        before = self._authorities
        if before is not None:
            x509_issuers = _still_trusted(before.x509, before.x509_issuers, x509_set)
            jwt_issuers = _still_trusted(before.jwt, before.jwt_issuers, jwt_set)
        if x509_set.active is not None:
            active = x509_set.active
            key = self._keys.load(active.key_id)
            x509_issuer = X509Issuer(
                authority_id=active.id,
                trust_domain=self.trust_domain,
                key=key,
                chain=[x509.load_der_x509_certificate(der) for der in active.chain],
                points=self._points,
            )
            x509_issuers[active.id] = _Bound(x509_issuer.sign_many, key.remote)
        if jwt_set.active is not None:
            active = jwt_set.active
            key = self._keys.load(active.key_id)
            jwt_issuer = JwtIssuer(
                authority_id=active.id,
                trust_domain=self.trust_domain,
                key=key,
                not_after=active.not_after,
            )
            jwt_issuers[active.id] = _Bound(jwt_issuer.sign_many, key.remote)
        bundle = authority_bundle(
            x509_set,
            jwt_set,
            trust_domain=self.trust_domain,
            sequence=sequence,
            refresh_hint=self._refresh_hint,
        )
        return Authorities(
            x509=x509_issuer,
            jwt=jwt_issuer,
            x509_issuers=x509_issuers,
            jwt_issuers=jwt_issuers,
            x509_set=x509_set,
            jwt_set=jwt_set,
            trusted_ids=frozenset(authority.id for authority in x509_set.trusted),
            bundle=bundle,
        )

    async def with_key(self, authority: Authority, work: Callable[[SigningKey], T]) -> T:
        """Run `work` with the authority's private key, active or not, in a thread.

        Raises:
            AuthorityUnavailable: the key manager does not have the key (any more).
            SigningBackendUnavailable: the key manager did not answer.
            BrokerError: what `work` refused.
        """

        def run() -> T:
            try:
                key = self._keys.load(authority.key_id)
            except KeyNotFound as error:
                raise AuthorityUnavailable(
                    "the key of this signing authority is lost", detail=authority.id
                ) from error
            return work(key)

        return await self._in_thread(run)

    async def with_upstream(self, work: Callable[[UpstreamAuthority], T]) -> T:
        """Run `work` with the upstream in a thread; raises SigningBackendUnavailable."""
        return await self._in_thread(lambda: work(self._upstream))

    # --- dependencies -----------------------------------------------------------------------------

    async def check_keys(self) -> None:
        """Check the key manager, signing nothing.

        Raises:
            SigningBackendUnavailable: it cannot be used now.
        """
        await self._in_thread(self._keys.check)

    async def close(self) -> None:
        """Let go of the key manager and the upstream."""
        await self._in_thread(self._keys.close)
        await self._in_thread(self._upstream.close)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._csr_thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except CAError as error:
            raise translate(error) from error


def _still_trusted(
    issuer: X509Issuer | JwtIssuer | None,
    bound: Mapping[str, _Bound[P, C]],
    authorities: AuthoritySet,
) -> dict[str, _Bound[P, C]]:
    """The last generation's way to sign, as long as what it signs is accepted."""
    if issuer is None:
        return {}
    trusted = {authority.id for authority in authorities.trusted}
    last = issuer.authority_id
    return {last: bound[last]} if last in trusted else {}
