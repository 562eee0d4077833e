"""Identities over real keys and certificates, granted and withdrawn by the test.

`FakeIdentities` stands where the agent's own `Identities` will: the faces (Workload API, SDS)
cannot tell the difference, and tests/support/workload_contract.py holds both to the same promises.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from identity_broker.agent.identity import (
    BundleState,
    Caller,
    JwtIdentity,
    WorkloadState,
    X509Identity,
)
from identity_broker.domain.clock import Clock, SystemClock
from identity_broker.errors import AudienceInvalid, BrokerError, NoIdentity, TokenInvalid
from identity_ca import errors as ca_errors
from identity_ca.authority_certificate import build_root
from identity_ca.bundle import JwtKey, TrustBundle
from identity_ca.crl import RevokedEntry, build_crl
from identity_ca.issuer import X509Issuer
from identity_ca.jwt import JwtCredential, JwtIssuer, VerifiedJwt, verify_jwt_svid
from identity_ca.keys import (
    KeyAlgorithm,
    LocalSigningKey,
    generate_private_key,
    signature_hash,
    spki_der,
)
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from support.ca import intermediate_of, request_by

_DAY = timedelta(days=1)
Who = Callable[[Caller], bool]


def everybody(_caller: Caller) -> bool:
    return True


def user(uid: int) -> Who:
    """Processes of that user."""
    return lambda caller: caller.uid == uid


class _Authorities:
    """What one trust domain signs with: a root, an intermediate below it, a JWT key."""

    def __init__(self, trust_domain: TrustDomain, generation: int, now: datetime) -> None:
        root_key = _key(f"root-{generation}")
        ca_key = _key(f"x509-{generation}")
        jwt_key = _key(f"jwt-{generation}")
        self.root = build_root(
            root_key, trust_domain=trust_domain, ttl=365 * _DAY, now=now, path_length=1
        )
        below = intermediate_of(
            ca_key, issuer_key=root_key, issuer=self.root, trust_domain=trust_domain, now=now
        )
        self.x509 = X509Issuer(
            authority_id=f"x509-{generation}",
            trust_domain=trust_domain,
            key=ca_key,
            chain=[below],
        )
        self.jwt = JwtIssuer(
            authority_id=f"jwt-{generation}",
            trust_domain=trust_domain,
            key=jwt_key,
            not_after=now + 30 * _DAY,
        )
        self.jwt_public = JwtKey(f"jwt-{generation}", spki_der(jwt_key.public_key))

    @property
    def root_der(self) -> bytes:
        return self.root.public_bytes(Encoding.DER)


def _key(name: str, algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256) -> LocalSigningKey:
    return LocalSigningKey(f"memory:{name}@1", generate_private_key(algorithm))


@dataclass
class Grant:
    """One entry: who gets what."""

    spiffe_id: SpiffeId
    who: Who
    hint: str
    algorithm: KeyAlgorithm
    ttl: timedelta
    federates_with: tuple[str, ...]
    identity: X509Identity = field(repr=False)


class FakeIdentities:
    """Implements `WorkloadIdentities`.

    Attributes:
        refusal: raised instead of every answer while it is not None (AgentNotReady, …); a watch
            that is open ends with it at the next change.
        bundles_for_all: whether a process without an identity gets the bundles.
        watchers: how many watches are open.
    """

    def __init__(self, trust_domain: str = "example.org", clock: Clock | None = None) -> None:
        self.trust_domain = TrustDomain(trust_domain)
        self.clock = clock or SystemClock()
        self.refusal: BrokerError | None = None
        self.bundles_for_all = False
        self.watchers = 0
        self.grants: list[Grant] = []
        self._generation = 1
        self._revision = 1
        self._crl_number = 0
        self._revoked: dict[str, RevokedEntry] = {}
        self._changed = asyncio.Event()
        self._authorities = [_Authorities(self.trust_domain, 1, self.clock.now())]
        self._foreign: dict[str, _Authorities] = {}
        self._crls = self._signed_crls()

    # --- what the test does -------------------------------------------------------------------

    def grant(
        self,
        path: str,
        *,
        who: Who = everybody,
        hint: str = "",
        algorithm: KeyAlgorithm = KeyAlgorithm.EC_P256,
        ttl: timedelta = timedelta(hours=1),
        federates_with: Sequence[str] = (),
    ) -> Grant:
        """Register the SPIFFE ID of that path ("/payments/api") for whom `who` says."""
        spiffe_id = SpiffeId.parse(f"spiffe://{self.trust_domain}{path}")
        grant = Grant(
            spiffe_id,
            who,
            hint,
            algorithm,
            ttl,
            tuple(federates_with),
            self._issued(spiffe_id, hint, algorithm, ttl),
        )
        self.grants.append(grant)
        self.announce()
        return grant

    def rotate(self, grant: Grant | None = None) -> None:
        """A new key and a new SVID for one grant, or for all."""
        for each in [grant] if grant else self.grants:
            each.identity = self._issued(each.spiffe_id, each.hint, each.algorithm, each.ttl)
        self.announce()

    def withdraw(self, grant: Grant) -> None:
        """Take the entry away."""
        self.grants.remove(grant)
        self.announce()

    def revoke(self, grant: Grant) -> str:
        """Put the grant's SVID on the CRL, give it another one; return the revoked serial."""
        serial = grant.identity.serial
        self._revoked[serial] = RevokedEntry(int(serial, 16), self.clock.now(), 1)
        self._crls = self._signed_crls()
        self.rotate(grant)
        return serial

    def prepare_authority(self) -> None:
        """Publish a second root, intermediate and JWT key, which sign nothing yet."""
        self._generation += 1
        self._authorities.append(
            _Authorities(self.trust_domain, self._generation, self.clock.now())
        )
        self._crls = self._signed_crls()
        self.announce()

    def activate_authority(self) -> None:
        """Issue everything again with the authority that was prepared last."""
        self._authorities.insert(0, self._authorities.pop())
        self.rotate()

    def rotate_authority(self) -> None:
        """Both at once, as no broker would do it while peers look on."""
        self.prepare_authority()
        self.activate_authority()

    def retire_authorities(self) -> None:
        """Take all authorities but the newest out of the bundle."""
        del self._authorities[1:]
        self._crls = self._signed_crls()
        self.announce()

    def federate(self, trust_domain: str) -> None:
        """Know that domain's bundle; grants that federate with it carry it."""
        self._foreign[trust_domain] = _Authorities(TrustDomain(trust_domain), 1, self.clock.now())
        self.announce()

    def unfederate(self, trust_domain: str) -> None:
        """Forget the bundle."""
        del self._foreign[trust_domain]
        self.announce()

    def foreign_token(self, trust_domain: str, path: str, audience: str) -> str:
        """A JWT-SVID that the other trust domain made."""
        return self._token(
            self._foreign[trust_domain].jwt,
            SpiffeId.parse(f"spiffe://{trust_domain}{path}"),
            [audience],
        ).token

    def refuse(self, error: BrokerError | None) -> None:
        """Answer with that error from now on; None: answer again."""
        self.refusal = error
        self.announce()

    def announce(self) -> None:
        """Wake every watch."""
        self._revision += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle(
            self.trust_domain,
            x509_authorities=tuple(each.root_der for each in self._authorities),
            jwt_keys=tuple(each.jwt_public for each in self._authorities),
            sequence=self._generation,
        )

    @property
    def federated(self) -> dict[str, TrustBundle]:
        return {
            name: TrustBundle(
                TrustDomain(name),
                x509_authorities=(each.root_der,),
                jwt_keys=(each.jwt_public,),
                sequence=1,
            )
            for name, each in self._foreign.items()
        }

    @property
    def crls(self) -> tuple[bytes, ...]:
        return self._crls

    # --- WorkloadIdentities -------------------------------------------------------------------

    async def watch(self, caller: Caller) -> AsyncIterator[WorkloadState]:
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                state = self._state(caller)
                caller.check()
                yield state
                await changed.wait()
        finally:
            self.watchers -= 1

    async def watch_bundles(self, caller: Caller) -> AsyncIterator[BundleState]:
        self.watchers += 1
        try:
            while True:
                changed = self._changed
                if self.refusal is not None:
                    raise self.refusal
                mine = [grant for grant in self.grants if grant.who(caller)]
                if not mine and not self.bundles_for_all:
                    raise NoIdentity
                caller.check()
                yield BundleState(self.bundle, self._federated_for(mine), self._crls)
                await changed.wait()
        finally:
            self.watchers -= 1

    async def jwt_svids(
        self, caller: Caller, audiences: Sequence[str], spiffe_id: str | None
    ) -> list[JwtIdentity]:
        if self.refusal is not None:
            raise self.refusal
        caller.check()
        mine = [
            grant
            for grant in self.grants
            if grant.who(caller) and spiffe_id in (None, str(grant.spiffe_id))
        ]
        if not mine:
            raise NoIdentity
        return [self._jwt(grant, audiences) for grant in mine]

    async def validate_jwt(self, caller: Caller, token: str, audience: str) -> VerifiedJwt:
        if self.refusal is not None:
            raise self.refusal
        caller.check()
        federated = self._federated_for([grant for grant in self.grants if grant.who(caller)])
        last: ca_errors.TokenRejected | None = None
        for bundle in (self.bundle, *federated.values()):
            try:
                return verify_jwt_svid(
                    token, bundle=bundle, audience=audience, now=self.clock.now()
                )
            except ca_errors.TokenRejected as exc:
                last = exc
            except ca_errors.AudienceInvalid as exc:
                raise AudienceInvalid(exc.message) from exc
        raise TokenInvalid(last.message if last else "") from last

    # --- inside -------------------------------------------------------------------------------

    def _state(self, caller: Caller) -> WorkloadState:
        if self.refusal is not None:
            raise self.refusal
        mine = [grant for grant in self.grants if grant.who(caller)]
        if not mine:
            raise NoIdentity
        return WorkloadState(
            identities=tuple(grant.identity for grant in mine),
            bundle=self.bundle,
            federated=self._federated_for(mine),
            crls=self._crls,
            revision=self._revision,
        )

    def _federated_for(self, grants: Sequence[Grant]) -> Mapping[str, TrustBundle]:
        wanted = {name for grant in grants for name in grant.federates_with}
        return {name: bundle for name, bundle in self.federated.items() if name in wanted}

    def _issued(
        self, spiffe_id: SpiffeId, hint: str, algorithm: KeyAlgorithm, ttl: timedelta
    ) -> X509Identity:
        key = generate_private_key(algorithm)
        issuer = self._authorities[0].x509
        credential = issuer.sign(
            issuer.prepare(
                csr=request_by(key, signature_hash(algorithm)),
                spiffe_id=spiffe_id,
                profile=WORKLOAD,
                ttl=ttl,
                now=self.clock.now(),
            )
        )
        return X509Identity(
            entry_id=f"entry-of-{spiffe_id.path}",
            spiffe_id=str(spiffe_id),
            hint=hint,
            chain=credential.chain,
            key=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            serial=credential.serial,
            not_after=credential.not_after,
        )

    def _jwt(self, grant: Grant, audiences: Sequence[str]) -> JwtIdentity:
        made = self._token(self._authorities[0].jwt, grant.spiffe_id, audiences)
        return JwtIdentity(str(grant.spiffe_id), grant.hint, made.token, made.not_after)

    def _token(
        self, issuer: JwtIssuer, spiffe_id: SpiffeId, audiences: Sequence[str]
    ) -> JwtCredential:
        try:
            return issuer.sign(
                issuer.prepare(
                    spiffe_id=spiffe_id,
                    audiences=audiences,
                    ttl=timedelta(minutes=5),
                    now=self.clock.now(),
                )
            )
        except ca_errors.AudienceInvalid as exc:
            raise AudienceInvalid(exc.message) from exc

    def _signed_crls(self) -> tuple[bytes, ...]:
        self._crl_number += 1
        now = self.clock.now()
        return tuple(
            build_crl(
                issuer=each.x509,
                entries=self._revoked.values(),
                number=self._crl_number,
                this_update=now,
                next_update=now + timedelta(hours=1),
            )
            for each in self._authorities
        )
