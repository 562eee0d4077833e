"""What every upstream authority does; a backend's test module subclasses `UpstreamContract`.

class TestVaultPki(UpstreamContract):
    name = "vault_pki"
    refusals = (UpstreamRejected,)

    @pytest.fixture
    def upstream(self, ...) -> UpstreamAuthority: ...
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import ClassVar

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from identity_ca.authority_certificate import build_intermediate_csr
from identity_ca.bundle import TrustBundle
from identity_ca.chain import verify_x509_svid
from identity_ca.errors import CAError
from identity_ca.issuer import X509Issuer
from identity_ca.keys import KeyAlgorithm, LocalSigningKey, generate_private_key, spki_der
from identity_ca.profile import WORKLOAD
from identity_ca.spiffe_id import SpiffeId, TrustDomain
from identity_ca.upstream import SignedAuthority, UpstreamAuthority, verify_upstream

TRUST_DOMAIN = TrustDomain("example.org")


class UpstreamContract:
    """Subclass it, name the class `Test…`, and provide `upstream`."""

    name: ClassVar[str]
    self_signed: ClassVar[bool] = False
    ttl: ClassVar[timedelta] = timedelta(hours=6)
    """A lifetime the upstream can give."""

    too_long: ClassVar[timedelta] = timedelta(days=365 * 100)
    """A lifetime it cannot give."""

    refusals: ClassVar[tuple[type[CAError], ...]]
    """How it refuses `too_long`."""

    algorithms: ClassVar[tuple[KeyAlgorithm, ...]] = (KeyAlgorithm.EC_P256, KeyAlgorithm.EC_P384)

    @pytest.fixture
    def upstream(self) -> UpstreamAuthority:
        raise NotImplementedError

    @pytest.fixture
    def now(self) -> datetime:
        return datetime.now(UTC)

    @pytest.fixture
    def key(self) -> LocalSigningKey:
        return LocalSigningKey("memory:x509-1@1", generate_private_key(KeyAlgorithm.EC_P256))

    @pytest.fixture
    def signed(
        self, upstream: UpstreamAuthority, key: LocalSigningKey, now: datetime
    ) -> SignedAuthority:
        return upstream.certify(key, trust_domain=TRUST_DOMAIN, ttl=self.ttl, now=now)

    def test_it_is_called_by_its_name(self, upstream):
        assert upstream.name == self.name

    def test_the_first_certificate_is_for_the_key(self, signed, key):
        assert spki_der(signed.chain[0].public_key()) == spki_der(key.public_key)

    def test_what_it_returns_passes_the_check(self, signed, key, now):
        verify_upstream(signed, key=key, trust_domain=TRUST_DOMAIN, ttl=self.ttl, now=now)

    def test_the_roots_are_self_signed(self, signed):
        assert signed.roots
        for root in signed.roots:
            root.verify_directly_issued_by(root)

    def test_the_chain_ends_below_a_root_and_leaves_it_out(self, signed):
        for child, parent in zip(signed.chain, signed.chain[1:], strict=False):
            child.verify_directly_issued_by(parent)
        if self.self_signed:
            assert signed.chain == signed.roots
            return
        assert not set(signed.chain) & set(signed.roots)
        assert signed.chain[-1].issuer in {root.subject for root in signed.roots}

    def test_it_lives_as_long_as_asked(self, signed, now):
        end = signed.chain[0].not_valid_after_utc
        assert abs(end - (now + self.ttl)) <= timedelta(seconds=5)

    def test_it_may_sign_leaves_and_no_ca(self, signed):
        extensions = signed.chain[0].extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical
        assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign

    def test_it_names_its_trust_domain(self, signed):
        names = signed.chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        assert uris == [str(TRUST_DOMAIN.id)]

    def test_a_leaf_below_it_validates_against_its_roots(self, signed, key, now):
        issuer = X509Issuer(
            authority_id="a", trust_domain=TRUST_DOMAIN, key=key, chain=signed.chain
        )
        leaf_key = LocalSigningKey("leaf", ec.generate_private_key(ec.SECP256R1()))
        request = build_intermediate_csr(leaf_key, trust_domain=TRUST_DOMAIN)
        spiffe_id = SpiffeId.from_segments(TRUST_DOMAIN, "payments")
        credential = issuer.sign(
            issuer.prepare(
                csr=request.public_bytes(Encoding.DER),
                spiffe_id=spiffe_id,
                profile=WORKLOAD,
                ttl=timedelta(minutes=10),
                now=now,
            )
        )
        bundle = TrustBundle(
            TRUST_DOMAIN, x509_authorities=tuple(r.public_bytes(Encoding.DER) for r in signed.roots)
        )
        assert verify_x509_svid(credential.chain, bundle=bundle, now=now).spiffe_id == spiffe_id

    def test_every_algorithm_can_be_certified(self, upstream, now):
        for algorithm in self.algorithms:
            key = LocalSigningKey("memory:x509-2@1", generate_private_key(algorithm))
            signed = upstream.certify(key, trust_domain=TRUST_DOMAIN, ttl=self.ttl, now=now)
            assert spki_der(signed.chain[0].public_key()) == spki_der(key.public_key)

    def test_a_lifetime_it_cannot_give_is_refused_and_not_cut(self, upstream, key, now):
        with pytest.raises(self.refusals):
            upstream.certify(key, trust_domain=TRUST_DOMAIN, ttl=self.too_long, now=now)

    def test_check_passes(self, upstream):
        upstream.check()

    def test_closing_twice_is_harmless(self, upstream):
        upstream.close()
        upstream.close()
