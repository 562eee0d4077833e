"""For your tests: a trust domain and identity sources in memory, with real keys and certificates.

    domain = FakeTrustDomain("example.org")
    web, api = domain.source("spiffe://example.org/web"), domain.source("spiffe://example.org/api")
    context = server_ssl_context(api, authorize=web.snapshot().spiffe_id)
    web.rotate()                 # a new key and certificate, as after half of its life
    domain.revoke(web)           # every source of the domain refuses it from now on
    web.withdraw()               # it may not use its identity any more, as without its entry

- A fake source has the whole reading side of `IdentitySource` and passes for one everywhere.
- No network, no files, no broker. Never use it outside of tests: its CA key is in memory.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from spiffe import JwtBundle, JwtSvid, SpiffeId, TrustDomain, X509Bundle, X509Svid

from identity_client.clock import utc_now
from identity_client.credential import BundleSnapshot, IdentitySnapshot, X509Material
from identity_client.errors import NotPermitted
from identity_client.holder import IdentityHolder, SourceStatus, Subscriber, Unsubscribe
from identity_client.jwt_check import verify_with
from identity_client.keys import KeyPair
from identity_client.naming import parse_spiffe_id, parse_trust_domain, server_name
from identity_client.revocation import DenySet, RevokedCredential
from identity_client.staleness import DEFAULT_STALENESS, StalenessPolicy

__all__ = ["FakeIdentitySource", "FakeTrustDomain"]

_BACKDATED = timedelta(seconds=10)
_LONG = timedelta(days=1)


class FakeTrustDomain:
    """A certificate authority and a JWT key in memory, and the sources that belong to them."""

    def __init__(self, name: str | TrustDomain = "example.org") -> None:
        self.trust_domain = parse_trust_domain(name)
        self.sources: list[FakeIdentitySource] = []
        self._sequence = 0
        self._jwt_key = ec.generate_private_key(ec.SECP256R1())
        self.replace_authority()

    def replace_authority(self) -> None:
        """A new CA: from now on only it is trusted, by sources that `rotate` or are made later."""
        self._sequence += 1
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._authority = _authority(self._key, self.trust_domain)
        self.bundle = BundleSnapshot(
            trust_domain=self.trust_domain,
            x509_authorities=(self._authority,),
            jwt_bundle=JwtBundle(self.trust_domain, {"fake-1": self._jwt_key.public_key()}),
            sequence=self._sequence,
        )

    def source(
        self,
        spiffe_id: str | SpiffeId,
        *,
        ttl: timedelta = timedelta(hours=1),
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> FakeIdentitySource:
        """A source that is ready, as `spiffe_id`, with certificates that live for `ttl`.

        Raises:
            SettingsInvalid: not a SPIFFE ID.
        """
        made = FakeIdentitySource(self, parse_spiffe_id(spiffe_id), ttl, staleness)
        self.sources.append(made)
        return made

    def revoke(self, source: FakeIdentitySource) -> None:
        """Revokes the certificate `source` shows now; every source of the domain knows at once."""
        serial = source.serial
        revoked = RevokedCredential(
            id=serial, spiffe_id=str(source.spiffe_id), expires_at=utc_now() + _LONG
        )
        for one in self.sources:
            one.learn_revocation(revoked)

    def issue(self, spiffe_id: SpiffeId, ttl: timedelta) -> X509Material:
        """An X.509-SVID with a fresh key."""
        pair, now = KeyPair(), utc_now()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fake")]))
            .issuer_name(self._authority.subject)
            .public_key(pair.private_key.public_key())
            .serial_number(int.from_bytes(b"\x01" + secrets.token_bytes(19)))
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + ttl)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [
                        x509.UniformResourceIdentifier(str(spiffe_id)),
                        x509.DNSName(server_name(spiffe_id)),
                    ]
                ),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
        )
        leaf = builder.sign(self._key, hashes.SHA256())
        return X509Material.from_chain(
            [leaf.public_bytes(serialization.Encoding.DER)],
            private_key=pair.private_key,
            bundle=self.bundle,
            received=now,
        )

    def issue_jwt(self, spiffe_id: SpiffeId, audiences: Sequence[str], ttl: timedelta) -> JwtSvid:
        """A JWT-SVID."""
        now = utc_now()
        claims = {
            "sub": str(spiffe_id),
            "aud": list(audiences),
            "iat": int(now.timestamp()),
            "exp": int((now + ttl).timestamp()),
            "jti": secrets.token_hex(20),
        }
        token = jwt.encode(claims, self._jwt_key, algorithm="ES256", headers={"kid": "fake-1"})
        return JwtSvid.parse_insecure(token, set(audiences))


class FakeIdentitySource:
    """A source that is ready from the start; made by `FakeTrustDomain.source`."""

    def __init__(
        self,
        domain: FakeTrustDomain,
        spiffe_id: SpiffeId,
        ttl: timedelta,
        staleness: StalenessPolicy = DEFAULT_STALENESS,
    ) -> None:
        self.spiffe_id = spiffe_id
        self._domain = domain
        self._ttl = ttl
        self._holder = IdentityHolder(staleness)
        self.hear_again()
        self.rotate()

    def __repr__(self) -> str:
        return f"FakeIdentitySource({self.spiffe_id})"

    # --- what a test does to it ------------------------------------------------------------------

    def rotate(self) -> IdentitySnapshot:
        """A new key, certificate and the domain's newest bundle, swapped in as in real life."""
        material = self._domain.issue(self.spiffe_id, self._ttl)
        self._serial = material.serial
        return self._holder.publish(material, self._domain.bundle)

    def learn_revocation(self, revoked: RevokedCredential) -> None:
        """What a real source hears from the broker's stream."""
        self._holder.revoke([revoked], now=utc_now())

    def hear_nothing(self, seconds: float) -> None:
        """As when nothing has been heard about revocations for so long, and nothing will be."""
        denied = self._holder.denied
        denied.feed_synced = False
        denied.hear(now=utc_now() - timedelta(seconds=seconds), ago=seconds)

    def hear_again(self) -> None:
        """As when the feed of revocations is back."""
        denied = self._holder.denied
        denied.find_feed()
        denied.feed_synced = True
        denied.hear(now=utc_now(), ago=-math.inf)

    def deny_authorities(self, *ids: str) -> None:
        """As when these are the authorities that are revoked, by subject key identifier."""
        denied = self._holder.denied
        news = denied.deny_authorities(ids)
        self._holder.denials_changed(somebody_denied=news)

    def withdraw(self) -> None:
        """As when its entry goes away: nothing is handed out until the next `rotate`."""
        self._holder.withdraw(NotPermitted("withdrawn by the test", reason="NO_IDENTITY"))

    @property
    def serial(self) -> str:
        """The serial number of the certificate it shows, revoked or not."""
        return self._serial

    # --- what it shares with every source ------------------------------------------------------

    def start(self) -> None:
        """Nothing to do: it is ready."""

    def close(self) -> None:
        """Hands out nothing any more."""
        self._holder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def wait_ready(self, timeout: float | None = None) -> IdentitySnapshot:
        """The current snapshot."""
        return self._holder.snapshot()

    def snapshot(self) -> IdentitySnapshot:
        """As in `IdentitySource`."""
        return self._holder.snapshot()

    @property
    def x509_svid(self) -> X509Svid:
        """As in `IdentitySource`."""
        return self._holder.snapshot().svid

    def x509_bundle(self, trust_domain: str | TrustDomain | None = None) -> X509Bundle:
        """As in `IdentitySource`."""
        name = self._domain.trust_domain if trust_domain is None else TrustDomain(str(trust_domain))
        return self._holder.snapshot().x509_bundle(name)

    @property
    def denied(self) -> DenySet:
        """As in `IdentitySource`."""
        return self._holder.denied

    def status(self) -> SourceStatus:
        """As in `IdentitySource`."""
        return self._holder.status()

    def fetch_jwt_svid(self, audience: str | Sequence[str]) -> JwtSvid:
        """As in `IdentitySource`, without a cache."""
        audiences = (audience,) if isinstance(audience, str) else tuple(audience)
        return self._domain.issue_jwt(self._holder.snapshot().spiffe_id, audiences, self._ttl)

    def validate_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """As in `IdentitySource`."""
        return verify_with(self._holder.snapshot(), token, audience, denied=self._holder.denied)

    def confirm_jwt_svid(self, token: str, audience: str) -> JwtSvid:
        """As in `IdentitySource`; there is nobody to ask."""
        return self.validate_jwt_svid(token, audience)

    def subscribe(self, subscriber: Subscriber) -> Unsubscribe:
        """As in `IdentitySource`; called by whoever calls `rotate`."""
        return self._holder.subscribe(subscriber)

    @property
    def crls(self) -> tuple[bytes, ...]:
        """As in `IdentitySource`: none."""
        return self._holder.crls

    def updates(self, *, crls: bool = False) -> Iterator[IdentitySnapshot]:
        """The current snapshot alone."""
        yield self._holder.snapshot()


def _authority(key: ec.EllipticCurvePrivateKey, trust_domain: TrustDomain) -> x509.Certificate:
    now = utc_now()
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"fake {trust_domain}")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + 7 * _LONG)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(trust_domain.as_spiffe_id())]
            ),
            critical=False,
        )
    )
    return builder.sign(key, hashes.SHA256())


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
