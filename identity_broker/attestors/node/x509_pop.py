"""x509_pop: a machine that holds the key of a certificate from a CA you trust.

- The node sends its certificate chain; the broker verifies it to the configured CAs (RFC 5280).
  The first must be a machine's: no CA, and fit for TLS clients where it has an extended key usage.
- The broker sends a fresh nonce; the node signs it together with its own nonce, the trust domain
  and the key it wants certified. So an answer fits one challenge, one broker and one CSR.
- The node's half is `identity_client.attestation`; the signed bytes are built by `signed_message`,
  and a test holds the two equal.

    payload    {"certificates": [base64 DER, leaf first]}
    challenge  {"nonce": base64 of 32 bytes, "context": trust domain}
    answer     {"client_nonce": base64 of 32 bytes, "signature": base64}
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from identity_broker.attestors.node import MAX_PAYLOAD_BYTES, Challenger, Evidence
from identity_broker.attestors.node.plugins import AttestorContext, NodeAttestorPlugin
from identity_broker.domain import names
from identity_broker.domain.clock import Clock
from identity_broker.domain.node import AttestedNode
from identity_broker.domain.selector import Selector
from identity_broker.errors import AttestationFailed, ChallengeFailed, ConfigError, EntryInvalid
from identity_ca.errors import CAError
from identity_ca.keys import algorithm_of
from identity_ca.spiffe_id import TrustDomain

NONCE_BYTES = 32
MAX_CHAIN = 8
_LABEL = b"identity-broker x509_pop v1\x00"
_CLIENT_PURPOSES = frozenset(
    {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
)

_E = TypeVar("_E", bound=x509.ExtensionType)


def signed_message(
    spki_der: bytes, trust_domain: TrustDomain, nonce: bytes, client_nonce: bytes
) -> bytes:
    """Return the bytes that the node signs."""
    return b"".join(
        (
            _LABEL,
            hashlib.sha256(spki_der).digest(),
            str(trust_domain).encode(),
            b"\x00",
            nonce,
            client_nonce,
        )
    )


class X509PopAttestor:
    """The broker's half.

    Args:
        trust_domain: the trust domain nodes join.
        authorities: the CAs that certify machines.
    """

    name = "x509_pop"

    def __init__(
        self, trust_domain: TrustDomain, authorities: Sequence[x509.Certificate], clock: Clock
    ) -> None:
        if not authorities:
            raise ConfigError("attestors.x509_pop.ca_bundle_file holds no certificate")
        self._trust_domain = trust_domain
        self._store = Store(list(authorities))
        self._clock = clock

    @classmethod
    def from_file(cls, trust_domain: TrustDomain, ca_bundle: Path, clock: Clock) -> X509PopAttestor:
        """Read the CAs from a PEM file.

        Raises:
            ConfigError: it cannot be read or holds no certificate.
        """
        try:
            authorities = x509.load_pem_x509_certificates(ca_bundle.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"attestors.x509_pop.ca_bundle_file cannot be read: {error.strerror}"
            ) from error
        except ValueError as error:
            raise ConfigError(
                "attestors.x509_pop.ca_bundle_file is not a PEM file of certificates"
            ) from error
        return cls(trust_domain, authorities, clock)

    async def attest(self, evidence: Evidence, challenge: Challenger) -> AttestedNode:
        """Verify the chain, then the possession of its key.

        Raises:
            AttestationFailed: the payload or the chain.
            ChallengeFailed: the answer to the challenge.
        """
        leaf, intermediates = _parse_payload(evidence.payload)
        _refuse_unfit(leaf)
        chain = self._verify(leaf, intermediates, self._clock.now())
        nonce = secrets.token_bytes(NONCE_BYTES)
        question = {"nonce": _b64(nonce), "context": str(self._trust_domain)}
        answer = _parse_object(await challenge(json.dumps(question).encode()), ChallengeFailed)
        client_nonce = _bytes_of(answer, "client_nonce", ChallengeFailed)
        if len(client_nonce) != NONCE_BYTES:
            raise ChallengeFailed(detail="client_nonce has the wrong length")
        _verify_signature(
            leaf.public_key(),
            _bytes_of(answer, "signature", ChallengeFailed),
            signed_message(evidence.spki_der, self._trust_domain, nonce, client_nonce),
        )
        return self._node(leaf, chain)

    async def give_back(self, payload: bytes) -> None:
        """Nothing was used up: a certificate may attest again."""

    def _verify(
        self,
        leaf: x509.Certificate,
        intermediates: list[x509.Certificate],
        now: datetime,
    ) -> list[x509.Certificate]:
        builder = (
            PolicyBuilder()
            .store(self._store)
            .time(now)
            .max_chain_depth(MAX_CHAIN)
            .extension_policies(
                ca_policy=_CA_POLICY,
                ee_policy=ExtensionPolicy.permit_all(),
            )
        )
        try:
            algorithm_of(leaf.public_key())
            chain = builder.build_client_verifier().verify(leaf, intermediates).chain
        except CAError as error:
            raise AttestationFailed(
                f"the certificate's key cannot be used: {error.message}"
            ) from error
        except VerificationError as error:
            raise AttestationFailed(
                "the certificate does not lead to a CA this broker trusts for attestation",
                hint="idb config show names the CA bundle; the broker's log says what is wrong",
                detail=str(error),
            ) from error
        except ValueError as error:
            raise AttestationFailed(detail=f"unusable certificate: {error}") from error
        _refuse_unknown_demands(chain[1:])
        return chain

    def _node(self, leaf: x509.Certificate, chain: list[x509.Certificate]) -> AttestedNode:
        fingerprint = leaf.fingerprint(hashes.SHA256()).hex()
        values = [f"serial:{leaf.serial_number:x}", f"fingerprint:{fingerprint}"]
        common_names = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        values += [f"subject:cn:{attribute.value!s}" for attribute in common_names]
        values += [f"san:dns:{name}" for name in _dns_names(leaf)]
        values += [
            f"ca:fingerprint:{certificate.fingerprint(hashes.SHA256()).hex()}"
            for certificate in chain[1:]
        ]
        return AttestedNode(
            spiffe_id=names.node_id(self._trust_domain, self.name, fingerprint),
            attestor=self.name,
            selectors=frozenset(_selectors(self.name, values)),
            reattestable=True,
        )


def _selectors(name: str, values: Iterable[str]) -> Iterable[Selector]:
    for value in values:
        try:
            yield Selector(name, value)
        except EntryInvalid as error:
            # A name no entry could ever ask for; refusing beats dropping it unseen.
            raise AttestationFailed(
                "the certificate holds a name that cannot be a selector", detail=error.public
            ) from error


def _refuse_unfit(leaf: x509.Certificate) -> None:
    """Refuse what TLS's client verifier lets pass: a CA is no machine.

    Raises:
        AttestationFailed: a CA, a key that signs certificates, or a key for other purposes.
    """
    constraints = _extension(leaf, x509.BasicConstraints)
    usage = _extension(leaf, x509.KeyUsage)
    if (constraints is not None and constraints.ca) or (usage is not None and usage.key_cert_sign):
        raise AttestationFailed(
            "the first certificate is a CA's, and a CA is not a machine",
            hint="list the machine's own certificate first",
        )
    purposes = _extension(leaf, x509.ExtendedKeyUsage)
    if purposes is not None and not _CLIENT_PURPOSES.intersection(purposes):
        raise AttestationFailed(
            "the certificate's extended key usage does not include clientAuth",
            hint="have the machine certified for clientAuth",
        )


def _extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _must_certify(_policy: object, _ca: x509.Certificate, usage: x509.KeyUsage | None) -> None:
    if usage is not None and not usage.key_cert_sign:
        raise ValueError("the keyUsage of a CA certificate lacks keyCertSign")


def _must_be_ca(_policy: object, _ca: x509.Certificate, found: x509.BasicConstraints) -> None:
    if not found.ca:
        raise ValueError("a CA certificate is not marked as one")


# Plain private CAs, such as `openssl req -x509` makes, have no keyUsage; RFC 5280 section 4.2.1.3
# asks for it, and nothing is lost without: what is trusted is named in the configuration.
_CA_POLICY: Final = (
    ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, Criticality.AGNOSTIC, _must_be_ca)
    .may_be_present(x509.KeyUsage, Criticality.AGNOSTIC, _must_certify)
)
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.NAME_CONSTRAINTS,
    }
)


def _refuse_unknown_demands(authorities: Sequence[x509.Certificate]) -> None:
    """RFC 5280 section 4.2: who does not understand a critical extension refuses.

    Raises:
        AttestationFailed: a CA certificate has one.
    """
    for certificate in authorities:
        for extension in certificate.extensions:
            if extension.critical and extension.oid not in _UNDERSTOOD:
                raise AttestationFailed(
                    "a CA certificate demands what this broker does not know",
                    detail=f"critical extension {extension.oid.dotted_string}",
                )


def _dns_names(leaf: x509.Certificate) -> list[str]:
    try:
        names_extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    except ValueError as error:
        raise AttestationFailed(detail=f"unreadable extensions: {error}") from error
    return names_extension.value.get_values_for_type(x509.DNSName)


def _parse_payload(payload: bytes) -> tuple[x509.Certificate, list[x509.Certificate]]:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise AttestationFailed("the attestation payload is too large")
    listed = _parse_object(payload, AttestationFailed).get("certificates")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_CHAIN:
        raise AttestationFailed(f'"certificates" must list 1 to {MAX_CHAIN} certificates')
    try:
        chain = [
            x509.load_der_x509_certificate(base64.b64decode(item, validate=True))
            for item in listed
            if isinstance(item, str)
        ]
    except (ValueError, binascii.Error) as error:
        raise AttestationFailed("a certificate in the payload does not parse") from error
    if len(chain) != len(listed):
        raise AttestationFailed("a certificate in the payload is not a string")
    # Parsed lazily by the library: touch what is needed, so that nothing raises later.
    try:
        for certificate in chain:
            certificate.public_bytes(Encoding.DER)
            _ = certificate.extensions, certificate.subject
    except ValueError as error:
        raise AttestationFailed("a certificate in the payload does not parse") from error
    return chain[0], chain[1:]


def _parse_object(raw: bytes, failure: type[AttestationFailed | ChallengeFailed]) -> dict[str, Any]:
    if len(raw) > MAX_PAYLOAD_BYTES:
        raise failure(detail="too large")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise failure(detail="not JSON") from error
    if not isinstance(value, dict):
        raise failure(detail="not a JSON object")
    return value


def _bytes_of(
    value: dict[str, Any], key: str, failure: type[AttestationFailed | ChallengeFailed]
) -> bytes:
    text = value.get(key)
    if not isinstance(text, str):
        raise failure(detail=f"{key} is missing")
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise failure(detail=f"{key} is not base64") from error


def _b64(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _verify_signature(public_key: object, signature: bytes, message: bytes) -> None:
    try:
        if isinstance(public_key, ec.EllipticCurvePublicKey):
            digest = hashes.SHA384() if public_key.curve.name == "secp384r1" else hashes.SHA256()
            public_key.verify(signature, message, ec.ECDSA(digest))
        elif isinstance(public_key, rsa.RSAPublicKey):
            public_key.verify(
                signature,
                message,
                padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32),
                hashes.SHA256(),
            )
        elif isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, message)
        else:
            raise ChallengeFailed(detail="a kind of key that cannot sign here")
    except InvalidSignature as error:
        raise ChallengeFailed(detail="the signature does not verify") from error


def _from_table(context: AttestorContext, table: Mapping[str, Any]) -> X509PopAttestor:
    ca_bundle = table.get("ca_bundle_file")
    if ca_bundle is None:
        raise ConfigError("attestors.x509_pop.ca_bundle_file is required")
    return X509PopAttestor.from_file(context.trust_domain, Path(ca_bundle), context.clock)


PLUGIN: Final = NodeAttestorPlugin(X509PopAttestor.name, _from_table)
