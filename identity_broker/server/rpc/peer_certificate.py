"""The client certificate of a connection, parsed once for each distinct certificate.

- gRPC has verified the chain against the bundle when the connection was made; nothing here
  verifies signatures. TLS does not ask whether the end of that chain is an SVID: this does.
- Whose authority signed, expiry, ban and revocation are the authenticator's, on every call.
"""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC
from typing import Final, TypeVar

from cryptography import x509

from identity_broker.domain.caller import PeerCertificate
from identity_broker.errors import Unauthenticated
from identity_ca.errors import SpiffeIdError
from identity_ca.serial import serial_hex
from identity_ca.spiffe_id import SpiffeId

MAX_PARSED: Final = 4096

_E = TypeVar("_E", bound=x509.ExtensionType)


class PeerCertificates:
    """PEM → PeerCertificate, remembering the last `capacity` of them."""

    def __init__(self, capacity: int = MAX_PARSED) -> None:
        self._parsed: OrderedDict[bytes, PeerCertificate] = OrderedDict()
        self._capacity = capacity

    def of(self, pem: bytes) -> PeerCertificate:
        """What the certificate says of the peer.

        Raises:
            Unauthenticated: it is no leaf X.509-SVID: not exactly one URI name, or one that is
                no SPIFFE ID with a path; a CA, or a key that may sign certificates or may not
                sign at all (SPIFFE X509-SVID sections 2, 4 and 5.2).
        """
        found = self._parsed.get(pem)
        if found is not None:
            self._parsed.move_to_end(pem)
            return found
        found = parse_peer_certificate(pem)
        self._parsed[pem] = found
        if len(self._parsed) > self._capacity:
            self._parsed.popitem(last=False)
        return found

    def __len__(self) -> int:
        return len(self._parsed)


def parse_peer_certificate(pem: bytes) -> PeerCertificate:
    """Read a leaf certificate; see `PeerCertificates.of`."""
    try:
        leaf = x509.load_pem_x509_certificate(pem)
        extensions = leaf.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        constraints = _extension(extensions, x509.BasicConstraints)
        authority = _extension(extensions, x509.AuthorityKeyIdentifier)
        serial = leaf.serial_number
        not_after = leaf.not_valid_after_utc.astimezone(UTC)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as exc:
        raise Unauthenticated(
            "the client certificate is not an X.509-SVID", detail=str(exc)
        ) from exc
    if (constraints is not None and constraints.ca) or usage.key_cert_sign or usage.crl_sign:
        raise Unauthenticated(
            "a signing certificate is no identity: the client certificate must be a leaf",
            detail=f"serial {serial_hex(serial)}",
        )
    if not usage.digital_signature:
        raise Unauthenticated("the client certificate's key usage lacks digitalSignature")
    if len(uris) != 1:
        raise Unauthenticated("the client certificate must have exactly one URI name")
    try:
        spiffe_id = SpiffeId.parse(uris[0])
    except SpiffeIdError as exc:
        raise Unauthenticated(
            "the client certificate's URI name is not a SPIFFE ID", detail=str(exc)
        ) from exc
    if not spiffe_id.path:
        raise Unauthenticated("the client certificate names a trust domain and no workload")
    key_id = authority.key_identifier if authority is not None else None
    return PeerCertificate(
        spiffe_id, serial_hex(serial), not_after, key_id.hex() if key_id is not None else ""
    )


def _extension(extensions: x509.Extensions, kind: type[_E]) -> _E | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
